"""Images in files of their own and in containers: tar archives and Parquet files of a folder.

Nothing is unpacked on disk. What a container holds is listed once, and each image is read from its
place there. Names of members are labels; no file is ever opened by them.
"""

import errno
import io
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from weighmatch.data.files import (
    FORMATS,
    MAX_BYTES,
    TOO_LARGE,
    UNREAD,
    Fit,
    Rejected,
    RejectedFileError,
    Shape,
    cannot_be_read,
    decode,
    require_folder,
    walk_images,
)
from weighmatch.data.splits import Images

# The longest header of a tar archive that is read, such as a name.
MAX_HEADER = 2**20
# What is read of a Parquet file at a time: bytes of the file, bytes of rows, and rows.
BUFFER, BYTES_AT_ONCE, ROWS_AT_ONCE = 2**20, 2**22, 1024
DAMAGED = "it is damaged or truncated; of its images those before the damage are used"
DAMAGED_THERE = "its container is damaged where it lies"
CHANGED = "its container changed while it was ranked; rank it again"
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
            for member in _kind(one).walk(place, _look(place, one)):
                empty = False
                yield member
            if empty:
                yield Rejected(one, "it holds no image")
        except Exception as error:  # damaged bytes can make tarfile and Arrow raise anything
            yield Rejected(one, _why(error, DAMAGED))


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
        for content in _complete(_kind(file).read(Path(root, file), inside), len(inside)):
            found: Images | RejectedFileError
            if isinstance(content, RejectedFileError):
                found = content
            else:
                try:
                    found = decode(content, shape, fit, background)
                except RejectedFileError as error:
                    found = error
            yield found


def _complete(contents: Iterator[Content], count: int) -> Iterator[Content]:
    """So many contents; for those that cannot be read, why."""
    given, reason = 0, CHANGED
    try:
        for content in contents:
            given += 1
            yield content
    except Exception as error:  # damaged bytes can make Arrow raise anything
        reason = _why(error, DAMAGED_THERE)
    for _ in range(count - given):
        yield RejectedFileError(reason)


def _why(error: Exception, otherwise: str) -> str:
    if isinstance(error, RejectedFileError):
        return error.reason
    # Arrow has OSErrors without a number for what is wrong within a file.
    if isinstance(error, OSError) and error.errno is not None:
        return cannot_be_read(error)
    return otherwise


def _look(place: Path, name: str) -> Member:
    """A file as a member; it may be gone again."""
    try:
        found = os.stat(place)
    except OSError:
        return Member(name, "", 0, 0, -1, -1)
    return Member(name, "", 0, 0, found.st_size, found.st_mtime_ns)


def _require_same(place: Path, member: Member) -> None:
    # Bytes of another image would be scored under the name of this one.
    if os.stat(place).st_size != member.size:
        raise RejectedFileError(CHANGED)


# --- files of their own --------------------------------------------------------------------------


def _walk_file(place: Path, file: Member) -> Iterator[Member | Rejected]:
    # Said here, as a machine that cannot read what another one listed ends a ranking.
    allowed = file.size < 0 or os.access(place, os.R_OK)
    yield file if allowed else Rejected(file.file, f"{UNREAD} ({os.strerror(errno.EACCES)})")


def _read_file(place: Path, members: Sequence[Member]) -> Iterator[Content]:
    yield place


# --- tar archives --------------------------------------------------------------------------------


