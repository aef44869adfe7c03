import json

import numpy as np
import pytest
import torch
from kedro.io import DatasetError
from matplotlib.figure import Figure

from weighmatch.io import CheckpointDataset, FigureDataset, NpzDataset, Partitions


def test_arrays_come_back(tmp_path):
    dataset = NpzDataset(str(tmp_path / "deep" / "a.npz"))
    assert not dataset.exists()
    arrays = {"x": np.arange(6, dtype=np.uint8).reshape(2, 3), "y": np.array([1.5])}
    dataset.save(arrays)
    loaded = dataset.load()
    assert loaded["x"].dtype == np.uint8
    assert all((loaded[k] == arrays[k]).all() for k in arrays)
    assert json.loads(dataset.preview()) == {"x": "uint8 [2, 3]", "y": "float64 [1]"}


def test_a_failed_write_keeps_the_old_file(tmp_path):
    dataset = CheckpointDataset(str(tmp_path / "c.pt"))
    dataset.save({"x": torch.ones(2)})
    with pytest.raises(DatasetError):
        dataset.save({"x": lambda: None})
    assert torch.equal(dataset.load()["x"], torch.ones(2))


def test_equal_checkpoints_have_equal_bytes(tmp_path):
    for name in ("a.pt", "b.pt"):
        CheckpointDataset(str(tmp_path / name)).save({"config": {"seed": 1}, "x": torch.ones(2)})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert json.loads(CheckpointDataset(str(tmp_path / "a.pt")).preview()) == {"seed": 1}


def test_partitions_hold_what_was_saved_last_and_may_be_empty(tmp_path):
    dataset = Partitions(str(tmp_path / "p"), "weighmatch.io.NpzDataset", ".npz")
    assert not dataset.exists()
    with pytest.raises(DatasetError, match="does not exist"):
        dataset.load()
    dataset.save({"b": {"x": np.ones(1)}, "a": {"x": np.zeros(1)}})
    assert list(dataset.load()) == ["a", "b"]
    assert json.loads(dataset.preview())["files"] == ["a", "b"]
    dataset.save({"b": {"x": np.full(1, 7)}})
    assert {k: v["x"][0] for k, v in dataset.load().items()} == {"b": 7}
    dataset.save({})
    assert dataset.exists()
    with pytest.raises(DatasetError, match="p is empty; run the pipeline that makes it"):
        dataset.load()
    place = str(tmp_path / "p")
    assert Partitions(place, "weighmatch.io.NpzDataset", ".npz", may_be_empty=True).load() == {}


def test_figures_are_png_and_repeat(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    first, second = (FigureDataset(str(tmp_path / name)) for name in ("a.png", "b.png"))
    first.save(figure)
    second.save(figure)
    assert first.load().startswith(b"\x89PNG")
    assert first.load() == second.load()
    assert len(first.preview()) > 100


def test_partitions_make_and_load_one_file_at_a_time_where_asked(tmp_path):
    made = []

    def make(k):
        made.append(k)
        assert len(list(tmp_path.rglob("*.npz"))) == k  # those before it are on disk
        return {"x": np.array([k])}

    dataset = Partitions(str(tmp_path / "p"), "weighmatch.io.NpzDataset", ".npz", lazy=True)
    dataset.save({f"run_{k}": lambda k=k: make(k) for k in range(3)})
    assert made == [0, 1, 2]
    loaders = dataset.load()
    (tmp_path / "p" / "run_0.npz").unlink()
    assert loaders["run_2"]()["x"] == 2
    with pytest.raises(DatasetError):
        loaders["run_0"]()
