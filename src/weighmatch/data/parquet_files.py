"""Images in Parquet files, a row each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from weighmatch.data.files import Rejected, RejectedFileError
from weighmatch.data.members import (
    Content,
    Kind,
    Member,
    complete,
    is_named_as_an_image,
    require_same,
)

# What is read at a time: bytes of the file, bytes of rows, and rows.
BUFFER, BYTES_AT_ONCE, ROWS_AT_ONCE = 2**20, 2**22, 1024
NO_BYTES = "its row has no bytes, at most a path; store the bytes in the Parquet file"
# Letters of a list of columns that a message has.
MAX_COLUMNS = 200


def _open(place: Path) -> pq.ParquetFile:
    # By default Arrow reads all of a row group's column before the first row.
    return pq.ParquetFile(place, buffer_size=BUFFER, pre_buffer=False)


def _walk(place: Path, file: Member) -> Iterator[Member | Rejected]:
    with _open(place) as table:
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
    if not found:
        there = ", ".join(f"{field.name}: {field.type}" for field in schema)
        there = there if len(there) <= MAX_COLUMNS else f"{there[:MAX_COLUMNS]}…"
        raise RejectedFileError(f"it has no column of bytes, and so no images; it has {there}")
    # A data set of WebDataset that was converted has columns such as jpg and cls.
    likely = [name for name in found if is_named_as_an_image(f"x.{name}")]
    for names in (list(found), ["image"], likely):
        if len(names) == 1 and names[0] in found:
            return found[names[0]]
    raise RejectedFileError(
        f"it has several columns of bytes ({', '.join(sorted(found))}); call that of the images "
        "image"
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    known = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_one(kind) for is_one in known)


def _read(place: Path, members: Sequence[Member]) -> Iterator[Content]:
    require_same(place, members[0])
    with _open(place) as table:
        about = table.metadata
        ends = np.cumsum([about.row_group(k).num_rows for k in range(about.num_row_groups)])
    rows = [member.first for member in members]
    groups = np.searchsorted(ends, rows, side="right").tolist()
    for group, chosen in groupby(zip(groups, rows, strict=True), key=lambda pair: pair[0]):
        start = int(ends[group - 1]) if group else 0
        inside = [row - start for _, row in chosen]
        yield from complete(_read_group(place, members[0], group, inside), len(inside))


def _read_group(place: Path, file: Member, group: int, rows: Sequence[int]) -> Iterator[Content]:
    """The contents of rows of a row group, whose pages are read one after the other."""
    key = (place, file.size, file.changed, group)
    reader = _readers.pop(key, None)
    _readers.clear()
    if reader is None or reader.start > rows[0]:
        reader = _GroupReader(place, group)
    for row in rows:
        yield reader.content(row)
    _readers[key] = reader  # the next shard goes on from here


class _GroupReader:
    """A row group that is read forwards, as Arrow has no quick access to a row.

    Attributes:
        start: the row that the rows in memory begin with.
    """

    def __init__(self, place: Path, group: int) -> None:
        table = _open(place)
        column = _find_column(table.schema_arrow)
        self._nested = pa.types.is_struct(column.type)
        name = f"{column.name}.bytes" if self._nested else column.name
        about = table.metadata.row_group(group)
        mean = max(1, about.total_byte_size // about.num_rows)
        self._parts = table.iter_batches(
            max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // mean)),
            row_groups=[group],
            columns=[name],
            use_threads=False,
        )
        self.start = 0
        self._values: Sequence[pa.Scalar] = ()

    def content(self, row: int) -> Content:
        """The content of a row from `start` on."""
        while row >= self.start + len(self._values):
            self.start += len(self._values)
            column = next(self._parts).column(0)
            self._values = column.field("bytes") if self._nested else column
        found = self._values[row - self.start].as_py()
        if found is None and self._nested:
            return RejectedFileError(NO_BYTES)
        return found or b""


# The row group that was read last, by the file's place, size and time, and its number.
_readers: dict[tuple[Path, int, int, int], _GroupReader] = {}

PARQUET = Kind(_walk, _read)
