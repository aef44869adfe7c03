"""Where an image lies that a file or a container holds, and why it cannot be read there."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from weighmatch.data.files import FORMATS, Rejected, RejectedFileError, cannot_be_read

CHANGED = "its container changed while it was ranked; rank it again"
DAMAGED = "it is damaged or truncated; of its images those before the damage are used"
DAMAGED_THERE = "its container is damaged where it lies"
# The bytes of an image, the file that it is, or why there are none.
Content = bytes | Path | RejectedFileError


@dataclass(frozen=True)
class Member:
    """Where an image lies.

    Attributes:
        file: the file that it is, or that holds it, relative to the root.
        label: what its path has after that of the file; "" if it is the file.
        first: the offset of its bytes in a tar archive, or its row in a Parquet file.
        length: how many bytes it has in a tar archive.
        size: bytes of the file; -1 if it is gone.
        changed: when the file was changed, in nanoseconds; -1 if it is gone.
    """

    file: str
    label: str
    first: int
    length: int
    size: int
    changed: int

    @property
    def path(self) -> str:
        """Its path in the ranking."""
        return self.file + self.label


@dataclass(frozen=True)
class Kind:
    """How a kind of file is listed and read.

    Attributes:
        walk: from the place of a file and the file as a member: what it holds.
        read: from that place and members of it, sorted by `first`: the content of each.
    """

    walk: Callable[[Path, Member], Iterator[Member | Rejected]]
    read: Callable[[Path, Sequence[Member]], Iterator[Content]]


def look(place: Path, name: str) -> Member:
    """A file as a member; it may be gone again."""
    try:
        found = os.stat(place)
    except OSError:
        return Member(name, "", 0, 0, -1, -1)
    return Member(name, "", 0, 0, found.st_size, found.st_mtime_ns)


def require_same(place: Path, member: Member) -> None:
    """Raise a RejectedFileError unless a container is as it was when it was listed.

    Bytes of another image would be scored under the name of this one.
    """
    found = os.stat(place)
    if (found.st_size, found.st_mtime_ns) != (member.size, member.changed):
        raise RejectedFileError(CHANGED)


def complete(contents: Iterator[Content], count: int) -> Iterator[Content]:
    """So many contents; for those that cannot be read, why."""
    given, reason = 0, CHANGED
    try:
        for content in contents:
            given += 1
            yield content
    except Exception as error:  # damaged bytes can make Arrow raise anything
        reason = reason_of(error, DAMAGED_THERE)
    for _ in range(count - given):
        yield RejectedFileError(reason)


def reason_of(error: Exception, otherwise: str) -> str:
    """Why a container cannot be read."""
    if isinstance(error, RejectedFileError):
        return error.reason
    # Arrow has OSErrors without a number for what is wrong within a file.
    if isinstance(error, OSError) and error.errno is not None:
        return cannot_be_read(error)
    return otherwise


def is_named_as_an_image(name: str) -> bool:
    """Whether a name ends as that of an image does."""
    return PurePosixPath(name).suffix.lower() in _endings()


@lru_cache
def _endings() -> frozenset[str]:
    """How names of images end, with the dot."""
    from PIL import Image

    known = Image.registered_extensions().items()
    return frozenset(ending for ending, format_ in known if format_ in FORMATS)