class _Headers(io.FileIO):
    """A tar archive whose headers are read, and no more at once than a header may have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError("a header is too long")
        return super().read(size)


def _walk_tar(place: Path, file: Member) -> Iterator[Member | Rejected]:
    with (
        _Headers(place) as headers,
        tarfile.TarFile(fileobj=headers, encoding="utf-8") as archive,
    ):
        while (found := archive.next()) is not None:
            # Else it keeps a list of them. The attribute has no entry in the types of Python.
            archive.members = []  # type: ignore[attr-defined]
            whole = found.isreg() and not found.issparse()
            if whole and not 0 <= found.size <= file.size - found.offset_data:
                raise tarfile.ReadError("a member is cut off")
            if archive.offset <= found.offset:
                raise tarfile.ReadError("a member is followed by itself")
            label = f"/{found.name}".encode("utf-8", "backslashreplace").decode()
            reason = _why_no_image(found, label)
            if reason is not None:
                yield Rejected(file.file + label, reason)
            elif not found.isdir():
                yield replace(file, label=label, first=found.offset_data, length=found.size)
        # An archive ends with a block of zeros; what is cut off between two members has none.
        headers.seek(archive.offset)
        if headers.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("there is no end")


def _why_no_image(found: tarfile.TarInfo, label: str) -> str | None:
    if found.isdir():
        return None
    if found.issym() or found.islnk():
        return "a link within an archive, which is not followed"
    if not found.isreg() or found.issparse():
        return "not a regular file"
    if label != f"/{found.name}":
        return "its name is not valid UTF-8; rename it"
    if PurePosixPath(label).suffix.lower() not in _endings():
        return "its name does not end as that of an image does"
    return TOO_LARGE if found.size > MAX_BYTES else None


@lru_cache
def _endings() -> frozenset[str]:
    """How names of images end, with the dot."""
    from PIL import Image

    known = Image.registered_extensions().items()
    return frozenset(ending for ending, format_ in known if format_ in FORMATS)


def _read_tar(place: Path, members: Sequence[Member]) -> Iterator[Content]:
    _require_same(place, members[0])
    with place.open("rb") as file:
        for member in members:
            file.seek(member.first)
            yield file.read(member.length)


# --- Parquet files -------------------------------------------------------------------------------


def _open_parquet(place: Path) -> pq.ParquetFile:
    # By default Arrow reads all of a row group's column before the first row.
    return pq.ParquetFile(place, buffer_size=BUFFER, pre_buffer=False)


def _walk_parquet(place: Path, file: Member) -> Iterator[Member | Rejected]:
    with _open_parquet(place) as table:
        column = _find_column(table.schema_arrow)
        row = 0
        for names in _names(table, column):
            for name in names:
                last = PurePosixPath(name or "").name
                yield replace(file, label=f"/{row}/{last}" if last else f"/{row}", first=row)
                row += 1


def _names(table: pq.ParquetFile, column: pa.Field) -> Iterator[Sequence[str | None]]:
    """What rows say that their images are called, some rows at a time."""
    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        columns = [f"{column.name}.path"]
        for part in table.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
            yield part.column(0).field("path").to_pylist()
    else:
        rows = table.metadata.num_rows
        for first in range(0, rows, ROWS_AT_ONCE):
            yield [None] * min(ROWS_AT_ONCE, rows - first)


def _find_column(schema: pa.Schema) -> pa.Field:
    """The column of images: of bytes, or a struct with bytes as Hugging Face's data sets have."""
    found = {field.name: field for field in schema if _holds_bytes(field.type)}
    if len(found) == 1:
        return next(iter(found.values()))
    if "image" in found:
        return found["image"]
    if not found:
        raise RejectedFileError("it has no column of bytes, and so no images")
    raise RejectedFileError(
        f"it has several columns of bytes ({', '.join(sorted(found))}); call that of the images "
        "image"
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _read_parquet(place: Path, members: Sequence[Member]) -> Iterator[Content]:
    _require_same(place, members[0])
    with _open_parquet(place) as table:
        column = _find_column(table.schema_arrow)
        about = table.metadata
        ends = np.cumsum([about.row_group(k).num_rows for k in range(about.num_row_groups)])
        rows = [member.first for member in members]
        groups = np.searchsorted(ends, rows, side="right").tolist()
        for group, chosen in groupby(zip(groups, rows, strict=True), key=lambda pair: pair[0]):
            start = int(ends[group - 1]) if group else 0
            inside = [row - start for _, row in chosen]
            yield from _complete(_read_group(table, column, group, inside), len(inside))


def _read_group(
    table: pq.ParquetFile, column: pa.Field, group: int, rows: Sequence[int]
) -> Iterator[Content]:
    """The contents of rows of a row group, which is read from its beginning."""
    nested = pa.types.is_struct(column.type)
    name = f"{column.name}.bytes" if nested else column.name
    about = table.metadata.row_group(group)
    mean = max(1, about.total_byte_size // about.num_rows)
    at_once = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // mean))
    waiting, start = deque(rows), 0
    parts = table.iter_batches(at_once, row_groups=[group], columns=[name], use_threads=False)
    for part in parts:
        values = part.column(0).field("bytes") if nested else part.column(0)
        while waiting and waiting[0] < start + len(values):
            yield values[waiting.popleft() - start].as_py() or b""
        if not waiting:
            return
        start += len(values)


FILE = Kind(_walk_file, _read_file)
CONTAINERS = {".tar": Kind(_walk_tar, _read_tar), ".parquet": Kind(_walk_parquet, _read_parquet)}


def _kind(name: str) -> Kind:
    return CONTAINERS.get(PurePosixPath(name).suffix.lower(), FILE)
