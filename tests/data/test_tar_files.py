"""Images in tar archives."""

import io
import tarfile

import numpy as np

from tests.containers import SHAPE, found_in, picture, write_tar
from weighmatch.data import listing, members
from weighmatch.data.containers import decode_members


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
        assert reasons == {"x.tar": members.DAMAGED}


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
        {"long.tar": members.DAMAGED, "round.tar": members.DAMAGED},
    )


def test_archives_that_follow_one_another_are_all_read(tmp_path):
    """As `cat a.tar b.tar > c.tar` makes them."""
    parts = []
    for name in "ab":
        write_tar(tmp_path / name, [(f"{name}.png", picture(ord(name))[1])])
        parts.append((tmp_path / name).read_bytes())
        (tmp_path / name).unlink()
    (tmp_path / "c.tar").write_bytes(b"".join(parts) + bytes(2**17))
    (tmp_path / "d.tar").write_bytes(b"".join(parts) + b"no archive" * 100)
    images, reasons = found_in(tmp_path)
    assert list(images) == [f"{file}.tar/{name}.png" for file in "cd" for name in "ab"]
    np.testing.assert_array_equal(images["c.tar/b.png"], picture(ord("b"))[0])
    assert reasons == {"d.tar": members.DAMAGED}


def test_of_equal_names_in_an_archive_the_last_counts(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    names = ["a.png", "b.png", "a.png", "a.png"]
    write_tar(root / "x.tar", [(name, picture(k)[1]) for k, name in enumerate(names)])
    listing.write_list(tmp_path / "list", root, 10)
    found = listing.PileList(tmp_path / "list")
    listed = [member for k in range(len(found)) for member in found.members(found.part(k))]
    assert [member.path for member in listed] == ["x.tar/b.png", "x.tar/a.png"]
    _, last = decode_members(root, listed, SHAPE, "crop", "white")
    np.testing.assert_array_equal(last[0], picture(3)[0])
    assert list(found.rejected()) == [("x.tar/a.png", listing.SAME_NAME)] * 2
