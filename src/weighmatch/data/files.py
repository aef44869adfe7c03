"""Image files of any folder: which there are, what is in them, and which cannot be used and why.

Nothing is ever written below the folder. A file that cannot be used gets a plain reason.
"""

import hashlib
import math
import os
import stat
import warnings
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from weighmatch.checks import ToldError
from weighmatch.data.splits import Images

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["crop", "pad"]
FITS: tuple[Fit, ...] = ("crop", "pad")
Shape = tuple[int, int, int]
# What Pillow may try to read a file as. Formats that run other programs (EPS) are not among them.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
# Files that operating systems leave in folders.
LEFT_BEHIND = {".ds_store", "thumbs.db", "desktop.ini"}
# An image of more pixels is refused, as Pillow refuses it.
MAX_PIXELS = 178_956_970
# So is one of more pixels than this that is packed more than 200 times: photographs are packed at
# most some 50 times, decompression bombs about 1,000 times.
BOMB_PIXELS, BOMB_RATIO = 2**25, 200
MAX_BYTES = 2**30
UNREAD = "it cannot be read"
TOO_LARGE = f"it is larger than {MAX_BYTES >> 20} MiB"
# The side of decoded images where nothing is asked for and the files are larger; and the files
# that are looked at to find out.
SIDE, LOOKED_AT = 32, 64
# How compressed archives begin: those of gzip, bzip2, xz, zstd, zip and 7z.
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\3\4", b"7z\xbc\xaf\x27\x1c")
# Where and how containers of images begin, and what is said of them where files are read alone.
UNOPENED = (
    (257, b"ustar", "it is a tar archive, which training does not read; unpack it"),
    (0, b"PAR1", "it is a Parquet table, which training does not read; write its images to files"),
)
GREY_MODES = ("1", "L", "LA", "La", "F", "I", "I;16", "I;16B", "I;16L")


class UnfitFolderError(ToldError, ValueError):
    """A folder does not exist or cannot be used; the message names it."""


