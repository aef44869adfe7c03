"""Images in tar archives and Parquet files: listed, read from their places, and ranked."""

import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from weighmatch import shards
from weighmatch.data import containers
from weighmatch.data.containers import Member, decode_members, walk_members
from weighmatch.data.files import Rejected, RejectedFileError
from weighmatch.data.rank_config import Preparation
from weighmatch.semisup import make_schedule
from weighmatch.shards import Shards, score_shard
from weighmatch.streaming import rank_folder

SHAPE = (1, 8, 8)


def picture(seed):
    """An image of 8 x 8 pixels, and the bytes of its PNG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return pixels, content.getvalue()


def write_tar(path, contents, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in contents:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def write_structs(path, contents, names, **options):
    """As Hugging Face's data sets store images."""
    rows = [{"bytes": content, "path": name} for content, name in zip(contents, names, strict=True)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": list(range(len(rows)))})
    pq.write_table(table, path, **options)


def found_in(root):
    """The images by their paths, and the reasons of what is none."""
    images, reasons = {}, {}
    listed = []
    for one in walk_members(root):
        if isinstance(one, Rejected):
            reasons[one.path] = one.reason
        else:
            listed.append(one)
    listed.sort(key=lambda member: (member.file, member.first))
    answers = decode_members(root, listed, SHAPE, "crop", "white")
    for member, found in zip(listed, answers, strict=True):
        if isinstance(found, RejectedFileError):
            reasons[member.path] = found.reason
        else:
            images[member.path] = found[0]
    return images, reasons


@pytest.fixture
def run(training_set, run_config, tmp_path):
    config = run_config(steps=40, schedule="rounds", rounds=2)
    return make_schedule(config).fit(training_set, tmp_path / "run")


@pytest.fixture
def piles(tmp_path):
    """40 images as files, and the same ones in files, a tar archive and two Parquet files."""
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    plain.mkdir()
    (mixed / "far").mkdir(parents=True)
    names = {}
    contents = [picture(seed)[1] for seed in range(40)]
    for k, content in enumerate(contents):
        (plain / f"{k}.png").write_bytes(content)
        if k < 10:
            (mixed / f"{k}.png").write_bytes(content)
            names[f"{k}.png"] = f"{k}.png"
    names |= {f"far/a.tar/in/{k:02d}.png": f"{k}.png" for k in range(10, 20)}
    members = [(f"in/{k:02d}.png", contents[k]) for k in range(10, 20)]
    write_tar(mixed / "far" / "a.tar", members)
    # Their order as text, 0, 1, 10, 11, 2, is not that of the rows.
    names |= {f"b.parquet/{k - 20}/{k}.png": f"{k}.png" for k in range(20, 32)}
    write_structs(
        mixed / "b.parquet",
        contents[20:32],
        [f"there/{k}.png" for k in range(20, 32)],
        row_group_size=5,
    )
    names |= {f"c.parquet/{k - 32}": f"{k}.png" for k in range(32, 40)}
    pq.write_table(pa.table({"jpg": contents[32:40]}), mixed / "c.parquet")
    return plain, mixed, names


def test_images_in_containers_rank_as_files_do(run, piles, tmp_path, monkeypatch):
    plain, mixed, names = piles
    before = {path: path.stat().st_mtime_ns for path in mixed.rglob("*")}
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 7)
    assert rank_folder(run, plain, tmp_path / "a", workers=1) == 40
    assert rank_folder(run, mixed, tmp_path / "b", workers=1) == 40
    files, held = (
        pd.read_csv(tmp_path / name / "ranking.csv", keep_default_na=False) for name in "ab"
    )
    held["path"] = held["path"].map(names)
    both = [table.sort_values("path", ignore_index=True) for table in (files, held)]
    pd.testing.assert_frame_equal(*both, rtol=1e-6)
    assert {path: path.stat().st_mtime_ns for path in mixed.rglob("*")} == before
    # The page shows the same pictures under the other names.
    first, second = ((tmp_path / name / "gallery.html").read_text() for name in "ab")
    for path, name in sorted(names.items(), key=lambda pair: -len(pair[0])):
        second = second.replace(path, name)
    assert second == first
    assert pd.read_csv(tmp_path / "b" / "rejected_files.csv").empty


