"""Rendered characters in clutter: any number of images, with headroom for semi-supervised learning.

A character of one of matplotlib's fonts, turned, sheared, scaled and moved, on a background with a
gradient, behind pieces of other characters and under noise. The fonts are split between training,
validation and test, so that a test image shows a font that nothing was trained on.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from weighmatch.checks import require_choice, require_integer, require_number
from weighmatch.data.sources import Images

if TYPE_CHECKING:
    from PIL.Image import Image

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

FontSplit = Literal["train", "validation", "test"]
# Those of matplotlib's fonts that have all characters; every family is in every part.
FONTS: dict[FontSplit, tuple[str, ...]] = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-BoldOblique",
        "DejaVuSansMono-BoldOblique",
        "DejaVuSansMono-Oblique",
        "DejaVuSerif",
        "DejaVuSerif-BoldItalic",
        "STIXGeneral",
        "STIXGeneralBolIta",
        "cmb10",
        "cmmi10",
        "cmss10",
        "cmtt10",
    ),
    "validation": ("DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralBol", "cmti10"),
    "test": (
        "DejaVuSans-Oblique",
        "DejaVuSansMono",
        "DejaVuSerif-Bold",
        "STIXGeneralItalic",
        "cmr10",
    ),
}
# What tells the slanted fonts, those of the shifted domain where fonts are what shifts.
SLANTED_PARTS = ("Obl", "Ita", "cmmi", "cmti")

Shift = Literal["none", "inverted", "background", "fonts"]
SHIFTS: tuple[Shift, ...] = ("none", "inverted", "background", "fonts")

# Glyphs are drawn once at this height of a capital, on a square of this side, and cut from there.
CAPITAL, SHEET = 64, 128
# Images that are drawn together: what a million of them would take while being made is too much.
AT_ONCE = 2**16
# Pixels drawn for one that is kept, along a side.
OVERSAMPLING = 3


@dataclass(frozen=True)
class GlyphConfig:
    """What glyphs look like.

    Attributes:
        seen: characters that the classifier knows; a string of letters A–Z and digits.
        unseen: those of OOD images ("near" OOD); by default the letters that are not seen.
        size: side of the images in pixels.
        channels: 1 for grey, 3 for colour.
        clutter: pieces of other characters in an image.
        noise: standard deviation of the noise, grey levels.
        shift: what differs between the labelled images and the share `data.shifted` of the
            unlabelled and test images: "inverted" contrast, a photograph as "background", or
            slanted "fonts" (all others are upright).
    """

    seen: str = "ABCDEF"
    unseen: str = "GHIJKLMNOPQRSTUVWXYZ"
    size: int = 16
    channels: int = 1
    clutter: int = 2
    noise: float = 12.0
    shift: Shift = "none"

    def __post_init__(self) -> None:
        for name in ("seen", "unseen"):
            _require_characters(f"data.glyphs.{name}", getattr(self, name))
        if len(self.seen) < 2:
            raise ValueError(
                f"data.glyphs.seen must have two characters or more, got {self.seen!r}"
            )
        both = sorted(set(self.seen) & set(self.unseen))
        if both:
            raise ValueError(
                f"data.glyphs.unseen has {''.join(both)}, which data.glyphs.seen has too; "
                "take it out of one"
            )
        require_integer("data.glyphs.size", self.size, 8)
        if self.size > SHEET:
            raise ValueError(
                f"data.glyphs.size must be at most {SHEET}, the side that characters are drawn "
                f"at, got {self.size}; lower it"
            )
        require_integer("data.glyphs.channels", self.channels, 1)
        if self.channels not in (1, 3):
            raise ValueError(f"data.glyphs.channels must be 1 or 3, got {self.channels!r}")
        require_integer("data.glyphs.clutter", self.clutter, 0)
        require_number("data.glyphs.noise", self.noise, 0, 128)
        require_choice("data.glyphs.shift", self.shift, SHIFTS)


def _require_characters(name: str, value: object) -> None:
    known = isinstance(value, str) and value and all(c in CHARACTERS for c in value)
    if not known or len(set(str(value))) < len(str(value)):
        raise ValueError(
            f"{name} must be a string of different characters from {CHARACTERS}, got {value!r}"
        )


def render(
    characters: NDArray[np.int64],
    split: FontSplit,
    shifted: NDArray[np.bool_],
    config: GlyphConfig,
    photographs: Images,
    rng: np.random.Generator,
) -> Images:
    """Draw one image a character, `AT_ONCE` at a time.

    Args:
        characters: (n,) indices into `CHARACTERS`.
        split: whose fonts.
        shifted: (n,) which images are of the shifted domain; none where `config.shift` is "none".
        config: size, colour and clutter.
        photographs: (m, 3, H, W), for backgrounds.
        rng: draws everything else.

    Returns:
        (n, channels, size, size) uint8.
    """
    images = np.empty((len(characters), config.channels, config.size, config.size), np.uint8)
    for first in range(0, len(characters), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        images[part] = _render(characters[part], split, shifted[part], config, photographs, rng)
    return images


def _render(
    characters: NDArray[np.int64],
    split: FontSplit,
    shifted: NDArray[np.bool_],
    config: GlyphConfig,
    photographs: Images,
    rng: np.random.Generator,
) -> Images:
    n, size = len(characters), config.size
    glyphs = np.empty((n, size, size), np.float32)
    clutter = np.zeros((n, size, size), np.float32)
    names = FONTS[split]
    fonts = rng.integers(0, len(names), n)
    if config.shift == "fonts":
        slanted = np.array([any(part in name for part in SLANTED_PARTS) for name in names])
        groups = (np.flatnonzero(group) for group in (slanted, ~slanted))
        drawn = [group[rng.integers(0, len(group), n)] for group in groups]
        fonts = np.where(shifted, *drawn)
    pose = _poses(n, rng)
    for k in range(n):
        sheet = _sheet(names[fonts[k]], CHARACTERS[characters[k]])
        glyphs[k] = _cut(sheet, pose[k], size)
    for _ in range(config.clutter):
        pieces = rng.integers(0, len(CHARACTERS), n)
        fonts = rng.integers(0, len(names), n)
        pose = _poses(n, rng)
        # Centred outside of a circle around the middle, so that only a piece is in the image.
        angle = rng.uniform(0, 2 * np.pi, n)
        away = rng.uniform(0.5, 0.7, n)
        pose[:, 4], pose[:, 5] = away * np.cos(angle), away * np.sin(angle)
        strength = rng.uniform(0.5, 1.0, n)
        for k in range(n):
            piece = _cut(_sheet(names[fonts[k]], CHARACTERS[pieces[k]]), pose[k], size)
            clutter[k] = np.maximum(clutter[k], strength[k] * piece)
    return _compose(glyphs, clutter, shifted, config, photographs, rng)


def _compose(
    glyphs: NDArray[np.float32],
    clutter: NDArray[np.float32],
    shifted: NDArray[np.bool_],
    config: GlyphConfig,
    photographs: Images,
    rng: np.random.Generator,
) -> Images:
    """Ink over clutter over a background, with noise."""
    from weighmatch.data.sources import natural_patches

    n, size, channels = len(glyphs), config.size, config.channels
    shape = (n, channels, 1, 1)
    # A colour cast keeps the lightness, so that the character stays legible.
    cast = rng.uniform(-40, 40, shape) if channels == 3 else np.zeros(shape)
    ink = rng.uniform(150, 255, (n, 1, 1, 1)) + cast
    paper = rng.uniform(0, 70, (n, 1, 1, 1))
    middle = (size - 1) / 2
    rows, columns = np.mgrid[:size, :size] / middle - 1
    slope = rng.uniform(-30, 30, (2, n, 1, 1, 1))
    background = paper + slope[0] * rows + slope[1] * columns
    if config.shift == "background":
        cuts = natural_patches(photographs, n, size, channels, (0.0, 1.0), rng)
        background = np.where(shifted[:, None, None, None], 0.5 * cuts, background)
    piece = rng.uniform(90, 200, (n, 1, 1, 1))
    images = background + (piece - background) * clutter[:, None]
    images = images + (ink - images) * glyphs[:, None]
    images = images + rng.normal(0, 1, images.shape) * config.noise
    if config.shift == "inverted":
        images = np.where(shifted[:, None, None, None], 255 - images, images)
    rounded: Images = np.clip(np.round(images), 0, 255).astype(np.uint8)
    return rounded


def _poses(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Height of a capital (of the image's side), angle, shear, aspect, and place, (n, 6)."""
    low = [0.5, -0.25, -0.15, 0.85, -0.1, -0.1]
    high = [0.75, 0.25, 0.15, 1.15, 0.1, 0.1]
    return rng.uniform(low, high, (n, 6))


