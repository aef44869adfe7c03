"""Records: files are whole, and datasets belong together."""

import json
import os

import numpy as np
import pytest

from weighmatch.io import NpzDataset, Partitions
from weighmatch.io.files import UnfitFileError, remove_orphans, sha256_of, write_atomically
from weighmatch.io.provenance import (
    Record,
    Records,
    files_of,
    require_together,
    require_whole,
)


def flip_a_bit(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture
def parts(tmp_path):
    dataset = Partitions(str(tmp_path / "p"), "weighmatch.io.NpzDataset", ".npz")
    dataset.save({key: {"x": np.arange(5)} for key in "ab"})
    return dataset


def record_of(dataset, **more):
    return Record("numbers", "counting", "counting.count", files_of(dataset), **more)


def test_times_of_files_do_not_matter(parts, tmp_path):
    record = record_of(parts)
    for path in (tmp_path / "p").iterdir():
        os.utime(path, (0, 0))
    assert require_whole(parts, record) is None


@pytest.mark.parametrize("position", [0, 40, -1])
def test_a_flipped_bit_is_named(parts, tmp_path, position):
    record = record_of(parts)
    flip_a_bit(tmp_path / "p" / "b.npz", position)
    with pytest.raises(UnfitFileError, match=r"p/b\.npz is not as it was written"):
        require_whole(parts, record)
    with pytest.raises(Exception, match=r"p/b\.npz is not as it was written"):
        parts.load()


def test_a_missing_file_is_named(parts, tmp_path):
    record = record_of(parts)
    (tmp_path / "p" / "a.npz").unlink()
    with pytest.raises(UnfitFileError, match=r"p/a\.npz is missing"):
        require_whole(parts, record)


def test_a_file_of_the_users_is_neither_loaded_nor_removed(parts, tmp_path, caplog):
    mine = tmp_path / "p" / "mine.npz"
    np.savez(mine, x=np.ones(1))
    require_whole(parts, record_of(parts))
    assert set(parts.load()) == {"a", "b"}
    assert "p/mine.npz is none of the files that were saved there" in caplog.text
    parts.save({"a": {"x": np.zeros(1)}})
    assert {path.name for path in (tmp_path / "p").glob("*.npz")} == {"a.npz", "mine.npz"}


def test_saving_that_is_cut_off_is_seen_and_made_good(parts, tmp_path):
    record = record_of(parts)

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.save({"b": {"x": np.zeros(2)}, "c": {"x": np.zeros(2)}, "d": fail})
    with pytest.raises(UnfitFileError, match=r"the writing of .*p was cut off"):
        require_whole(parts, record)
    parts.save({"a": {"x": np.zeros(1)}})
    assert {path.name for path in (tmp_path / "p").glob("*.npz")} == {"a.npz"}
    assert list(parts.load()) == ["a"]


def test_partitions_that_were_saved_without_a_record_are_refused(parts):
    record = record_of(parts)
    parts.save({"a": {"x": np.arange(5)}})
    with pytest.raises(UnfitFileError, match=r"p/b\.npz is missing"):
        require_whole(parts, record)
    with pytest.raises(UnfitFileError, match="was not finished"):
        require_whole(parts, None)


def test_single_files_are_checked(tmp_path):
    dataset = NpzDataset(str(tmp_path / "x.npz"))
    with pytest.raises(UnfitFileError, match=r"x\.npz does not exist"):
        require_whole(dataset, None)
    dataset.save({"x": np.arange(3)})
    record = record_of(dataset)
    require_whole(dataset, record)
    flip_a_bit(tmp_path / "x.npz")
    with pytest.raises(UnfitFileError, match=r"x\.npz is not as it was written"):
        require_whole(dataset, record)


def test_records_come_back_and_a_damaged_one_is_named(tmp_path):
    records = Records(tmp_path)
    record = Record("a", "first", "n", {"x": "1"}, {"params:data": "2"}, "3", {"b": "4"})
    records.write(record)
    assert records.read("a") == record
    assert records.read("b") is None
    records.write(Record("a", "second", "n", {"x": "1"}))  # another pipeline makes it now
    assert records.read("a").pipeline == "second"
    records.write(record)
    path = records.path("first", "a")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "code": "0"}))
    with pytest.raises(UnfitFileError, match=r"first/a\.json is damaged"):
        records.read("a")
    path.write_text("[")
    with pytest.raises(UnfitFileError, match=r"first/a\.json is damaged"):
        records.read("a")


