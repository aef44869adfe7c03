"""A folder such as somebody has: two alphabets, patches of photographs, copies and bad files."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from weighmatch.data.contamination import load_photographs, natural_patches
from weighmatch.data.sources.glyphs import CHARACTERS, GlyphConfig, render

LETTERS, DIGITS = "EKMX", "0123456789"
SIDE = 16
ORIENTATIONS = {3: 180, 6: 90, 8: 270}  # EXIF tag: degrees by which the stored image was turned


@dataclass
class OwnFolder:
    """What was put into the folder.

    Attributes:
        root: the folder.
        useful: paths of pool images of the seen classes.
        foreign: paths of the other pool images.
        bad: paths of files that cannot be used.
        copies: paths of pool files that are copies, with their original.
    """

    root: Path
    useful: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)


class Maker:
    """Draws images and writes files, all from one seed."""

    def __init__(self, root, seed=0):
        self.rng = np.random.default_rng(seed)
        self.made = OwnFolder(Path(root))
        self.photographs = load_photographs()

    def glyphs(self, characters):
        codes = np.array([CHARACTERS.index(c) for c in characters])
        config = GlyphConfig(seen="AB", unseen="CD", size=SIDE, clutter=0, noise=8.0)
        unshifted = np.zeros(len(codes), bool)
        return render(codes, "train", unshifted, config, self.photographs, self.rng)[:, 0]

    def patches(self, count):
        cut = natural_patches(self.photographs, count, SIDE, 1, (0.0, 1.0), self.rng)
        return cut[:, 0]

    def write(self, path, pixels, **options):
        place = self.made.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place, **options)

    def bad(self, path, content):
        place = self.made.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        self.made.bad.append(path)


def make_folder(root, useful=300, foreign=300, labels=5, test=0, seed=0):
    """Write the folder; the same seed gives the same one."""
    maker = Maker(root, seed)
    made = maker.made
    for letter in LETTERS:
        for k, pixels in enumerate(maker.glyphs(letter * labels)):
            maker.write(f"labelled/{letter}/{k}.png", pixels)
        for k, pixels in enumerate(maker.glyphs(letter * (test // len(LETTERS)))):
            maker.write(f"test/{letter}/{k}.png", pixels)
    drawn = [LETTERS[k % len(LETTERS)] for k in range(useful)]
    digits = [DIGITS[k % 10] for k in range(foreign // 2)]
    images = [
        *((pixels, made.useful) for pixels in maker.glyphs(drawn)),
        *((pixels, made.foreign) for pixels in maker.glyphs(digits)),
        *((pixels, made.foreign) for pixels in maker.patches(foreign - len(digits))),
    ]
    for number, k in enumerate(maker.rng.permutation(len(images)).tolist()):
        pixels, paths = images[k]
        path = f"unlabelled/{number % 7}/{'deep/' * (number % 3)}{number:05d}"
        path += (".png", ".bmp", ".jpg")[number % 3]
        paths.append(path)
        options = {"quality": 95} if path.endswith(".jpg") else {}
        if number % 9 == 2:  # a camera that was held upright
            orientation = list(ORIENTATIONS)[number % 3]
            exif = Image.Exif()
            exif[0x0112] = orientation
            pixels = np.rot90(pixels, ORIENTATIONS[orientation] // 90)
            options["exif"] = exif
        maker.write(path, np.ascontiguousarray(pixels), **options)
    _add_bad_files(maker)
    _add_copies(made)
    return made


def _add_bad_files(maker):
    root = maker.made.root
    whole = (root / next(p for p in maker.made.useful if p.endswith(".jpg"))).read_bytes()
    maker.bad("unlabelled/bad/truncated.jpg", whole[: len(whole) // 2])
    maker.bad("unlabelled/bad/empty.png", b"")
    maker.bad("unlabelled/bad/text.jpg", b"this is no image\n" * 20)
    maker.bad("unlabelled/bad/random.png", maker.rng.bytes(500))
    maker.bad("unlabelled/.DS_Store", b"\0\0\0\1Bud1")
    maker.bad("unlabelled/0/Thumbs.db", b"\xd0\xcf\x11\xe0")
    maker.bad(f"labelled/{LETTERS[0]}/notes.txt", b"to do: label more\n")
    outside = root.parent / f"{root.name}-outside.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(outside)
    (root / "unlabelled" / "link.png").symlink_to(outside)
    maker.made.bad.append("unlabelled/link.png")
    (root / "labelled" / "empty class").mkdir()
    maker.made.bad.append("labelled/empty class")


def _add_copies(made):
    for k, original in enumerate(made.useful[:5]):
        path = f"unlabelled/copies/{k}{Path(original).suffix}"
        place = made.root / path
        place.parent.mkdir(exist_ok=True)
        shutil.copy(made.root / original, place)
        made.copies[path] = original
    shutil.copy(
        made.root / f"labelled/{LETTERS[0]}/0.png", made.root / "unlabelled/copies/labelled.png"
    )
    made.copies["unlabelled/copies/labelled.png"] = f"labelled/{LETTERS[0]}/0.png"
