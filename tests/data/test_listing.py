"""The list of a pile of images."""

import os
import sqlite3
import sys
from contextlib import closing

import pytest

from weighmatch.data import listing
from weighmatch.data.listing import PileList, make_base, write_list
from weighmatch.data.members import Member


def list_files(monkeypatch, path, names, size):
    members = [Member(name, "", 0, 0, 1, 1) for name in names]
    monkeypatch.setattr(listing, "walk_members", lambda root: iter(members))
    write_list(path, "", size)
    found = PileList(path)
    return [found.part(number) for number in range(len(found))], found


@pytest.mark.parametrize("size", [1, 2, 50, 10_000])
def test_parts_have_every_file_once_in_order(tmp_path, monkeypatch, size):
    names = [f"{k:04d}.png" for k in range(2000)]
    parts, found = list_files(monkeypatch, tmp_path / "list", names[::-1], size)
    assert [member.path for part in parts for member in found.members(part)] == names
    assert max(part.count for part in parts) <= size
    assert [found.number_of(part.listed) for part in parts] == list(range(len(parts)))
    assert found.count() == 2000
    assert [member.path for member in found.rows([1, 7, 2000])] == [
        "0000.png",
        "0006.png",
        "1999.png",
    ]


def test_a_file_changes_the_parts_around_it_alone(tmp_path, monkeypatch):
    names = [f"{k:04d}.png" for k in range(2000)]
    before, _ = list_files(monkeypatch, tmp_path / "list", names, 50)
    for change in (["0000a.png", *names], names[:1000] + names[1001:]):
        after, _ = list_files(monkeypatch, tmp_path / "list", change, 50)
        new = {part.listed for part in after} - {part.listed for part in before}
        assert 1 <= len(new) <= 5 < len(after) / 10


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the open files of a process")
def test_a_data_base_sorts_in_its_own_folder(tmp_path):
    place = tmp_path / "it's here"
    place.mkdir()
    opened = set()

    def look():
        for number in os.listdir("/proc/self/fd"):
            try:
                opened.add(os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                continue

    with closing(make_base(place / "base")) as base:
        base.execute("PRAGMA cache_size=-100")
        base.execute("CREATE TABLE a (x TEXT)")
        rows = ((os.urandom(500).hex(),) for _ in range(3000))
        base.execute("BEGIN")
        base.executemany("INSERT INTO a VALUES (?)", rows)
        base.execute("COMMIT")
        base.set_progress_handler(look, 5000)
        base.execute("CREATE TABLE b AS SELECT x FROM a ORDER BY x")
    temporary = {path for path in opened if "etilqs" in path}
    assert temporary
    assert all(path.startswith(str(place)) for path in temporary)


def test_nothing_writes_to_a_list(tmp_path, monkeypatch):
    _, found = list_files(monkeypatch, tmp_path / "list", ["a.png"], 5)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        found._ask("DELETE FROM files")
