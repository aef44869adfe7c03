"""Images in files of their own and in containers: tar archives and Parquet files of a folder.

Nothing is unpacked on disk. What a container holds is listed once, and each image is read from its
place there. Names of members are labels; no file is ever opened by them.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath

from weighmatch.data.files import (
    UNREAD,
    Fit,
    Rejected,
    RejectedFileError,
    Shape,
    decode,
    require_folder,
    require_unpacked,
    walk_images,
)
from weighmatch.data.members import DAMAGED, Content, Kind, Member, complete, look, reason_of
from weighmatch.data.parquet_files import PARQUET
from weighmatch.data.splits import Images
from weighmatch.data.tar_files import TAR


def base_of(root: str | Path) -> Path:
    """The folder that paths of members begin at: the root, or that of a root that is a file.

    Raises:
        UnfitFolderError: if there is no such folder and no such file.
    """
    place = Path(root).resolve()
    if place.is_file():
        return place.parent
    require_folder(place)
    return place


def walk_members(root: str | Path) -> Iterator[Member | Rejected]:
    """The images of a folder or of one container, in any order; none is kept.

    Yields:
        An image, or what is none and why. A container that is damaged is named once.

    Raises:
        UnfitFolderError: if the root does not exist or cannot be listed; it says which.
    """
    base = base_of(root)
    for one in walk_images(base) if Path(root).is_dir() else [Path(root).resolve().name]:
        if isinstance(one, Rejected):
            yield one
            continue
        place, empty = base / one, True
        try:
            kind = _kind(one)
            if kind is not FILE:
                require_unpacked(place)
            for member in kind.walk(place, look(place, one)):
                empty = False
                yield member
            if empty:
                yield Rejected(one, "it holds no image")
        except Exception as error:  # damaged bytes can make tarfile and Arrow raise anything
            yield Rejected(one, reason_of(error, DAMAGED))


def decode_members(
    root: str | Path, members: Sequence[Member], shape: Shape, fit: Fit, background: str
) -> Iterator[Images | RejectedFileError]:
    """Read images, one by one.

    Args:
        root: the folder.
        members: where they lie; those of one file beside each other and sorted by `first`.
        shape: see `weighmatch.data.files.decode`, as are `fit` and `background`.
        fit: see there.
        background: see there.

    Yields:
        For each member its image, (C, H, W) uint8, or why it cannot be used.
    """
    for file, group in groupby(members, key=lambda member: member.file):
        inside = list(group)
        for content in complete(_kind(file).read(Path(root, file), inside), len(inside)):
            found: Images | RejectedFileError
            if isinstance(content, RejectedFileError):
                found = content
            else:
                try:
                    found = decode(content, shape, fit, background)
                except RejectedFileError as error:
                    found = error
            yield found


def _walk_file(place: Path, file: Member) -> Iterator[Member | Rejected]:
    # Said here, as a machine that cannot read what another one listed ends a ranking.
    allowed = file.size < 0 or os.access(place, os.R_OK)
    yield file if allowed else Rejected(file.file, f"{UNREAD} ({os.strerror(errno.EACCES)})")


def _read_file(place: Path, members: Sequence[Member]) -> Iterator[Content]:
    yield place


FILE = Kind(_walk_file, _read_file)
CONTAINERS = {".tar": TAR, ".parquet": PARQUET}


def _kind(name: str) -> Kind:
    return CONTAINERS.get(PurePosixPath(name).suffix.lower(), FILE)
