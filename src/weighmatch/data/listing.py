"""The list of a pile of images: a data base on disk, and how it is cut into parts.

A part begins where the hash of a path says so. A new file thus changes the part that it lies in,
and no other ones but those up to the next such place.
"""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from weighmatch.checks import ToldError
from weighmatch.data.containers import walk_members
from weighmatch.data.files import Rejected
from weighmatch.data.members import Member

# What a data base keeps in memory, in KiB.
CACHE = 65_536
SAME_NAME = "a later member of the archive has the same name"
COLUMNS = ", ".join(field.name for field in fields(Member))


class NoImageError(ToldError, ValueError):
    """No file of a pile can be used as an image; the message says why."""


@dataclass(frozen=True)
class Part:
    """Images that lie beside each other in the list.

    Attributes:
        first: the row of the first one in the list, from 1.
        count: how many there are.
        listed: identifies the paths, sizes and times of their files, and where in them they lie.
    """

    first: int
    count: int
    listed: str


class PileList:
    """What `write_list` wrote; it can be read by any number of processes.

    Args:
        path: of the data base.
    """

    def __init__(self, path: Path) -> None:
        # Nobody writes any more: no lock is needed, which shared folders often lack.
        self._uri = f"{path.absolute().as_uri()}?immutable=1"

    def count(self) -> int:
        """How many images there are."""
        return int(self._ask("SELECT COUNT(*) FROM files")[0][0])

    def __len__(self) -> int:
        return int(self._ask("SELECT COUNT(*) FROM parts")[0][0])

    def part(self, number: int) -> Part:
        """A part by its number, from 0."""
        query = "SELECT first, count, listed FROM parts WHERE rowid = ? + 1"
        return Part(*self._ask(query, (number,))[0])

    def number_of(self, listed: str) -> int | None:
        """The number of the part with these images; None if no part has just them."""
        found = self._ask("SELECT rowid - 1 FROM parts WHERE listed = ?", (listed,))
        return int(found[0][0]) if found else None

    def members(self, part: Part) -> list[Member]:
        """The images of a part."""
        query = f"SELECT {COLUMNS} FROM files WHERE rowid BETWEEN ? AND ? ORDER BY rowid"
        between = (part.first, part.first + part.count - 1)
        return [Member(*row) for row in self._ask(query, between)]

    def rows(self, rows: Iterable[int]) -> list[Member]:
        """Images by their rows, from 1."""
        query = f"SELECT {COLUMNS} FROM files WHERE rowid = ?"
        return [Member(*self._ask(query, (row,))[0]) for row in rows]

    def rejected(self) -> Iterator[tuple[str, str]]:
        """Path and reason of what is no image without a look inside."""
        with closing(sqlite3.connect(self._uri, uri=True)) as base:
            yield from base.execute("SELECT path, reason FROM rejected")

    def _ask(self, query: str, given: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._uri, uri=True)) as base:
            return base.execute(query, given).fetchall()


def make_base(path: Path) -> sqlite3.Connection:
    """A new data base, which sorts in the folder that it lies in."""
    path.unlink(missing_ok=True)
    base = sqlite3.connect(path, isolation_level=None)
    folder = str(path.parent.absolute()).replace("'", "''")
    # What is written can be made again: no journal is needed. The system's folder for temporary
    # files is often small.
    base.executescript(
        f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-{CACHE};"
        f"PRAGMA temp_store_directory='{folder}';"
    )
    return base


def write_list(path: Path, root: str | Path, size: int) -> None:
    """List the images of a pile in a data base, in the order of their files.

    Of equal names in an archive the last one counts, as `tar` itself has it.

    Args:
        path: of the data base, which is replaced.
        root: the pile; see `weighmatch.data.containers.walk_members`.
        size: images of a part at most.

    Raises:
        NoImageError: if there is none.
        UnfitFolderError: if there is no such pile.
    """
    with closing(make_base(path)) as base:
        base.executescript(
            f"CREATE TABLE found ({COLUMNS});"
            "CREATE TABLE rejected (path TEXT, reason TEXT);"
            "CREATE TABLE twice (place INTEGER PRIMARY KEY);"
            "CREATE TABLE parts (first INTEGER, count INTEGER, listed TEXT);"
        )
        base.execute("BEGIN")
        for one in walk_members(root):
            if isinstance(one, Rejected):
                base.execute("INSERT INTO rejected VALUES (?, ?)", (one.path, one.reason))
            else:
                base.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?)", astuple(one))
        base.execute(
            "INSERT INTO twice SELECT place FROM (SELECT rowid AS place, LEAD(rowid) OVER "
            "(PARTITION BY file, label ORDER BY first) AS later FROM found WHERE label != '') "
            "WHERE later IS NOT NULL"
        )
        query = "SELECT file || label, ? FROM found JOIN twice ON found.rowid = place"
        base.execute(f"INSERT INTO rejected {query}", (SAME_NAME,))
        base.execute(
            f"CREATE TABLE files AS SELECT {COLUMNS} FROM found WHERE rowid NOT IN twice "
            "ORDER BY file, first"
        )
        base.execute("DROP TABLE found")
        rows = base.execute(f"SELECT {COLUMNS} FROM files ORDER BY rowid")
        base.executemany("INSERT INTO parts VALUES (?, ?, ?)", map(astuple, _cut(rows, size)))
        base.execute("CREATE INDEX by_images ON parts (listed)")
        base.execute("COMMIT")
        require_some(base, "files", root)


def _cut(rows: Iterator[tuple[object, ...]], size: int) -> Iterator[Part]:
    first, digest = 1, hashlib.sha256()
    place = 0
    for place, row in enumerate(rows, 1):
        if place > first and (place - first == size or _begins(f"{row[0]}{row[1]}", size)):
            yield Part(first, place - first, digest.hexdigest())
            first, digest = place, hashlib.sha256()
        digest.update(repr(row).encode())
    if place:
        yield Part(first, place - first + 1, digest.hexdigest())


def _begins(path: str, size: int) -> bool:
    """Whether a part begins with this path, as one of `size` / 2 paths does."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % max(1, size // 2) == 0


def require_some(base: sqlite3.Connection, table: str, root: str | Path) -> int:
    """How many rows a table of images has.

    Raises:
        NoImageError: if it has none. The message has the most frequent reason of those in the
            table `rejected`, and a path that has it.
    """
    ((count,),) = base.execute(f"SELECT COUNT(*) FROM {table}")
    if count:
        return int(count)
    found = base.execute(
        "SELECT reason, COUNT(*), MIN(path) FROM rejected GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 1"
    ).fetchone()
    why = ""
    if found:
        reason, times, path = found
        more = f" and of {times - 1} more" if times > 1 else ""
        why = f"; this is said of {path}{more}: {reason}"
    raise NoImageError(f"no file in {root} can be used as an image{why}; give another folder")