# --- what belongs together -------------------------------------------------------------------


EDGES = {
    "pool": ["images"],
    "truth": ["images"],
    "model": ["pool"],
    "scores": ["pool"],
    "table": ["model", "truth"],
}
PIPELINES = {
    "images": "preparation",
    "pool": "preparation",
    "truth": "preparation",
    "model": "training",
    "scores": "scoring",
    "table": "evaluation",
}


class Graph:
    """images -> pool, truth (one node) -> model -> table; model and truth -> table."""

    def __init__(self, folder):
        self.records = Records(folder)

    def make(self, name, content, parameter="x"):
        inputs = {n: self.records.read(n).digest for n in EDGES.get(name, [])}
        ancestors = {}
        for other in inputs:
            ancestors.update(self.records.read(other).ancestors)
        node = "draw" if name in ("pool", "truth") else name
        record = Record(
            name,
            PIPELINES[name],
            node,
            {name: content},
            {"params:data": parameter},
            "code",
            inputs,
            {**ancestors, **inputs},
        )
        self.records.write(record)

    def refusal(self, *names, remade=()):
        try:
            require_together(names, self.records, remade)
        except UnfitFileError as error:
            return str(error)
        return ""


@pytest.fixture
def graph(tmp_path):
    graph = Graph(tmp_path)
    for name in ("images", "pool", "truth", "model", "table"):
        graph.make(name, "1")
    return graph


def test_what_was_made_in_one_go_belongs_together(graph):
    assert not graph.refusal("pool", "truth")
    assert not graph.refusal("table", "truth")


def test_the_same_content_made_again_belongs_together(graph):
    graph.make("pool", "1", parameter="y")
    graph.make("truth", "1", parameter="y")
    assert not graph.refusal("model", "truth")


def test_new_data_under_an_old_model_are_refused(graph):
    for name in ("pool", "truth"):
        graph.make(name, "2", parameter="y")
    text = "the dataset model was made from other pool than lie in the data folder"
    assert graph.refusal("model", "truth") == f"{text}; run the pipeline training again"
    assert graph.refusal("table") == f"{text}; run the pipelines training and evaluation again"
    assert not graph.refusal("pool", "truth")
    # What this run makes anew does not count before it is made.
    assert not graph.refusal("model", remade=("pool", "truth", "images"))


def test_a_preparation_that_was_killed_half_way_is_seen(graph):
    graph.make("pool", "2", parameter="y")
    assert graph.refusal("pool", "truth") == (
        "pool and truth are of two different runs of the pipeline preparation; run the pipeline "
        "preparation again"
    )
    assert "run the pipelines preparation, training and evaluation again" in graph.refusal("table")


def test_datasets_of_an_ancestor_that_is_gone_are_compared(graph):
    graph.make("pool", "2", parameter="y")
    graph.make("scores", "1")
    for name in ("pool", "images", "truth"):
        graph.records.path("preparation", name).unlink()
    assert graph.refusal("model", "scores") == (
        "model and scores were made from different pool; run the pipeline scoring again"
    )


# --- files -----------------------------------------------------------------------------------


def test_checksums_follow_the_content(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"1")
    before = sha256_of(path)
    flip_a_bit(path)
    assert sha256_of(path) != before


def test_partial_files_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    (tmp_path / "deep").mkdir()
    dead, alive = tmp_path / "deep" / "x.npz.4194999.partial", tmp_path / f"y.{os.getpid()}.partial"
    dead.touch()
    alive.touch()
    assert remove_orphans([tmp_path]) == [dead]
    assert alive.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def write(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "x", write)
    assert not list(tmp_path.iterdir())
