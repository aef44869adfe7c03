"""Reading image files: every kind that Pillow knows, as a person sees it, or a plain reason."""

import os
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.containers import write_structs, write_tar
from tests.data.folders import add_traps, make_folder, picture, state
from weighmatch.data import files
from weighmatch.data.decoding import decode_many
from weighmatch.data.files import (
    Decoded,
    Rejected,
    RejectedFileError,
    decode,
    list_images,
    look_at,
)

SHAPE = (3, 16, 16)


def reason_of(path):
    """Why a file is rejected; None if it is not."""
    try:
        decode(path, SHAPE)
    except RejectedFileError as error:
        return error.reason
    return None


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_common_formats_and_modes_look_the_same(tmp_path, ending, mode):
    if (mode, ending) in (("P", "jpg"), ("P", "webp"), ("1", "webp")):
        pytest.skip("there is no such file")
    levels = np.repeat(np.repeat([[0, 255], [255, 0]], 20, 0), 20, 1).astype(np.uint8)
    Image.fromarray(levels).convert(mode).save(tmp_path / f"image.{ending}")
    for channels in (1, 3):
        image = decode(tmp_path / f"image.{ending}", (channels, 16, 16))
        assert image.shape == (channels, 16, 16)
        assert image.dtype == np.uint8
        corners = image[:, [1, 1, -2, -2], [1, -2, 1, -2]].astype(int)
        np.testing.assert_allclose(corners, [[0, 255, 255, 0]] * channels, atol=12)


def test_levels_of_16_bits_are_scaled(tmp_path):
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for ending in ("png", "tiff"):
        Image.fromarray(levels.astype(np.uint16)).save(tmp_path / f"image.{ending}")
        image = decode(tmp_path / f"image.{ending}", (1, 64, 64))[0]
        np.testing.assert_allclose(image, levels / 257, atol=0.51)
    Image.fromarray((levels / 65535).astype(np.float32)).save(tmp_path / "real.tiff")
    image = decode(tmp_path / "real.tiff", (1, 64, 64))[0]
    np.testing.assert_allclose(image, levels / 257, atol=0.51)
    Image.fromarray(levels.astype(np.int32) - 9000).save(tmp_path / "signed.tiff")
    image = decode(tmp_path / "signed.tiff", (1, 64, 64))[0]
    assert (image.min(), image.max()) == (0, 255)
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(RejectedFileError, match="not finite"):
        decode(tmp_path / "nan.tiff", SHAPE)


def test_colours_of_16_bits_are_scaled(tmp_path):
    rows = b"".join(
        b"\0" + b"".join(struct.pack(">HHH", 65535, 128 * 257, 0) for _ in range(20))
        for _ in range(20)
    )

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    image = decode(tmp_path / "deep.png", SHAPE)
    np.testing.assert_array_equal(image[:, 8, 8], [255, 128, 0])


@pytest.mark.parametrize("ending", ["png", "webp", "tiff", "gif"])
def test_transparent_images_lie_on_the_background(tmp_path, ending):
    levels = np.zeros((32, 32, 4), np.uint8)
    levels[:, :16] = (200, 0, 0, 255)
    options = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(levels).save(tmp_path / f"image.{ending}", **options)
    for background, colour in (("white", (255, 255, 255)), ("#102030", (16, 32, 48))):
        image = decode(tmp_path / f"image.{ending}", SHAPE, background=background)
        np.testing.assert_array_equal(image[:, 8, 13], colour)
        np.testing.assert_allclose(image[:, 8, 3], (200, 0, 0), atol=2)


def test_transparent_palettes_and_greys_lie_on_the_background(tmp_path):
    halves = np.repeat([[0, 1]], 16, 0).repeat(16, 1).astype(np.uint8)
    palette = Image.fromarray(halves).convert("P")
    palette.putpalette([10, 10, 10, 90, 90, 90] + [0] * 762)
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.fromarray(np.stack([halves * 0 + 10, 255 * (1 - halves)], -1)).save(tmp_path / "la.png")
    for name in ("palette.png", "la.png"):
        image = decode(tmp_path / name, (1, 16, 16), background="white")[0]
        assert (image[8, 3], image[8, 13]) == (10, 255)


