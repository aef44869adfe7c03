"""Images in files of their own and in containers: tar archives and Parquet files of a folder.

Nothing is unpacked on disk. What a container holds is listed once, and each image is read from its
place there. Names of members are labels; no file is ever opened by them.
"""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path, PurePosixPath

from weighmatch.checks import ToldError
from weighmatch.data.files import (
    UNREAD,
    Fit,
    Rejected,
    RejectedFileError,
    Shape,
    decode,
    is_of_the_moment,
    require_folder,
    require_unpacked,
    walk_images,
)
from weighmatch.data.members import DAMAGED, Content, Kind, Member, complete, look, reason_of
from weighmatch.data.parquet_files import PARQUET
from weighmatch.data.splits import Images
from weighmatch.data.tar_files import TAR

# Seconds after which a file that could not be read is read once more.
MOMENT = 1.0
REMOVED = "it was removed while the folder was ranked"


class UnseenError(ToldError, OSError):
    """A machine does not see a folder, a file or a GPU that it needs; the message says which."""


def base_of(root: str | Path) -> Path:
    """The folder that paths of members begin at: the root, or that of a root that is a file.

    Raises:
        UnfitFolderError: if there is no such folder and no such file.
    """
    place = Path(root).expanduser().resolve()
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
    base, top = base_of(root), Path(root).expanduser().resolve()
    for one in walk_images(base) if top.is_dir() else [top.name]:
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


def decode_surely(
    root: str | Path,
    members: Sequence[Member],
    shape: Shape,
    fit: Fit,
    background: str,
    progress: Callable[[int], None],
) -> list[Images | RejectedFileError]:
    """`decode_members`, with another try where a file could not be read for a moment.

    What is wrong with an image is thus what any machine would find.

    Args:
        root: see `decode_members`, as are the next four.
        members: see there.
        shape: see there.
        fit: see there.
        background: see there.
        progress: called with 1 for each image.

    Raises:
        UnseenError: if this machine alone may be unable to read a file.
    """
    found = []
    for answer in decode_members(root, members, shape, fit, background):
        found.append(answer)
        progress(1)
    # What was gone when it was listed (a size of -1) is no matter of this machine.
    doubtful = [
        place
        for place, (member, answer) in enumerate(zip(members, found, strict=True))
        if isinstance(answer, RejectedFileError)
        and is_of_the_moment(answer.reason)
        and member.size >= 0
    ]
    if doubtful:
        time.sleep(MOMENT)
        again = [members[place] for place in doubtful]
        answers = decode_members(root, again, shape, fit, background)
        for place, answer in zip(doubtful, answers, strict=True):
            found[place] = _settle(Path(root, members[place].file), answer)
    return found


def _settle(file: Path, answer: Images | RejectedFileError) -> Images | RejectedFileError:
    """The answer, if it holds on any machine.

    Raises:
        UnseenError: if this machine alone may be unable to read the file.
    """
    if not isinstance(answer, RejectedFileError) or not answer.reason.startswith(UNREAD):
        return answer
    if _is_removed(file):
        return RejectedFileError(REMOVED)
    why = answer.reason.removeprefix(UNREAD).strip()
    raise UnseenError(
        f"the machine {socket.gethostname()} cannot read {file} {why}; give all machines the "
        "images under the same path, or remove the file, and start the same command again, which "
        "keeps the shards that are done"
    )


def _is_removed(file: Path) -> bool:
    """Whether a file is gone from a folder that this machine sees.

    Where a share is not mounted, the folder is not there or is empty.
    """
    try:
        os.stat(file)
    except FileNotFoundError:
        with suppress(OSError):
            return any(os.scandir(file.parent))
    except OSError:
        pass
    return False


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
