"""What the datasets share: local files, written whole or not at all, and their checksums."""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from weighmatch.checks import ToldError

# Seconds after which a partial file that a process of another host may be writing is an orphan.
ORPHAN_AFTER = 86400.0
_PARTIAL = re.compile(r"\.(\d+)\.partial$")


class UnfitFileError(ToldError, ValueError):
    """A file is missing, or it is not as it was written; the message names it."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place.

    The file beside it carries the number of this process, so that two processes never share one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_atomically(path, write)


def remove_orphans(folders: Iterable[Path]) -> list[Path]:
    """Remove partial files, at any depth, of processes that are gone; returns them."""
    found = []
    # os.walk goes on where another process removes a folder at the same time.
    inside = (
        Path(place, name) for f in folders for place, _, names in os.walk(f) for name in names
    )
    for path in inside:
        match = _PARTIAL.search(path.name)
        if match is None:
            continue
        with suppress(OSError):  # another process removed it
            old = time.time() - path.stat().st_mtime > ORPHAN_AFTER
            if old or not is_running(int(match[1])):
                path.unlink()
                found.append(path)
    return found


def is_running(process: int) -> bool:
    """Whether this host has a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


# --- checksums -------------------------------------------------------------------------------

# By path, what the file looked like when it was hashed, and its SHA-256.
_known: dict[Path, tuple[tuple[int, ...], str]] = {}
_known_lock = threading.Lock()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file; a file that has not changed since is not read again."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        look = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        with _known_lock:
            known = _known.get(path)
        if known is not None and known[0] == look:
            return known[1]
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with _known_lock:
        _known[path] = look, digest
    return digest


def check_files(folder: Path, expected: Mapping[str, str]) -> None:
    """Compare files with their checksums.

    Args:
        folder: where they lie.
        expected: SHA-256 by path within the folder.

    Raises:
        UnfitFileError: that names the first file that is missing or not as it was written.
    """
    for name, checksum in expected.items():
        path = folder / name
        try:
            found = sha256_of(path)
        except FileNotFoundError:
            raise UnfitFileError(f"{path} is missing") from None
        except OSError as error:
            raise UnfitFileError(f"{path} cannot be read ({error.strerror})") from error
        if found != checksum:
            raise UnfitFileError(
                f"{path} is not as it was written: it is damaged, or was overwritten since"
            )