class RejectedFileError(ValueError):
    """A file that cannot be used as an image; `reason` is a plain clause that says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Rejected:
    """A file that is left out.

    Attributes:
        path: its place in the folder, relative to the root, with "/" between names.
        reason: why, in plain words.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Attributes:
        root: the folder, an absolute path without symbolic links.
        paths: the files that may be images, relative to `root`, with "/" between names, sorted.
        rejected: what is no image without a look inside, sorted by path.
    """

    root: Path
    paths: tuple[str, ...]
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True)
class Decoded:
    """What a file holds.

    Attributes:
        image: uint8, (C, H, W).
        content: 32 hexadecimal digits of the BLAKE2 hash of the file's bytes.
        perceptual: the perceptual hash (pHash) of the whole image, 64 bits.
        size: width and height of the upright image in the file, in pixels.
    """

    image: Images
    content: str
    perceptual: int
    size: tuple[int, int]


# --- which files there are -------------------------------------------------------------------


def list_images(root: str | Path, folders: Collection[str] | None = None) -> Listing:
    """List the files below a folder at any depth, without opening one.

    Symbolic links are followed where they lead to something within the folder.

    Args:
        root: the folder.
        folders: of the folders right below the root, those to look into; None: all.

    Raises:
        UnfitFolderError: if the folder does not exist or cannot be listed; it says which.
    """
    found = list(walk_images(root, folders))
    paths = sorted(path for path in found if isinstance(path, str))
    rejected = sorted((r for r in found if isinstance(r, Rejected)), key=lambda r: r.path)
    return Listing(Path(root).resolve(), tuple(paths), tuple(rejected))


def require_folder(root: str | Path) -> None:
    """Raise an UnfitFolderError unless there is such a folder."""
    if not Path(root).is_dir():
        what = "is not a folder" if Path(root).exists() else "does not exist"
        raise UnfitFolderError(f"the folder {root} {what}; give the folder that holds the images")


def walk_images(
    root: str | Path, folders: Collection[str] | None = None
) -> Iterator[str | Rejected]:
    """What `list_images` lists, in any order, one by one: of a million files none is kept.

    Yields:
        The path of a file that may be an image, or what is none and why.
    """
    require_folder(root)
    top = Path(root).resolve()
    yield from _walk(top, top, "", (top,), folders)


def _walk(
    top: Path,
    folder: Path,
    prefix: str,
    above: tuple[Path, ...],
    folders: Collection[str] | None,
) -> Iterator[str | Rejected]:
    try:
        entries = os.scandir(folder)
    except OSError as error:
        if folder == top:
            raise UnfitFolderError(
                f"the folder {folder} cannot be listed ({error.strerror}); give yourself the right "
                "to read it"
            ) from error
        yield Rejected(prefix.rstrip("/"), cannot_be_read(error))
        return
    for entry in entries:
        name = prefix + entry.name
        shown = name.encode("utf-8", "backslashreplace").decode()
        if shown != name:
            yield Rejected(shown, "its name is not valid UTF-8; rename it")
            continue
        try:
            place = Path(entry.path)
            if entry.is_symlink():
                place = place.resolve(strict=True)
                if not place.is_relative_to(top):
                    yield Rejected(name, "a symbolic link that leads out of the folder")
                    continue
                if place in above:
                    yield Rejected(name, "a symbolic link to a folder that holds it")
                    continue
            mode = place.stat().st_mode
        except (OSError, RuntimeError) as error:
            lost = entry.is_symlink() and not isinstance(error, PermissionError)
            reason = "a symbolic link that leads nowhere" if lost else cannot_be_read(error)
            yield Rejected(name, reason)
            continue
        if stat.S_ISDIR(mode):
            if folders is not None and name not in folders:
                known = ", ".join(sorted(folders))
                yield Rejected(name, f"a folder beside {known}, which is not looked into")
            else:
                yield from _walk(top, place, f"{name}/", (*above, place), None)
        elif not stat.S_ISREG(mode):
            yield Rejected(name, "not a regular file")
        elif entry.name.lower() in LEFT_BEHIND:
            yield Rejected(name, "a file of the operating system, not an image")
        else:
            yield name


# --- what is in one file ---------------------------------------------------------------------


def decode(
    source: str | Path | bytes, shape: Shape, fit: Fit = "crop", background: str = "white"
) -> Images:
    """Read an image file.

    Args:
        source: the path of the file, or its content.
        shape: channels (1 or 3), height and width of what is returned.
        fit: "crop" resizes until the image just covers the shape and cuts out the centre; "pad"
            resizes until it just fits into it, and fills the rest with the background. The aspect
            is kept.
        background: what shows through where the image is transparent, and what pads: a name such
            as "white", or "#rrggbb".

    Returns:
        uint8 grey levels, (C, H, W). Levels of 16 bits are divided by 257. The image stands
        upright, as its EXIF orientation says; of several frames it is the first.

    Raises:
        RejectedFileError: if the file cannot be used.
    """
    return read_file(source, shape, fit, background).image


def read_file(
    source: str | Path | bytes, shape: Shape, fit: Fit = "crop", background: str = "white"
) -> Decoded:
    """`decode`, with the hashes that duplicates are found by."""
    content = source if isinstance(source, bytes) else _read_bytes(Path(source))
    if len(content) > MAX_BYTES:
        raise RejectedFileError(TOO_LARGE)
    if not content:
        raise RejectedFileError("it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged EXIF block, a bomb: both are dealt with
            whole = _upright(content, shape, background)
            fitted = _fit(whole, shape, fit, background)
            perceptual = _perceptual_hash(whole)
    except RejectedFileError:
        raise
    except MemoryError as error:
        raise RejectedFileError("it is too large for the memory") from error
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise RejectedFileError(_why(content, error)) from error
    pixels = np.asarray(fitted, np.uint8)
    image = pixels[None] if shape[0] == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Decoded(image, digest, perceptual, whole.size)


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            _require_unpacked(file)
            start = file.read(512)
            for place, mark, reason in UNOPENED:
                if start.startswith(mark, place):
                    raise RejectedFileError(reason)
            file.seek(0)
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise RejectedFileError(TOO_LARGE)
            return file.read()
    except OSError as error:
        raise RejectedFileError(cannot_be_read(error)) from error


def require_unpacked(path: Path) -> None:
    """Raise a RejectedFileError if a file begins as a compressed archive does."""
    with path.open("rb") as file:
        _require_unpacked(file)


def _require_unpacked(file: BinaryIO) -> None:
    if file.read(max(map(len, PACKED))).startswith(PACKED):
        raise RejectedFileError("it is a compressed archive, which is not read; unpack it")
    file.seek(0)


def cannot_be_read(error: Exception) -> str:
    """The reason where a file system fails."""
    return f"{UNREAD} ({getattr(error, 'strerror', None) or error})"


def is_of_the_moment(reason: str) -> bool:
    """Whether another try may find the same file good: it was no matter of what is in it."""
    return reason.startswith((UNREAD, "it is too large for the memory"))


def _why(content: bytes, error: Exception) -> str:
    """Why Pillow gave up, in plain words."""
    from PIL import Image, UnidentifiedImageError

    message = str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MAX_PIXELS:,} pixels, as decompression bombs do"
    if isinstance(error, UnidentifiedImageError):
        if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
            return "it is a HEIC file, which is not read; convert it to JPEG"
        if _is_text(content[:2048]):
            return "it is a text file, not an image"
        return "it is not an image of a known format, or its beginning is damaged"
    # A WebP file says how long it is.
    cut = content[:4] == b"RIFF" and int.from_bytes(content[4:8], "little") + 8 > len(content)
    if cut or "truncated" in message.lower() or isinstance(error, EOFError):
        return "it is truncated"
    return f"it is damaged ({message or type(error).__name__})"


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:
            return False
        text = start[: error.start].decode()
    return all(c.isprintable() or c in "\t\r\n\f\ufeff" for c in text)


def _upright(content: bytes, shape: Shape, background: str) -> "Image":
    """The whole image, upright, opaque, in grey ("L") or colour ("RGB")."""
    from PIL import Image

    with Image.open(BytesIO(content), formats=_known()) as image:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS or (pixels > BOMB_PIXELS and pixels > BOMB_RATIO * len(content)):
            raise RejectedFileError(
                f"it unpacks to {pixels / 1e6:,.0f} million pixels from {len(content) / 1e3:,.0f} "
                "kB, as decompression bombs do"
            )
        # A large JPEG need not be read at full size.
        image.draft(None, (2 * max(shape[2], 32), 2 * max(shape[1], 32)))
        image.load()
        found = _opaque(image, background).convert("L" if shape[0] == 1 else "RGB")
        try:
            orientation = image.getexif().get(0x0112, 1)
        except Exception:  # whatever is wrong with EXIF data, the image itself is whole
            orientation = 1
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return found if turn is None else found.transpose(turn)


def _known() -> list[str]:
    """The formats that this Pillow can read."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _opaque(image: "Image", background: str) -> "Image":
    """The image in a mode that converts to grey and colour as it looks on the background."""
    from PIL import Image, ImageColor

    if image.mode.startswith("I;16"):
        return Image.fromarray(_to_bytes(np.asarray(image).astype(np.float32), 65535.0))
    if image.mode in ("I", "F"):
        levels = np.asarray(image).astype(np.float32)
        if not np.isfinite(levels).all():
            raise RejectedFileError("it has levels that are not finite")
        low, high = float(levels.min()), float(levels.max())
        top = next((t for t in (1.0, 255.0, 65535.0) if image.mode == "F" and high <= t), 65535.0)
        if low < 0 or high > top:  # no common range: that of the image itself
            return Image.fromarray(_to_bytes(levels - low, max(high - low, 1e-12)))
        return Image.fromarray(_to_bytes(levels, top))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        paper = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
        return Image.alpha_composite(paper, image.convert("RGBA"))
    # A palette of colours has no grey of its own.
    return image.convert("RGB") if image.mode in ("P", "CMYK", "YCbCr", "HSV") else image


