"""Images of a folder that are decoded once: a second look reads only what has changed.

A store holds one memory-mapped array of images and an index. The index says for each file how
large it was, when it was changed, what its hashes are, and in which row of the array it lies.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from weighmatch.checks import ToldError, counted
from weighmatch.data.decoding import decode_many
from weighmatch.data.files import (
    Decoded,
    Fit,
    Listing,
    Rejected,
    Shape,
    is_of_the_moment,
)
from weighmatch.data.splits import Images

log = logging.getLogger(__name__)

# To be raised when the same file would be decoded to other pixels or hashes.
VERSION = 1
# Files after which what is read is kept, so that a killed run goes on from there.
FILES_BETWEEN_SAVES = 5_000
# Seconds after which an array that no index names is taken for left behind.
LEFT_BEHIND_AFTER = 86_400.0


def default_cache() -> Path:
    """The folder for decoded images where none is given, in the user's own cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weighmatch"


class NoRoomError(ToldError, OSError):
    """Decoded images need more room than a disk has; the message says how much."""


@dataclass(frozen=True)
class Entry:
    """What is known of a file.

    Attributes:
        size: its length in bytes.
        changed: when its content and its state were changed last, in nanoseconds.
        reason: why it is rejected, or "".
        row: where its image lies in the array of images.
        check: the CRC-32 of that row.
        content: see `files.Decoded`.
        perceptual: see `files.Decoded`.
    """

    size: int
    changed: tuple[int, int]
    reason: str = ""
    row: int = -1
    check: int = 0
    content: str = ""
    perceptual: int = 0


@dataclass(frozen=True, eq=False)
class ReadImages:
    """The images of a folder.

    Attributes:
        root: the folder, an absolute path.
        paths: the files that hold an image, relative to `root`, sorted.
        stored: the memory-mapped array that holds their images, (m, C, H, W).
        rows: the row of each image in `stored`, (n,).
        content: the hash of each file's bytes, (n,).
        perceptual: the perceptual hash of each image, (n,) uint64.
        rejected: the files that hold none, sorted by path.
        decoded: how many files were decoded for this.
    """

    root: Path
    paths: tuple[str, ...]
    stored: Images
    rows: NDArray[np.int64]
    content: tuple[str, ...]
    perceptual: NDArray[np.uint64]
    rejected: tuple[Rejected, ...]
    decoded: int


def read_images(
    listing: Listing,
    shape: Shape,
    fit: Fit = "crop",
    background: str = "white",
    cache: str | Path | None = None,
    workers: int | Literal["auto"] = "auto",
) -> ReadImages:
    """Read the images of a folder, from the cache where their files have not changed.

    Args:
        listing: the files.
        shape: see `files.decode`, as are `fit` and `background`.
        fit: see `files.decode`.
        background: see `files.decode`.
        cache: a folder for what is decoded; None: `default_cache`. It must not lie in the folder
            of images.
        workers: number of processes; "auto": one a core.

    Raises:
        ValueError: if the cache lies in the folder of images, in which nothing is written.
        NoRoomError: if the disk has no room for the decoded images; nothing is written then.
    """
    folder = Path(cache or default_cache()).resolve()
    if folder.is_relative_to(listing.root):
        raise ValueError(
            f"the folder for decoded images, {folder}, lies within {listing.root}, in which "
            "nothing is written; give another data_folder"
        )
    store = _Store(folder, listing.root, shape, fit, background)
    return store.read(listing, workers)