def test_what_is_listed_can_be_read_in_parts(piles, monkeypatch):
    plain, mixed, names = piles
    monkeypatch.setattr(containers, "BYTES_AT_ONCE", 200)  # some rows at a time
    monkeypatch.setattr(containers, "ROWS_AT_ONCE", 3)
    images, reasons = found_in(mixed)
    assert not reasons
    assert images.keys() == names.keys()
    for path, name in names.items():
        np.testing.assert_array_equal(images[path], np.asarray(Image.open(plain / name)))


def test_a_container_that_changed_is_scored_again(run, piles, tmp_path, monkeypatch):
    _, mixed, _ = piles
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 10)
    place = tmp_path / "work"

    def missing():
        found = Shards(place, run, mixed, Preparation())
        numbers = found.missing()
        for number in numbers:
            found.add(score_shard(place, number, lambda images: None))
        return numbers

    def holding(file):
        found = Shards(place, run, mixed, Preparation()).listed
        parts = enumerate(found.members(found.part(number)) for number in range(len(found)))
        return [number for number, part in parts if any(member.file == file for member in part)]

    assert len(missing()) > 4
    assert missing() == []
    write_tar(mixed / "far" / "a.tar", [(f"{k}.png", picture(k)[1]) for k in range(10)])
    assert missing() == holding("far/a.tar")
    os.utime(mixed / "b.parquet", ns=(1, 1))
    assert missing() == holding("b.parquet")


def test_members_that_are_no_images_get_a_reason(tmp_path):
    pixels, content = picture(0)
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name, inside=b"", **about):
            header = tarfile.TarInfo(name)
            header.size = len(inside)
            vars_of = {"type": tarfile.REGTYPE, "linkname": "", **about}
            header.type, header.linkname = vars_of["type"], vars_of["linkname"]
            archive.addfile(header, io.BytesIO(inside))

        add("folder", type=tarfile.DIRTYPE)
        add("folder/0.PNG", content)
        add("../../up.png", content)
        add("0.json", b"{}")
        add("broken.png", content[:40])
        add("empty.png")
        add("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.png", type=tarfile.LNKTYPE, linkname="folder/0.PNG")
        add("pipe.png", type=tarfile.FIFOTYPE)
        add("a\udcff.png", content)
        add("long" * 100 + ".png", content)
    images, reasons = found_in(tmp_path)
    good = ("folder/0.PNG", "../../up.png", "long" * 100 + ".png")
    assert images.keys() == {f"x.tar/{name}" for name in good}
    assert all((image == pixels).all() for image in images.values())
    assert {path.removeprefix("x.tar/"): reason for path, reason in reasons.items()} == {
        "0.json": "its name does not end as that of an image does",
        "broken.png": reasons["x.tar/broken.png"],
        "empty.png": "it is empty",
        "link.png": "a link within an archive, which is not followed",
        "hard.png": "a link within an archive, which is not followed",
        "pipe.png": "not a regular file",
        "a\\udcff.png": "its name is not valid UTF-8; rename it",
    }


def test_of_a_damaged_archive_the_images_before_the_damage_are_used(tmp_path):
    contents = [(f"{k}.png", picture(k)[1]) for k in range(4)]
    whole = tmp_path / "whole.tar"
    write_tar(whole, contents)
    content = whole.read_bytes()
    with tarfile.open(whole) as archive:
        third = archive.getmembers()[2]
    damaged = {
        "header": content[: third.offset] + b"\1" * 512 + content[third.offset + 512 :],
        "within": content[: third.offset_data + 5],
        "padding": content[: third.offset_data + third.size + 1],
        "between": content[: third.offset],
        "in_header": content[: third.offset + 100],
        "no_tar": b"no archive" * 100,
        "none": b"",
    }
    for name, part in damaged.items():
        root = tmp_path / name
        root.mkdir()
        (root / "x.tar").write_bytes(part)
        images, reasons = found_in(root)
        kept = {"no_tar": 0, "none": 0, "padding": 3}.get(name, 2)
        assert list(images) == [f"x.tar/{k}.png" for k in range(kept)], name
        assert reasons == {"x.tar": containers.DAMAGED}


