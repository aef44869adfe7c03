"""Folders of small generated files, with every trap that real folders hold."""

import hashlib
import os
import shutil

import numpy as np
from PIL import Image

# Names of files that cannot be used, relative to the root, with a word of the reason.
BAD = {
    "labelled/.DS_Store": "operating system",
    "labelled/cat/Thumbs.db": "operating system",
    "labelled/stray.png": "no folder of a class",
    "labelled/dog/notes.txt": "text file",
    "unlabelled/.DS_Store": "operating system",
    "unlabelled/empty.jpg": "empty",
    "unlabelled/text.jpg": "text file",
    "unlabelled/rubbish.png": "not an image",
    "unlabelled/deep/er/truncated.jpg": "truncated",
    "unlabelled/truncated.png": "truncated",
    "unlabelled/broken.png": "damaged",
    "unlabelled/bomb.png": "decompression bomb",
    "unlabelled/phone.heic": "HEIC",
    "unlabelled/outside.png": "leads out of the folder",
    "unlabelled/nowhere.png": "leads nowhere",
    "unlabelled/loop": "folder that holds it",
    "unlabelled/pipe": "not a regular file",
    "README.md": "beside labelled",
    "labelled/aardvark": "no image that can be used",
    "labelled/yak": "one image",
}


def picture(rng, size=(50, 40)):
    """A smooth random image in colour, which no other is alike."""
    coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def make_folder(root, classes=("cat", "dog", "größer"), labels=5, pool=20, seed=0):
    """Labelled images of classes and a pool, all of them good."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / "labelled" / name / "deep").mkdir(parents=True)
        for k in range(labels):
            place = root / "labelled" / name / ("deep" if k % 2 else ".")
            picture(rng).save(place / f"{k}.jpg", quality=95)
    (root / "unlabelled" / "deep" / "er").mkdir(parents=True)
    for k in range(pool):
        place = root / "unlabelled" / ("deep/er" if k % 3 else ".")
        picture(rng).save(place / f"{k:02d}.png")
    return root


def add_traps(root, outside):
    """Files of every bad kind, named in `BAD`; `outside` is a file that is not in the folder."""
    pool = root / "unlabelled"
    rng = np.random.default_rng(1)
    picture(rng).save(outside)
    for place in (root / "labelled", pool):
        (place / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (root / "labelled" / "cat" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (root / "labelled" / "dog" / "notes.txt").write_text("blurred ones are of Größe")
    picture(rng).save(root / "labelled" / "stray.png")
    (root / "labelled" / "aardvark").mkdir()
    (root / "labelled" / "yak").mkdir()
    picture(rng).save(root / "labelled" / "yak" / "only.png")
    (root / "README.md").write_text("# My photographs")
    (pool / "empty.jpg").touch()
    (pool / "text.jpg").write_text("this is no image\n" * 200)
    (pool / "rubbish.png").write_bytes(rng.bytes(500))
    picture(rng).save(pool / "whole.jpg")
    (pool / "deep" / "er" / "truncated.jpg").write_bytes((pool / "whole.jpg").read_bytes()[:600])
    content = (pool / "00.png").read_bytes()
    (pool / "truncated.png").write_bytes(content[: len(content) // 2])
    middle = len(content) // 2
    (pool / "broken.png").write_bytes(content[:middle] + rng.bytes(60) + content[middle + 60 :])
    Image.new("L", (9_000, 9_000)).save(pool / "bomb.png")
    (pool / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    os.symlink(outside, pool / "outside.png")
    os.symlink("gone.png", pool / "nowhere.png")
    os.symlink("..", pool / "loop")
    os.mkfifo(pool / "pipe")
    (pool / "whole.jpg").unlink()


def add_copies(root):
    """Copies in the pool: two exact and two near ones, and one of a labelled image."""
    pool = root / "unlabelled"
    shutil.copy(pool / "00.png", pool / "x_copy.png")
    os.symlink("00.png", pool / "x_link.png")
    with Image.open(pool / "00.png") as image:
        image.convert("RGB").save(pool / "x_near.jpg", quality=85)
        image.resize((100, 80)).save(pool / "x_near_large.png")
    shutil.copy(root / "labelled" / "cat" / "0.jpg", pool / "x_cat.jpg")


def state(root):
    """A hash of everything in a folder: names, contents, times and rights."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        found = path.lstat()
        digest.update(f"{path} {found.st_mode} {found.st_mtime_ns} {found.st_size}".encode())
        if path.is_file() and not path.is_symlink():
            digest.update(path.read_bytes())
    return digest.hexdigest()