def _cut(sheet: "Image", pose: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """A glyph in that pose, (size, size) in [0, 1]."""
    from PIL import Image

    height, angle, shear, aspect, right, down = pose.tolist()
    side = size * OVERSAMPLING
    scale = CAPITAL / (height * side)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    # From pixels of the image, seen from where the glyph's centre goes, to pixels of the sheet.
    a, b = cos * aspect, (sin + shear * cos) * aspect
    d, e = -sin, cos - shear * sin
    x, y = (0.5 + right) * side, (0.5 + down) * side
    matrix = (a, b, SHEET / 2 - a * x - b * y, d, e, SHEET / 2 - d * x - e * y)
    drawn = sheet.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(drawn.reduce(OVERSAMPLING), np.float32) / np.float32(255)


@cache
def _sheet(font: str, character: str) -> "Image":
    """The character in white on black, its box in the middle."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    if not path.exists():
        raise FileNotFoundError(f"matplotlib has no font {path.name}; reinstall matplotlib")
    probe = ImageFont.truetype(str(path), 100)
    _, top, _, bottom = probe.getbbox("H")
    face = ImageFont.truetype(str(path), 100 * CAPITAL / (bottom - top))
    sheet = Image.new("L", (SHEET, SHEET))
    left, top, right, bottom = face.getbbox(character)
    place = ((SHEET - left - right) / 2, (SHEET - top - bottom) / 2)
    ImageDraw.Draw(sheet).text(place, character, font=face, fill=255)
    return sheet