@pytest.mark.parametrize("ending", ["jpg", "tiff"])
def test_print_colours_are_those_of_the_screen(tmp_path, ending):
    image = Image.new("RGB", (40, 40), (220, 30, 60)).convert("CMYK")
    image.save(tmp_path / f"image.{ending}")
    np.testing.assert_allclose(
        decode(tmp_path / f"image.{ending}", SHAPE)[:, 8, 8], (220, 30, 60), atol=6
    )


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_images_stand_upright(tmp_path, ending):
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20] = 200
    upright[:20, :30] = 100
    # What a camera stores, whose EXIF data say how to turn it.
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, 3),
    }
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{ending}"
        Image.fromarray(np.ascontiguousarray(turn(upright))).save(path, exif=exif)
        image = decode(path, (1, 20, 30))[0]
        for row, column, level in ((4, 6, 100), (4, 24, 200), (15, 6, 0)):
            assert abs(int(image[row, column]) - level) < 12, orientation


def test_damaged_exif_data_do_not_cost_the_image(tmp_path):
    picture(np.random.default_rng(0)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0rubbish")
    assert decode(tmp_path / "a.jpg", SHAPE).std() > 10


def test_the_aspect_is_kept(tmp_path):
    levels = np.zeros((20, 60, 3), np.uint8)
    levels[:, 20:40] = 200
    Image.fromarray(levels).save(tmp_path / "wide.png")
    crop = decode(tmp_path / "wide.png", (3, 20, 20), "crop")
    np.testing.assert_array_equal(crop, 200)
    pad = decode(tmp_path / "wide.png", (3, 30, 30), "pad", "#0a0a0a")
    np.testing.assert_array_equal(pad[:, :10], 10)
    np.testing.assert_array_equal(pad[:, 20:], 10)
    np.testing.assert_allclose(pad[:, 15, [3, 15, 26]], [[0, 200, 0]] * 3, atol=3)
    Image.new("L", (4_000, 1), 77).save(tmp_path / "line.png")
    for fit in ("crop", "pad"):
        assert decode(tmp_path / "line.png", SHAPE, fit).shape == SHAPE


def test_of_several_frames_it_is_the_first(tmp_path):
    frames = [Image.new("RGB", (20, 20), (k, k, k)) for k in (10, 200)]
    for ending in ("gif", "webp", "tiff"):
        path = tmp_path / f"film.{ending}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert abs(int(decode(path, SHAPE)[0, 8, 8]) - 10) <= 2


@pytest.mark.integration
def test_a_large_photograph_is_no_bomb(tmp_path):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((7_000, 5_000)).save(tmp_path / "large.jpg", quality=90)
    assert decode(tmp_path / "large.jpg", SHAPE).shape == SHAPE
    Image.new("RGB", (5_000, 5_000)).save(tmp_path / "sky.png")
    assert decode(tmp_path / "sky.png", SHAPE).max() == 0
    for side in (9_000, 14_000):
        Image.new("L", (side, side)).save(tmp_path / "bomb.png")
        with pytest.raises(RejectedFileError, match="as decompression bombs do"):
            decode(tmp_path / "bomb.png", SHAPE)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_no_part_of_a_file_is_taken_for_the_whole(tmp_path, ending):
    picture(np.random.default_rng(0)).save(tmp_path / f"whole.{ending}")
    content = (tmp_path / f"whole.{ending}").read_bytes()
    for share in (0.02, 0.1, 0.3, 0.6, 0.9, 0.97):
        (tmp_path / "part").write_bytes(content[: int(share * len(content))])
        with pytest.raises(RejectedFileError, match=r"it is (truncated|damaged|not an image)"):
            decode(tmp_path / "part", SHAPE)


def test_rubbish_never_raises_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    picture(rng).save(tmp_path / "a.png")
    starts = [
        b"",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"RIFF....WEBPVP8 ",
        b"P6 9 9 9",
    ]
    whole = (tmp_path / "a.png").read_bytes()
    for trial in range(120):
        start = starts[trial % len(starts)]
        content = start + rng.bytes(int(rng.integers(1, 400)))
        if trial % 3 == 0:
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 5):
                damaged[place] ^= int(rng.integers(1, 256))
            content = bytes(damaged)
        (tmp_path / "rubbish").write_bytes(content)
        reason = reason_of(tmp_path / "rubbish")
        assert reason is None or reason.startswith("it ")


def test_a_program_is_not_run(tmp_path):
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(RejectedFileError, match="it is a text file"):
        decode(tmp_path / "a.eps", SHAPE)


def test_a_compressed_archive_is_told_by_its_first_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    for start in files.PACKED:
        (tmp_path / "a.tar.gz").write_bytes(start + bytes(20))
        with pytest.raises(RejectedFileError, match=r"a compressed archive, .*; unpack it"):
            decode(tmp_path / "a.tar.gz", SHAPE)