def test_headers_that_ask_for_much_memory_or_never_end_are_damage(tmp_path):
    write_tar(tmp_path / "long.tar", [("n" * 2**21 + ".png", b"x")], format=tarfile.GNU_FORMAT)
    # A size of -512 leads back to the same header.
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (2**96 - 512).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "round.tar").write_bytes(bytes(header) + bytes(1024))
    assert found_in(tmp_path) == (
        {},
        {"long.tar": containers.DAMAGED, "round.tar": containers.DAMAGED},
    )


def test_parquet_files_without_images_are_named_once(tmp_path):
    contents = [picture(k)[1] for k in range(3)]
    write_structs(tmp_path / "cut.parquet", contents, [None] * 3)
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    pq.write_table(pa.table({"score": [1.0]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"a": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    images, reasons = found_in(tmp_path)
    assert not images
    assert reasons == {
        "cut.parquet": containers.DAMAGED,
        "numbers.parquet": "it has no column of bytes, and so no images",
        "two.parquet": "it has several columns of bytes (a, b); call that of the images image",
        "empty.parquet": "it holds no image",
    }


def test_rows_without_an_image_get_a_reason(tmp_path):
    pixels, content = picture(0)
    table = pa.table({"image": [content, None, b"text", content], "other": [b"x"] * 4})
    pq.write_table(table, tmp_path / "x.parquet")
    images, reasons = found_in(tmp_path)
    assert list(images) == ["x.parquet/0", "x.parquet/3"]
    np.testing.assert_array_equal(images["x.parquet/3"], pixels)
    assert reasons == {
        "x.parquet/1": "it is empty",
        "x.parquet/2": "it is a text file, not an image",
    }


def test_a_damaged_row_group_loses_its_own_rows_alone(tmp_path):
    contents = [picture(k)[1] for k in range(6)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": contents}), path, row_group_size=2)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    first = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(bytes(content))
    images, reasons = found_in(tmp_path)
    assert list(images) == [f"x.parquet/{k}" for k in (0, 1, 4, 5)]
    assert reasons == {f"x.parquet/{k}": containers.DAMAGED_THERE for k in (2, 3)}


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_a_container_that_changes_while_it_is_ranked_gives_no_wrong_image(tmp_path, name):
    path = tmp_path / name

    def write(seeds):
        contents = [picture(seed)[1] for seed in seeds]
        if path.suffix == ".tar":
            write_tar(path, [(f"{k}.png", content) for k, content in enumerate(contents)])
        else:
            pq.write_table(pa.table({"image": contents}), path)

    write([0, 1])
    listed = list(walk_members(tmp_path))
    write(range(2, 200))
    answers = list(decode_members(tmp_path, listed, SHAPE, "crop", "white"))
    assert [answer.reason for answer in answers] == [containers.CHANGED] * 2
    path.unlink()
    for answer in decode_members(tmp_path, listed, SHAPE, "crop", "white"):
        assert answer.reason.startswith("it cannot be read")


def test_a_folder_with_the_name_of_a_container_is_a_folder(tmp_path):
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "0.png").write_bytes(picture(0)[1])
    (listed,) = walk_members(tmp_path)
    assert isinstance(listed, Member)
    assert (listed.path, listed.label) == ("x.tar/0.png", "")


MEASURED = """
import sys, tracemalloc
import pyarrow as pa
from weighmatch.data.containers import decode_members, walk_members
tracemalloc.start()
listed = sorted(walk_members(sys.argv[1]), key=lambda member: member.first)
found = list(decode_members(sys.argv[1], listed[-3:], (1, 8, 8), "crop", "white"))
assert [image.shape for image in found] == [(1, 8, 8)] * 3
print(pa.default_memory_pool().max_memory() + tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_a_large_container_needs_little_memory(tmp_path, name):
    """Of 160 MB in one archive, or in one row group, the last images are read."""
    random = np.random.default_rng(0).bytes
    contents = [picture(0)[1] + random(20_000) for _ in range(8_000)]
    if name == "x.tar":
        write_tar(tmp_path / name, [(f"{k}.png", content) for k, content in enumerate(contents)])
    else:
        write_structs(tmp_path / name, contents, [f"{k}.png" for k in range(8_000)])
    assert (tmp_path / name).stat().st_size > 160e6
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120e6