class _Store:
    """Decoded images of one folder at one shape."""

    def __init__(self, cache: Path, root: Path, shape: Shape, fit: Fit, background: str) -> None:
        self.shape, self.fit, self.background, self.root = shape, fit, background, root
        identity = json.dumps([VERSION, str(root), shape, fit, background])
        name = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        self.folder = cache / f"{root.name or 'root'}-{name}"
        self.row_bytes = int(np.prod(shape))

    def read(self, listing: Listing, workers: int | Literal["auto"]) -> ReadImages:
        old_name, old = self._load()
        self._remove_left_behind(old_name)
        now = {path: entry for path in listing.paths if (entry := self._look(path))}
        kept = {p: old[p] for p, e in now.items() if p in old and _same(old[p], e)}
        kept |= self._find_moved(now, old, kept)
        kept = self._verified(old_name, kept)
        missing = [path for path in listing.paths if path not in kept]
        if missing or len(kept) < len(old) or old_name is None:
            name, entries = self._write(listing, now, old_name, kept, missing, workers)
            if old_name is not None:
                (self.folder / old_name).unlink(missing_ok=True)
        else:
            name, entries = old_name, kept
        good = [path for path in listing.paths if not entries[path].reason]
        bad = [Rejected(p, entries[p].reason) for p in listing.paths if entries[p].reason]
        rejected = sorted((*listing.rejected, *bad), key=lambda one: one.path)
        return ReadImages(
            listing.root,
            tuple(good),
            self._open(name),
            np.array([entries[path].row for path in good], np.int64),
            tuple(entries[path].content for path in good),
            np.array([entries[path].perceptual for path in good], np.uint64),
            tuple(rejected),
            len(missing),
        )

    def _look(self, path: str) -> Entry | None:
        try:
            found = (self.root / path).stat()
        except OSError:
            return None
        return Entry(found.st_size, (found.st_mtime_ns, found.st_ctime_ns))

    def _find_moved(
        self, now: dict[str, Entry], old: dict[str, Entry], kept: dict[str, Entry]
    ) -> dict[str, Entry]:
        """Entries of files that were moved or copied: files of the same bytes as a known one."""
        known = {entry.content: entry for entry in old.values() if not entry.reason}
        sizes = {entry.size for entry in known.values()}
        moved = {}
        for path, entry in now.items():
            if path in kept or entry.size not in sizes:
                continue
            with suppress(OSError):
                content = hashlib.blake2b((self.root / path).read_bytes(), digest_size=16)
                same = known.get(content.hexdigest())
                if same is not None:
                    moved[path] = replace(same, size=entry.size, changed=entry.changed)
        return moved

    def _verified(self, name: str | None, entries: dict[str, Entry]) -> dict[str, Entry]:
        """The entries whose images are as they were written."""
        if name is None:
            return {}
        stored = self._open(name)
        whole = {}
        for path, entry in entries.items():
            if entry.reason or zlib.crc32(stored[entry.row].tobytes()) == entry.check:
                whole[path] = entry
        if len(whole) < len(entries):
            log.warning(
                "%d decoded images in %s are damaged; their files are read again",
                len(entries) - len(whole),
                self.folder,
            )
        return whole

    def _write(
        self,
        listing: Listing,
        now: dict[str, Entry],
        old_name: str | None,
        kept: dict[str, Entry],
        missing: Sequence[str],
        workers: int | Literal["auto"],
    ) -> tuple[str, dict[str, Entry]]:
        """A new array: rows that are known are copied, the others are decoded."""
        name = f"images-{os.getpid()}-{time.time_ns()}.npy"
        rows = {path: row for row, path in enumerate(listing.paths)}
        shape = (max(1, len(rows)), *self.shape)
        _require_room(self.folder, shape)
        self.folder.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(self.folder / name, "w+", np.uint8, shape).flush()
        start = (self.folder / name).stat().st_size - shape[0] * self.row_bytes
        entries: dict[str, Entry] = {}
        # Plain writes: pages of a map would count as this process's memory.
        with (self.folder / name).open("r+b") as file:
            for path, image in self._known_rows(old_name, kept):
                entry = kept[path]
                if image is not None:
                    self._put(file, start, rows[path], image)
                    entry = replace(entry, row=rows[path])
                entries[path] = entry
            places = [self.root / path for path in missing]
            found = decode_many(places, self.shape, self.fit, self.background, workers)
            for done, (position, one) in enumerate(found, 1):
                path = missing[position]
                entry = now.get(path, Entry(0, (0, 0)))
                if isinstance(one, Decoded):
                    self._put(file, start, rows[path], one.image.tobytes())
                    entry = replace(
                        entry,
                        row=rows[path],
                        check=zlib.crc32(one.image.tobytes()),
                        content=one.content,
                        perceptual=one.perceptual,
                    )
                else:
                    entry = replace(entry, reason=one.reason)
                entries[path] = entry
                if done % FILES_BETWEEN_SAVES == 0:
                    file.flush()
                    self._save(name, entries)
        self._save(name, entries)
        return name, entries

    def _known_rows(
        self, name: str | None, kept: dict[str, Entry]
    ) -> Iterator[tuple[str, bytes | None]]:
        if name is None:
            return
        stored = self._open(name)
        for path, entry in kept.items():
            yield path, None if entry.reason else stored[entry.row].tobytes()

    def _put(self, file: BinaryIO, start: int, row: int, image: bytes) -> None:
        file.seek(start + row * self.row_bytes)
        file.write(image)

    # --- files of the store ---

    def _open(self, name: str) -> Images:
        stored: Images = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        return stored

    def _load(self) -> tuple[str | None, dict[str, Entry]]:
        """The name of the array and the entries; nothing if there are none or they are damaged."""
        path = self.folder / "index.json"
        if not path.exists():
            return None, {}
        try:
            check, _, text = path.read_text().partition("\n")
            if check != _checksum(text):
                raise ValueError("its checksum is another")
            index: dict[str, Any] = json.loads(text)
            name = str(index["images"])
            stored = self._open(name)
            if stored.shape[1:] != self.shape or stored.dtype != np.uint8:
                raise ValueError("its images have another shape")
            entries = {
                path: Entry(**{**entry, "changed": tuple(entry["changed"])})
                for path, entry in index["files"].items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning(
                "what is kept of decoded images in %s is damaged (%s); all files are read again",
                self.folder,
                error,
            )
            return None, {}
        return name, entries

    def _save(self, name: str, entries: dict[str, Entry]) -> None:
        # What could not be opened may be readable next time.
        files = {p: asdict(e) for p, e in entries.items() if not is_of_the_moment(e.reason)}
        text = json.dumps({"images": name, "files": files})
        partial = self.folder / f"index-{os.getpid()}.partial"
        partial.write_text(f"{_checksum(text)}\n{text}")
        os.replace(partial, self.folder / "index.json")

    def _remove_left_behind(self, named: str | None) -> None:
        for path in self.folder.glob("images-*.npy"):
            with suppress(OSError):
                if path.name != named and time.time() - path.stat().st_mtime > LEFT_BEHIND_AFTER:
                    path.unlink()


def _require_room(folder: Path, shape: tuple[int, ...]) -> None:
    """Raise a NoRoomError unless the disk of a folder has room for an array (n, C, H, W) uint8.

    What is known already needs no less room: it is copied before its old array is removed.
    """
    place = next(place for place in (folder, *folder.parents) if place.exists())
    needed, free = int(np.prod(shape, dtype=object)), shutil.disk_usage(place).free
    if needed > free:
        raise NoRoomError(
            f"{counted(shape[0], 'decoded image')} of {shape[3]} × {shape[2]} pixels need "
            f"{needed / 1e9:,.1f} GB in {folder}, and its disk has {free / 1e9:,.1f} GB free; "
            "lower data.size, make room or choose another data_folder"
        )


def _same(old: Entry, now: Entry) -> bool:
    return (old.size, old.changed) == (now.size, now.changed)


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