def test_a_container_of_images_is_told_by_how_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 400)  # else it would be said that they are large
    write_tar(tmp_path / "a.tar", [("a.png", b"x")])
    write_structs(tmp_path / "a.parquet", [b"x"], ["a.png"])
    for name, message in (
        ("a.tar", "it is a tar archive, which training does not read; unpack it"),
        ("a.parquet", "it is a Parquet table, which training does not read; write its images to"),
    ):
        with pytest.raises(RejectedFileError, match=message):
            decode(tmp_path / name, SHAPE)


def test_files_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(RejectedFileError, match=r"it cannot be read \(No such file"):
        decode(tmp_path / "gone.png", SHAPE)
    picture(np.random.default_rng(0)).save(tmp_path / "a.png")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(RejectedFileError, match=r"it cannot be read \(Permission denied\)"):
        decode(tmp_path / "a.png", SHAPE)


# --- listing ---------------------------------------------------------------------------------


def test_a_folder_is_listed_at_any_depth_without_opening_a_file(tmp_path):
    root = make_folder(tmp_path / "own")
    add_traps(root, tmp_path / "outside.png")
    before = state(root)
    listing = list_images(root)
    assert listing.paths == tuple(sorted(listing.paths))
    assert "unlabelled/deep/er/01.png" in listing.paths
    reasons = {one.path: one.reason for one in listing.rejected}
    assert reasons["unlabelled/outside.png"] == "a symbolic link that leads out of the folder"
    assert reasons["unlabelled/loop"] == "a symbolic link to a folder that holds it"
    assert "unlabelled/pipe" in reasons
    assert not set(reasons) & set(listing.paths)
    assert state(root) == before


def test_links_within_the_folder_are_followed(tmp_path):
    root = make_folder(tmp_path / "own", pool=3)
    (root / "all").mkdir()
    picture(np.random.default_rng(5)).save(root / "all" / "a.png")
    os.symlink("../all", root / "unlabelled" / "linked")
    assert "unlabelled/linked/a.png" in list_images(root).paths
    only = list_images(root, ["unlabelled"])
    assert "unlabelled/linked/a.png" in only.paths
    assert not any(path.startswith("labelled") for path in only.paths)
    os.symlink(root, tmp_path / "way")
    assert list_images(tmp_path / "way").paths == list_images(root).paths


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give the folder"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder; give the folder"):
        list_images(tmp_path / "file")


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_names_that_are_no_text_are_told(tmp_path):
    make_folder(tmp_path / "own", pool=1)
    (tmp_path / "own" / "unlabelled" / "gro\udcdfes.png").touch()
    (rejected,) = list_images(tmp_path / "own").rejected
    reason = "its name is not valid UTF-8; rename it"
    assert rejected == Rejected("unlabelled/gro\\udcdfes.png", reason)


def test_what_is_found_decides_on_size_and_colour(tmp_path):
    make_folder(tmp_path / "photos", pool=4)
    look = look_at(list_images(tmp_path / "photos"))
    assert (look.side, look.channels) == (32, 3)
    (tmp_path / "digits").mkdir()
    for k in range(4):
        Image.new("L", (18, 26), k).save(tmp_path / "digits" / f"{k}.png")
    look = look_at(list_images(tmp_path / "digits"))
    assert (look.side, look.channels) == (20, 1)
    (tmp_path / "none").mkdir()
    assert look_at(list_images(tmp_path / "none")).side == 32


# --- many files ------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("many", [1, 10_000])
def test_many_files_are_read_by_several_processes_as_by_one(tmp_path, monkeypatch, many, capsys):
    root = make_folder(tmp_path / "own", pool=70)
    add_traps(root, tmp_path / "outside.png")
    monkeypatch.setattr("weighmatch.data.decoding.MANY_FILES", many)
    paths = [root / path for path in list_images(root).paths]
    found = dict(decode_many(paths, SHAPE, workers=2, title="looking"))
    assert sorted(found) == list(range(len(paths)))
    assert "looking: 100" in capsys.readouterr().err
    for position, path in enumerate(paths):
        reason = reason_of(path)
        if reason is None:
            assert isinstance(found[position], Decoded)
            np.testing.assert_array_equal(found[position].image, decode(path, SHAPE))
        else:
            assert found[position] == Rejected(str(path), reason)
