import json
import pickle

import numpy as np
import pytest
from kedro.io import DatasetError
from matplotlib.figure import Figure

from weighmatch.io import CheckpointDataset, FigureDataset, FigureFolder, NpzDataset, Partitions
from weighmatch.io.files import UnfitFileError
from weighmatch.io.provenance import Record, require_whole
from weighmatch.semisup import TrainingSet, make_schedule


def test_arrays_come_back(tmp_path):
    dataset = NpzDataset(str(tmp_path / "deep" / "a.npz"))
    assert not dataset.exists()
    arrays = {"x": np.arange(6, dtype=np.uint8).reshape(2, 3), "y": np.array([1.5])}
    dataset.save(arrays)
    loaded = dataset.load()
    assert loaded["x"].dtype == np.uint8
    assert all((loaded[k] == arrays[k]).all() for k in arrays)
    assert json.loads(dataset.preview()) == {"x": "uint8 [2, 3]", "y": "float64 [1]"}


@pytest.fixture
def trained(training_set, run_config, tmp_path):
    """A run of a few steps."""
    config = run_config("fixmatch", steps=4)
    return make_schedule(config).fit(training_set, tmp_path / "training")


def test_a_failed_write_keeps_the_old_file(tmp_path, trained, monkeypatch):
    dataset = CheckpointDataset(str(tmp_path / "c.pt"))
    dataset.save(trained)
    monkeypatch.setattr(trained, "classifier", None)
    with pytest.raises(DatasetError):
        dataset.save(trained)
    assert dataset.load().config.arm == "fixmatch"


def test_a_trained_run_comes_back_as_it_was(tmp_path, trained, training_set):
    dataset = CheckpointDataset(str(tmp_path / "deep" / "a.pt"))
    assert not dataset.exists()
    dataset.save(trained)
    assert dataset.exists()
    images = training_set.unlabelled_images
    before, after = trained.score(images), dataset.load().score(images)
    for name in ("probabilities", "scores", "weights"):
        assert (getattr(before, name) == getattr(after, name)).all()
    assert json.loads(dataset.preview())["seed"] == 0


def test_a_damaged_run_is_refused(tmp_path, trained):
    path = tmp_path / "a.pt"
    CheckpointDataset(str(path)).save(trained)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.pt"):
        CheckpointDataset(str(path)).load()


def test_equal_runs_have_equal_bytes(tmp_path, trained):
    for name in ("a.pt", "b.pt"):
        CheckpointDataset(str(tmp_path / name)).save(trained)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


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
    folder = FigureFolder(str(tmp_path / "folder"))
    folder.save({"a": figure, "b": figure})
    assert folder.preview() == first.preview()
    assert folder.load() == {"a": first.load(), "b": second.load()}


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
    with pytest.raises(UnfitFileError, match=r"run_0.npz is missing"):
        loaders["run_0"]()


# --- arrays that several files share ---------------------------------------------------------


@pytest.fixture
def sets(tmp_path):
    """A folder of sets that are folds of one pool of 2 MiB, and what was saved there."""
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (2048, 1, 32, 32), np.uint8)
    saved = {
        f"folder-seed_{k}": {"labels": np.arange(k), "unlabelled_images": pool} for k in range(7)
    }
    dataset = Partitions(str(tmp_path / "sets"), "weighmatch.io.NpzDataset", ".npz")
    dataset.save(saved)
    return dataset, saved


def shared_files(folder):
    return sorted(path.name for path in folder.glob("shared-*"))


def test_a_pool_of_several_sets_is_stored_once(sets, tmp_path):
    dataset, saved = sets
    sizes = [path.stat().st_size for path in (tmp_path / "sets").iterdir()]
    pool = saved["folder-seed_0"]["unlabelled_images"]
    assert pool.nbytes < sum(sizes) < pool.nbytes + 20_000
    (name,) = shared_files(tmp_path / "sets")
    assert name in dataset.files()
    loaded = dataset.load()
    assert list(loaded) == list(saved)
    for key, arrays in saved.items():
        assert list(loaded[key]) == ["labels", "unlabelled_images"]
        for part, array in arrays.items():
            np.testing.assert_array_equal(loaded[key][part], array)
    maps = [arrays["unlabelled_images"] for arrays in loaded.values()]
    assert all(isinstance(one, np.memmap) and one is maps[0] for one in maps)
    # So it travels to processes as the name of its file.
    given = TrainingSet(np.zeros((1, 1, 32, 32), np.uint8), np.zeros(1, int), maps[0])
    assert len(pickle.dumps(given)) < 5_000
    assert json.loads(dataset.preview())["first"]["unlabelled_images"]
    assert json.loads(dataset.preview())["files"] == list(saved)


def test_arrays_that_are_small_or_in_one_set_alone_stay_in_its_file(sets, tmp_path):
    dataset, saved = sets
    pool = saved["folder-seed_0"]["unlabelled_images"]
    labels = np.arange(7)
    dataset.save({"a": {"x": pool, "y": labels}, "b": {"x": pool + 1, "y": labels}})
    # Nothing refers to the shared file any more.
    assert shared_files(tmp_path / "sets") == []
    assert sorted(dataset.files()) == ["a.npz", "b.npz"]
    np.testing.assert_array_equal(dataset.load()["b"]["x"], pool + 1)


def test_a_shared_file_that_is_damaged_or_missing_is_named_and_made_again(sets, tmp_path):
    dataset, saved = sets
    (name,) = shared_files(tmp_path / "sets")
    path = tmp_path / "sets" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"{name} is not as it was written.*; run the pipel"):
        dataset.load()
    with pytest.raises(UnfitFileError, match=name):
        require_whole(dataset, Record("sets", "p", "n", dataset.files()))
    dataset.save(saved)
    assert dataset.load()["folder-seed_6"]["unlabelled_images"][-1, -1, -1, -1] == content[-1] ^ 1
    path.unlink()
    with pytest.raises(DatasetError, match=f"{name} is missing"):
        dataset.load()


def test_what_was_loaded_can_be_saved_again(sets, tmp_path):
    dataset, saved = sets
    written = shared_files(tmp_path / "sets")
    loaded = dataset.load()
    dataset.save({key: loaded[key] for key in list(saved)[:2]})
    assert shared_files(tmp_path / "sets") == written
    assert len(dataset.load()) == 2
    pool = saved["folder-seed_0"]["unlabelled_images"]
    for arrays in dataset.load().values():
        np.testing.assert_array_equal(arrays["unlabelled_images"], pool)
