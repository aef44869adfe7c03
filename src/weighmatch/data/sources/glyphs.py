"""Rendered characters in clutter: any number of images, on which there is much to gain.

A character of one of matplotlib's fonts, turned, sheared, scaled and moved, on a background with a
gradient, behind pieces of other characters and under noise. The fonts are split between training,
validation and test, so that a test image shows a font that nothing was trained on.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from weighmatch.checks import require_choice, require_group, require_integer, require_number
from weighmatch.data.config import DataConfig
from weighmatch.data.contamination import Place, contaminate, load_photographs, natural_patches
from weighmatch.data.source import Source, register
from weighmatch.data.splits import Arrays, Flags, Images, Labels, Splits, Unlabelled, stream

if TYPE_CHECKING:
    from PIL.Image import Image

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

FontSplit = Literal["train", "validation", "test"]
# The fonts of matplotlib that have all characters; every family is in every part.
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
# A slanted font has one of these in its name; where fonts shift, they are the shifted domain.
SLANTED_PARTS = ("Obl", "Ita", "cmmi", "cmti")

Shift = Literal["none", "inverted", "background", "fonts"]
SHIFTS: tuple[Shift, ...] = ("none", "inverted", "background", "fonts")

# Each character is drawn once, on a square sheet of this side with capitals of this height, in
# pixels; images are cut from the sheets.
CAPITAL_HEIGHT, SHEET_SIDE = 64, 128
# How many images are drawn together: to draw a million at once would take too much memory.
IMAGES_AT_ONCE = 2**16
# How many pixels are drawn, along a side, for one that is kept.
OVERSAMPLING = 3


@dataclass(frozen=True)
class GlyphConfig:
    """What glyphs look like.

    Attributes:
        seen: the characters that the classifier knows; a string of letters A–Z and digits.
        unseen: the characters of OOD images ("near" OOD).
        size: the side of the images in pixels.
        channels: 1 for grey, 3 for colour.
        clutter: how many pieces of other characters an image has.
        noise: the standard deviation of the noise in grey levels.
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
        if self.size > SHEET_SIDE:
            raise ValueError(
                f"data.glyphs.size must be at most {SHEET_SIDE}, the side that characters are "
                f"drawn at, got {self.size}; lower it"
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


@dataclass(frozen=True)
class GlyphParameters:
    """The glyphs' own parameters.

    Attributes:
        glyphs: what glyphs look like.
    """

    glyphs: GlyphConfig = field(default_factory=GlyphConfig)

    def __post_init__(self) -> None:
        glyphs = require_group("data.glyphs", self.glyphs, GlyphConfig)
        object.__setattr__(self, "glyphs", glyphs)


@register
class Glyphs(Source[GlyphParameters]):
    """Some characters are seen classes, others are OOD; every image is rendered.

    Labelled images and the pool show training fonts, the held-out unlabelled images validation
    fonts, the test images test fonts. Test and labelled images are the same for every ratio and
    source of OOD; another number of labels draws other labelled images.
    """

    name = "glyphs"
    parameters = GlyphParameters
    has_domains = True

    def check(self, config: DataConfig) -> None:
        shift = self.own(config).glyphs.shift
        if (config.shifted > 0) != (shift != "none"):
            raise ValueError(
                f"data.shifted is {config.shifted}, but data.source is {config.source} and "
                f"data.glyphs.shift is {shift}; a share above 0 needs glyphs and a shift, and a "
                "shift needs a share"
            )

    def class_names(self, config: DataConfig) -> tuple[str, ...]:
        return tuple(self.own(config).glyphs.seen)

    def load(self, config: DataConfig) -> Arrays:
        return {"photographs": load_photographs()}

    def draw(self, raw: Arrays, config: DataConfig, seed: int) -> Splits:
        glyphs, photographs = self.own(config).glyphs, raw["photographs"]
        seen = np.array([CHARACTERS.index(c) for c in glyphs.seen])
        unseen = np.array([CHARACTERS.index(c) for c in glyphs.unseen])

        def draw(
            characters: Labels, fonts: FontSplit, share: float, purpose: str
        ) -> tuple[Images, Flags]:
            rng = stream(seed, purpose)
            shifted = rng.random(len(characters)) < share
            return render(characters, fonts, shifted, glyphs, photographs, rng), shifted

        def mix(members: int, total: int, fonts: FontSplit, place: Place) -> Unlabelled:
            classes = _balanced(members, len(seen))
            near = unseen[np.arange(config.ood_counts(total)["unseen"]) % len(unseen)]
            images, shifted = {}, {}
            for kind, characters, purpose in (
                ("id", seen[classes], f"members of the {place}"),
                ("unseen", near, f"unseen in the {place}"),
            ):
                images[kind], shifted[kind] = draw(characters, fonts, config.shifted, purpose)
            own = images.pop("id")
            return contaminate(own, classes, images, photographs, config, seed, place, shifted)

        n = config.labels_per_class
        by_class = [
            draw(np.full(n, c), "train", 0.0, f"labelled images of {CHARACTERS[c]}")[0]
            for c in seen
        ]
        test_labels = _balanced(config.test_size, len(seen))
        test_images, test_shifted = draw(seen[test_labels], "test", config.shifted, "test images")
        return Splits(
            labelled_images=np.concatenate(by_class),
            labels=np.repeat(np.arange(len(seen)), n),
            class_names=self.class_names(config),
            pool=mix(config.pool_id, config.pool_ood, "train", "pool"),
            heldout=mix(config.heldout_size, config.heldout_size, "validation", "held-out set"),
            test_images=test_images,
            test_labels=test_labels,
            test_shifted=test_shifted,
        )


def _balanced(total: int, classes: int) -> Labels:
    """As many labels of each class as of any other, up to one, in order."""
    return np.sort(np.arange(total) % classes)


def render(
    characters: Labels,
    split: FontSplit,
    shifted: Flags,
    config: GlyphConfig,
    photographs: Images,
    rng: np.random.Generator,
) -> Images:
    """Draw one image of each character, `IMAGES_AT_ONCE` at a time.

    Args:
        characters: (n,) indices into `CHARACTERS`.
        split: the part of the fonts to draw with.
        shifted: which images are of the shifted domain, (n,); none where `config.shift` is "none".
        config: what glyphs look like.
        photographs: photographs for backgrounds, (m, 3, H, W).
        rng: the stream that draws everything else.

    Returns:
        uint8 images, (n, channels, size, size).
    """
    images = np.empty((len(characters), config.channels, config.size, config.size), np.uint8)
    for first in range(0, len(characters), IMAGES_AT_ONCE):
        part = slice(first, first + IMAGES_AT_ONCE)
        images[part] = _render(characters[part], split, shifted[part], config, photographs, rng)
    return images


def _render(
    characters: Labels,
    split: FontSplit,
    shifted: Flags,
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
        # Its centre lies outside of a circle around the middle, so that the image has only a piece.
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
    shifted: Flags,
    config: GlyphConfig,
    photographs: Images,
    rng: np.random.Generator,
) -> Images:
    """Lay ink over clutter over a background, and add noise."""
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
    """Draw poses, (n, 6).

    A pose is the height of a capital as a share of the image's side, the angle, the shear, the
    aspect, and the place to the right and down.
    """
    low = [0.5, -0.25, -0.15, 0.85, -0.1, -0.1]
    high = [0.75, 0.25, 0.15, 1.15, 0.1, 0.1]
    return rng.uniform(low, high, (n, 6))


def _cut(sheet: "Image", pose: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """Cut a glyph in that pose from its sheet, (size, size) in [0, 1]."""
    from PIL import Image

    height, angle, shear, aspect, right, down = pose.tolist()
    side = size * OVERSAMPLING
    scale = CAPITAL_HEIGHT / (height * side)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    # From pixels of the image, seen from where the glyph's centre goes, to pixels of the sheet.
    a, b = cos * aspect, (sin + shear * cos) * aspect
    d, e = -sin, cos - shear * sin
    x, y = (0.5 + right) * side, (0.5 + down) * side
    matrix = (a, b, SHEET_SIDE / 2 - a * x - b * y, d, e, SHEET_SIDE / 2 - d * x - e * y)
    drawn = sheet.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(drawn.reduce(OVERSAMPLING), np.float32) / np.float32(255)


@cache
def _sheet(font: str, character: str) -> "Image":
    """Draw the character in white on black, its box in the middle of the sheet."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    if not path.exists():
        raise FileNotFoundError(f"matplotlib has no font {path.name}; reinstall matplotlib")
    probe = ImageFont.truetype(str(path), 100)
    _, top, _, bottom = probe.getbbox("H")
    face = ImageFont.truetype(str(path), 100 * CAPITAL_HEIGHT / (bottom - top))
    sheet = Image.new("L", (SHEET_SIDE, SHEET_SIDE))
    left, top, right, bottom = face.getbbox(character)
    place = ((SHEET_SIDE - left - right) / 2, (SHEET_SIDE - top - bottom) / 2)
    ImageDraw.Draw(sheet).text(place, character, font=face, fill=255)
    return sheet
