"""The register of sources, and what becomes of a source that knows little."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from weighmatch.data.config import DataConfig
from weighmatch.data.grid import GridConfig, make_cells
from weighmatch.data.source import Source, all_sources, get_source, register, unregister
from weighmatch.data.splits import Splits, Unlabelled
from weighmatch.io import NpzDataset
from weighmatch.pipelines.data_preparation import nodes


@dataclass(frozen=True)
class FoundParameters:
    root: str = "photos"
    side: int = 12

    def __post_init__(self):
        if not self.root:
            raise ValueError("data.root must name a folder")


@pytest.fixture
def found():
    """A source of colour images as they are found: no truth, no test set, nothing held out."""

    @register
    class Found(Source[FoundParameters]):
        name = "found"
        parameters = FoundParameters
        contaminates = False

        def class_names(self, config):
            return ("cat", "größerer Hund")

        def load(self, config):
            own = self.own(config)
            images = np.arange(9, dtype=np.uint8)[:, None, None, None]
            return {own.root: np.broadcast_to(images, (9, 3, own.side, own.side))}

        def draw(self, raw, config, seed):
            images = raw[self.own(config).root]
            labels = np.array([0, 1], np.int64)
            return Splits(images[:2], labels, self.class_names(config), Unlabelled(images[2:]))

    yield Found
    unregister("found")


def test_every_file_of_the_package_is_registered():
    names = {source.name for source in all_sources()}
    assert names == {"digits", "folder", "glyphs", "stl10", "torchvision"}
    # A start of the project imports every source, so none of them may import what is slow.
    slow = ("torch", "sklearn", "matplotlib", "PIL", "pandas")
    code = f"import sys, weighmatch.data.sources; sys.exit(any(m in sys.modules for m in {slow}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_source_of_a_test_is_found_by_its_name_and_taken_out_again(found):
    config = DataConfig(seeds=[1], source="found", root="mine", ratio=0.9999)
    assert (config.own, config.classes) == (FoundParameters("mine"), 2)
    assert config.parameters()["root"] == "mine"
    with pytest.raises(ValueError, match="there is a source 'found' already"):
        register(found)
    with pytest.raises(ValueError, match=r"data\.root must name a folder"):
        DataConfig(seeds=[1], root="")
    with pytest.raises(TypeError, match="of the source found, not digits"):
        get_source("digits").class_names(config)
    unregister("found")
    with pytest.raises(ValueError, match="'found' is unknown; choose from digits, folder"):
        DataConfig(seeds=[1], source="found")


@pytest.mark.usefixtures("found")
def test_a_source_without_truth_and_test_set_is_drawn(tmp_path):
    data = DataConfig(seeds=[1, 2], source="found")
    raw = nodes.load_images(GridConfig(), data)
    training, evaluation, truth, labels, manifest, files, rejected = nodes.draw_splits(
        raw, GridConfig(), data
    )
    assert rejected.empty
    assert files.groupby(["key", "split"]).size().tolist() == [2, 7, 2, 7]
    assert list(training) == ["found-seed_0001", "found-seed_0002"]
    assert evaluation == {key: {} for key in training}
    assert (truth, labels) == ({}, {})
    described = manifest["cells"][0]
    assert described["pool"] == {"images": 7}
    assert (described["heldout"], described["test"]) == ({"images": 0}, 0)
    assert (described["ratio"], described["regime"]) == (None, None)
    dataset = NpzDataset(str(tmp_path / "set.npz"))
    dataset.save(training["found-seed_0002"])
    assert dataset.load()["class_names"].tolist() == ["cat", "größerer Hund"]
    figure = nodes.draw_samples(training, truth)
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == [
        "labelled",
        "unlabelled",
    ]
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(shown[2], training["found-seed_0001"]["unlabelled_images"][0].T)
    with pytest.raises(ValueError, match=r"no effect with data\.source found, whose pool is as it"):
        make_cells(GridConfig(ratios=[0.5]), data)


def test_settings_that_load_other_images_share_the_raw_file(found):
    grid = GridConfig(settings={"a": {"root": "one"}, "b": {"root": "two", "side": 5}})
    data = DataConfig(seeds=[0], source="found")
    raw = nodes.load_images(grid, data)
    assert {name: array.shape[2] for name, array in raw.items()} == {"one": 12, "two": 5}
    training, *_ = nodes.draw_splits(raw, grid, data)
    assert {key: a["unlabelled_images"].shape[2] for key, a in training.items()} == {
        "a-seed_0000": 12,
        "b-seed_0000": 5,
    }


@pytest.mark.parametrize("source", ["digits", "glyphs"])
def test_no_file_tells_training_what_it_may_not_see(source):
    small = {"pool_size": 40, "heldout_size": 20, "test_size": 30, "ratio": 0.5}
    data = DataConfig(seeds=[3], source=source, ood_source="mix", **small)
    grid = GridConfig(ratios=[0.5, 0.25])
    raw = nodes.load_images(grid, data)
    training, evaluation, truth, labels, manifest, files, _ = nodes.draw_splits(raw, grid, data)
    first, second = manifest["cells"]
    key = first["key"]
    assert (key, second["key"]) == ("mix-r0.5-seed_0003", "mix-r0.25-seed_0003")
    pool = files[(files["key"] == key) & (files["split"] == "pool")]
    assert pool["path"].tolist() == [f"pool/{k:06d}" for k in range(40)]
    assert pool["index"].tolist() == list(range(40))
    tested = files[(files["key"] == key) & (files["split"] == "test")]["label"]
    names = np.array(first["classes"])
    np.testing.assert_array_equal(tested, names[labels[key]["labels"]])
    seen = {"labelled_images", "labels", "unlabelled_images", "class_names"}
    assert set(training[key]) == seen
    assert set(evaluation[key]) == {"test_images", "heldout_images"}
    assert set(labels[key]) == {"labels", "shifted"}
    rows = [axes.get_ylabel() for axes in nodes.draw_samples(training, truth).axes]
    assert sum(map(bool, rows)) == 5
    splits = get_source(source).draw(raw, data, 3)
    for place in ("pool", "heldout"):
        part = getattr(splits, place)
        images = training[key] if place == "pool" else evaluation[key]
        name = {"pool": "unlabelled_images", "heldout": "heldout_images"}[place]
        np.testing.assert_array_equal(images[name], part.images)
        for what in ("kinds", "classes", "shifted"):
            found = truth[key].pop(f"{place}_{what}".replace("kinds", "sources"))
            np.testing.assert_array_equal(found, getattr(part, what))
    assert truth[key] == {}
    np.testing.assert_array_equal(labels[key]["labels"], splits.test_labels)
    np.testing.assert_array_equal(evaluation[key]["test_images"], splits.test_images)
    assert set(first["fingerprints"]) == seen | set(evaluation[key])
    assert first["pool"]["by_source"] == {"id": 20, "unseen": 7, "patches": 7, "noise": 6}
