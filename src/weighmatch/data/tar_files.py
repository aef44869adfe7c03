"""Images in tar archives."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from weighmatch.data.files import MAX_BYTES, TOO_LARGE, Rejected
from weighmatch.data.members import Content, Kind, Member, is_named_as_an_image, require_same

# The longest header of an archive that is read, such as a name.
MAX_HEADER = 2**20
# Bytes that are looked at together for what follows the end of an archive.
AHEAD = 2**16


class _Headers(io.FileIO):
    """A tar archive whose headers are read, and no more at once than a header may have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError("a header is too long")
        return super().read(size)


def _walk(place: Path, file: Member) -> Iterator[Member | Rejected]:
    # Archives may follow one another, as after `cat a.tar b.tar`; tar itself stops at the first.
    start: int | None = 0
    with _Headers(place) as headers:
        while start is not None:
            headers.seek(start)
            with tarfile.TarFile(fileobj=headers, encoding="utf-8") as archive:
                yield from _walk_archive(archive, file)
                end = archive.offset
            start = _skip_zeros(headers, end)
            # An archive ends with a block of zeros; one that is cut off between members has none.
            if headers.tell() < end + tarfile.BLOCKSIZE or start == end:
                raise tarfile.ReadError("there is no end")


def _walk_archive(archive: tarfile.TarFile, file: Member) -> Iterator[Member | Rejected]:
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


def _skip_zeros(headers: _Headers, place: int) -> int | None:
    """The block from `place` on that is not of zeros; None if there is none."""
    headers.seek(place)
    while content := headers.read(AHEAD):
        inside = len(content) - len(content.lstrip(b"\0"))
        if inside < len(content):
            return place + inside // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        place += len(content)
    return None


def _why_no_image(found: tarfile.TarInfo, label: str) -> str | None:
    if found.isdir():
        return None
    if found.issym() or found.islnk():
        return "a link within an archive, which is not followed"
    if not found.isreg() or found.issparse():
        return "not a regular file"
    if label != f"/{found.name}":
        return "its name is not valid UTF-8; rename it"
    if not is_named_as_an_image(label):
        return "its name does not end as that of an image does"
    return TOO_LARGE if found.size > MAX_BYTES else None


def _read(place: Path, members: Sequence[Member]) -> Iterator[Content]:
    require_same(place, members[0])
    with place.open("rb") as file:
        for member in members:
            file.seek(member.first)
            yield file.read(member.length)


TAR = Kind(_walk, _read)