def _to_bytes(levels: NDArray[np.float32], top: float) -> Images:
    scaled: Images = np.round(levels * (255 / top)).astype(np.uint8)
    return scaled


def _fit(image: "Image", shape: Shape, fit: Fit, background: str) -> "Image":
    from PIL import Image, ImageColor, ImageOps

    _, height, width = shape
    resample = Image.Resampling.BICUBIC
    if fit == "crop":
        return ImageOps.fit(image, (width, height), resample)
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    colour = ImageColor.getcolor(background, image.mode)
    paper = Image.new(image.mode, (width, height), colour)
    place = ((width - size[0]) // 2, (height - size[1]) // 2)
    paper.paste(image.resize(size, resample, reducing_gap=3.0), place)
    return paper


def _perceptual_hash(image: "Image") -> int:
    """The perceptual hash (pHash) as ImageHash computes it, 64 bits."""
    from imagehash import phash

    return int(str(phash(image)), 16)


@dataclass(frozen=True)
class Look:
    """What the images of a folder look like, from a look at some of them.

    Attributes:
        side: the side to decode them at: that of small images, and `SIDE` for others.
        channels: 3 if one of them has colours, otherwise 1.
    """

    side: int
    channels: int


def look_at(listing: Listing) -> Look:
    """Look at the heads of up to `LOOKED_AT` files, spread over the folder."""
    from PIL import Image

    count = len(listing.paths)
    chosen = sorted({k * count // LOOKED_AT for k in range(LOOKED_AT)}) if count else []
    sides, colours = [], False
    for position in chosen:
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(listing.root / listing.paths[position], formats=_known()) as image:
                sides.append(min(image.size))
                colours |= image.mode not in GREY_MODES
    middle = sorted(sides)[len(sides) // 2] if sides else SIDE
    # A multiple of 4, as networks halve the side twice.
    return Look(min(SIDE, max(8, 4 * math.ceil(middle / 4))), 3 if colours or not sides else 1)
