"""Images in tar archives and Parquet files: listed, read from their places, and ranked."""

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

from tests.containers import SHAPE, found_in, picture, write_structs, write_tar
from tests.ranked import train_run
from weighmatch import shards
from weighmatch.data import files, members, parquet_files
from weighmatch.data.containers import base_of, decode_members, walk_members
from weighmatch.data.members import Member
from weighmatch.data.rank_config import Preparation, RankConfig
from weighmatch.shards import Shards, score_shard
from weighmatch.streaming import rank_folder

run = pytest.fixture(train_run)


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
    write_tar(mixed / "far" / "a.tar", [(f"in/{k:02d}.png", contents[k]) for k in range(10, 20)])
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
    second = second.replace(str(mixed), str(plain))
    for path, name in sorted(names.items(), key=lambda pair: -len(pair[0])):
        second = second.replace(path, name)
    assert second == first
    assert pd.read_csv(tmp_path / "b" / "rejected_files.csv").empty


def test_what_is_listed_can_be_read_in_parts(piles, monkeypatch):
    plain, mixed, names = piles
    monkeypatch.setattr(parquet_files, "BYTES_AT_ONCE", 200)  # some rows at a time
    monkeypatch.setattr(parquet_files, "ROWS_AT_ONCE", 3)
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


def test_compressed_archives_are_named_without_being_read(tmp_path, monkeypatch):
    content = picture(0)[1]
    for name, mode in (("a.tar", "w:gz"), ("b.tar.gz", "w:gz"), ("c.tgz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.addfile(tarfile.TarInfo("a.png"))
    for name, start in (
        ("d.zip", b"PK\3\4"),
        ("e.tar", b"\x28\xb5\x2f\xfd"),
        ("f.7z", b"7z\xbc\xaf\x27\x1c"),
    ):
        (tmp_path / name).write_bytes(start + bytes(5000))
    (tmp_path / "good.png").write_bytes(content)
    monkeypatch.setattr(files, "MAX_BYTES", 4000)  # else it would be said that they are large
    images, reasons = found_in(tmp_path)
    assert list(images) == ["good.png"]
    assert set(reasons.values()) == {"it is a compressed archive, which is not read; unpack it"}
    assert len(reasons) == 6


def test_a_root_may_begin_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "x.tar", [("a.png", picture(0)[1])])
    RankConfig(images="~/more").require_folder()
    assert base_of("~/more/x.tar") == tmp_path / "more"
    assert [one.path for one in walk_members("~/more")] == ["x.tar/a.png"]
    assert [one.path for one in walk_members("~/more/x.tar")] == ["x.tar/a.png"]


def test_one_container_can_be_the_root(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", picture(0)[1])])
    (tmp_path / "other.png").touch()
    (listed,) = walk_members(tmp_path / "x.tar")
    assert listed.path == "x.tar/a.png"
    (image,) = decode_members(base_of(tmp_path / "x.tar"), [listed], SHAPE, "crop", "white")
    np.testing.assert_array_equal(image[0], picture(0)[0])


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
    size = path.stat().st_size
    for seeds in ([1, 0], range(2, 200)):
        write(seeds)
        assert (path.stat().st_size == size) == (len(seeds) == 2)
        answers = list(decode_members(tmp_path, listed, SHAPE, "crop", "white"))
        assert [answer.reason for answer in answers] == [members.CHANGED] * 2
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
