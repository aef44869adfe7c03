"""What each file of a folder is: labelled, of the pool or for the test.

Either folders say it, `labelled/<class>/…`, `unlabelled/…` and `test/<class>/…`, or a table in the
folder does, `metadata.csv` or `metadata.jsonl`, as Hugging Face's `imagefolder` reads it.
"""

import csv
import io
import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from weighmatch.data.files import Listing, Rejected, list_images
from weighmatch.data.source import UnusableDataError

Place = Literal["test", "labelled", "pool"]
# In the order in which copies count: a test image in the pool is taken out of the pool.
PLACES: tuple[Place, ...] = ("test", "labelled", "pool")
FOLDERS: dict[str, Place] = {
    "labelled": "labelled",
    "labeled": "labelled",
    "unlabelled": "pool",
    "unlabeled": "pool",
    "test": "test",
}
TABLES = ("metadata.csv", "metadata.jsonl")
CURE = (
    "put labelled images into labelled/<class>/ and the others into unlabelled/, or list them in "
    "metadata.csv with the columns file_name and label"
)


@dataclass(frozen=True)
class File:
    """A file that may be an image.

    Attributes:
        path: relative to the root, with "/" between names.
        place: what it is for.
        label: the name of its class, or "" in the pool.
    """

    path: str
    place: Place
    label: str = ""


@dataclass(frozen=True)
class Layout:
    """What a folder says of its files, before one is opened.

    Attributes:
        listing: the files that are to be read, and those that are rejected.
        files: what each path of the listing is, in the same order.
        named: the names of classes that have a folder, labelled images or not.
    """

    listing: Listing
    files: tuple[File, ...]
    named: tuple[str, ...]


def read_layout(root: str | Path) -> Layout:
    """Find out what each file below a folder is.

    Raises:
        UnusableDataError: if that cannot be told; one sentence that names the cure.
    """
    top = Path(root).expanduser()
    if not str(root):
        raise UnusableDataError(
            "data.root is empty; give the folder of your images, as in --params "
            "data.source=folder,data.root=photos"
        )
    if not top.is_dir():
        what = "is not a folder" if top.exists() else "does not exist"
        raise UnusableDataError(f"data.root {root} {what}; give the folder of your images")
    there = {entry.name.lower(): entry.name for entry in top.iterdir()}
    if "labelled" in there or "labeled" in there:
        return _by_folders(top, there)
    for name in TABLES:
        if name in there:
            return _by_table(top, there[name])
    raise UnusableDataError(
        f"{root} has neither a folder labelled nor metadata.csv or metadata.jsonl; {CURE}"
    )


def _by_folders(top: Path, there: dict[str, str]) -> Layout:
    places = {there[name]: place for name, place in FOLDERS.items() if name in there}
    listing = list_images(top, places)
    rejected, files = list(listing.rejected), []
    for path in listing.paths:
        first, *within = path.split("/")
        place = places.get(first)
        if place is None or not within:
            rejected.append(Rejected(path, f"it lies beside {', '.join(sorted(places))}"))
        elif place != "pool" and len(within) < 2:
            cure = f"it lies in no folder of a class; move it to {first}/<class>/"
            rejected.append(Rejected(path, cure))
        else:
            files.append(File(path, place, "" if place == "pool" else _normal(within[0])))
    named = {
        _normal(folder.name)
        for name, place in places.items()
        if place == "labelled" and (top / name).is_dir()
        for folder in (top / name).iterdir()
        if folder.is_dir()
    }
    return _layout(listing, files, rejected, named)


def _by_table(top: Path, table: str) -> Layout:
    listing = list_images(top)
    there = {_normal(path): path for path in listing.paths if path not in TABLES}
    rejected = list(listing.rejected)
    rows: dict[str, set[tuple[Place, str]]] = defaultdict(set)
    for number, row in _rows(top / table):
        if row is None:
            rejected.append(Rejected(f"{table}, line {number}", "it is not a JSON object"))
            continue
        name = str(row.get("file_name") or "").strip().replace("\\", "/")
        path = there.get(_normal(str(PurePosixPath(name))))
        if path is None:
            outside = name.startswith("/") or ".." in name.split("/")
            reason = "leads out of the folder" if outside else "is not there"
            if name not in {one.path for one in listing.rejected}:
                rejected.append(Rejected(name or f"{table}, line {number}", f"it {reason}"))
            continue
        label = _label(row.get("label"))
        split = str(row.get("split") or "").strip().lower()
        tested = split == "test" or (not split and path.startswith("test/"))
        rows[path].add(("pool" if not label else "test" if tested else "labelled", label))
    files = []
    for path in there.values():
        said = rows.get(path, {("pool", "")})
        if len(said) > 1:
            rejected.append(Rejected(path, f"{table} names it more than once, in different ways"))
        else:
            files.append(File(path, *next(iter(said))))
    named = {file.label for file in files if file.label}
    return _layout(listing, files, rejected, named)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The rows of a table, by number of line; None for a line that cannot be read.

    Raises:
        UnusableDataError: if it is no table with a column `file_name`.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableDataError(f"{path.name} is not in UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise UnusableDataError(f"{path.name} cannot be read ({error.strerror})") from error
    columns: set[str] = set()
    if path.suffix == ".csv":
        first = text.partition("\n")[0]
        delimiter = max(",;\t", key=first.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        columns = {str(name).strip() for name in reader.fieldnames or ()}
        try:
            found = [(reader.line_num, {str(k).strip(): v for k, v in r.items()}) for r in reader]
        except csv.Error as error:
            raise UnusableDataError(f"{path.name} is damaged ({error}); save it anew") from error
        rows: list[tuple[int, dict[str, Any] | None]] = list(found)
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                row = _json(line)
                columns |= set(row or ())
                rows.append((number, row))
    if "file_name" not in columns:
        has = ", ".join(sorted(columns)) or "none"
        raise UnusableDataError(f"{path.name} has no column file_name (it has {has}); add it")
    yield from rows


def _json(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _label(value: object) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return _normal(str(value).strip())


def _normal(name: str) -> str:
    """One spelling of letters with accents, which operating systems write in two ways."""
    return unicodedata.normalize("NFC", name)


def _layout(
    listing: Listing, files: list[File], rejected: list[Rejected], named: set[str]
) -> Layout:
    # Copies count in this order, and within a place in that of their paths.
    files = sorted(files, key=lambda file: (PLACES.index(file.place), file.path))
    paths = tuple(file.path for file in files)
    ordered = tuple(sorted(rejected, key=lambda one: one.path))
    return Layout(Listing(listing.root, paths, ordered), tuple(files), tuple(sorted(named)))
