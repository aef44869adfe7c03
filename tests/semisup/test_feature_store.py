"""Stored features of a frozen backbone: computed once, resumed, changed, damaged."""

import logging

import numpy as np
import pytest
import torch

from weighmatch.semisup import feature_store
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.feature_store import CHUNK, FeatureStore, Recipe, with_features, with_rows
from weighmatch.semisup.parts.backbones import load_backbone
from weighmatch.semisup.parts.state_file import DamagedFileError

pytestmark = pytest.mark.integration

WIDTH = 1280


def settings(**changes):
    given = {
        "network": "efficientnet_lite0",
        "weights": "packaged",
        "augmentation": {"flip": True},
        "features": {"weak_views": 1, "strong_views": 2},
    }
    return TrainingConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)


def sets(images):
    return {
        "a": {"labelled_images": images[:4], "unlabelled_images": images[4:], "labels": LABELS},
        "b": {"labelled_images": images[2:6], "unlabelled_images": images[4:], "labels": LABELS},
    }


LABELS = np.array([0, 0, 1, 1])


@pytest.fixture
def computed(monkeypatch):
    """The images that were computed in this process, in order."""
    seen = []
    original = Recipe.compute

    def compute(self, images):
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Recipe, "compute", compute)
    monkeypatch.setattr(feature_store, "_announce", lambda *given: None)
    return seen


def extract(folder, images, **changes):
    evaluation = {"a": {"test_images": images[:3]}}
    return FeatureStore.extract(folder, sets(images), evaluation, settings(**changes), workers=1)


def test_features_are_those_of_the_backbone(tmp_path, images):
    store = extract(tmp_path, images)
    arrays = store.training_set("a", sets(images)["a"])
    assert arrays["labelled_images"].shape == (4, 4, WIDTH)
    assert arrays["image_shape"].tolist() == [3, 32, 32]
    backbone = load_backbone("efficientnet_lite0", "packaged")
    plain = backbone(torch.from_numpy(images).float() / 255).detach()
    stored = torch.from_numpy(np.array(arrays["unlabelled_images"][arrays["rows"]])).float()
    torch.testing.assert_close(stored[:, 0], plain[4:], rtol=2e-3, atol=2e-3)
    assert (stored[:, 2] - stored[:, 3]).norm(dim=1).min() > 0.1  # strong views differ
    seen = store.evaluation_images("a", "test_images")
    assert seen.shape == (3, 1, WIDTH)
    torch.testing.assert_close(
        torch.from_numpy(np.array(seen[:, 0])).float(), plain[:3], rtol=2e-3, atol=2e-3
    )


def test_an_image_of_several_sets_is_computed_once(tmp_path, images, computed):
    extract(tmp_path, images)
    assert sum(computed) == len(images) + 3  # three once more without views, to be tested on


def test_nothing_is_computed_again(tmp_path, images, computed):
    before = extract(tmp_path, images).training_set("b", sets(images)["b"])
    computed.clear()
    after = extract(tmp_path, images).training_set("b", sets(images)["b"])
    assert not computed
    assert np.array_equal(before["unlabelled_images"], after["unlabelled_images"])
    assert np.array_equal(before["rows"], after["rows"])


def test_new_images_alone_are_computed_and_views_are_those_of_a_fresh_store(
    tmp_path, images, computed
):
    extract(tmp_path / "one", images[:30])
    computed.clear()
    store = extract(tmp_path / "one", images)
    assert sum(computed) == 10
    fresh = extract(tmp_path / "two", images)
    for key, arrays in sets(images).items():
        mine, other = store.training_set(key, arrays), fresh.training_set(key, arrays)
        np.testing.assert_allclose(
            mine["unlabelled_images"][mine["rows"]],
            other["unlabelled_images"][other["rows"]],
            rtol=2e-3,
            atol=2e-3,
        )


def test_a_killed_computation_goes_on_where_it_stopped(tmp_path, images, computed, monkeypatch):
    whole = extract(tmp_path / "whole", images).training_set("a", sets(images)["a"])
    computed.clear()
    write, calls = feature_store.write_rows, []

    def write_once(data, index, contents, features):
        if calls:
            data.write(b"half a row")
            data.flush()
            raise KeyboardInterrupt
        calls.append(1)
        write(data, index, contents, features)

    monkeypatch.setattr(feature_store, "write_rows", write_once)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "killed", images)
    monkeypatch.setattr(feature_store, "write_rows", write)
    computed.clear()
    store = extract(tmp_path / "killed", images)
    assert sum(computed) == len(images) - CHUNK + 3
    again = store.training_set("a", sets(images)["a"])
    assert np.array_equal(again["unlabelled_images"], whole["unlabelled_images"])


@pytest.mark.parametrize("changes", [{"features": {"weak_views": 0}}, {"augmentation": {}}])
def test_other_views_replace_what_was_there(tmp_path, images, computed, changes):
    extract(tmp_path, images)
    computed.clear()
    extract(tmp_path, images, **changes)
    assert sum(computed) >= len(images)


def test_a_file_of_weights_counts_by_its_content(tmp_path, images, computed):
    from torchvision.models import resnet18

    file = tmp_path / "weights.pth"
    backbone = {"network": "torchvision/resnet18", "weights": str(file)}

    def computed_with(seed):
        computed.clear()
        torch.manual_seed(seed)
        torch.save(resnet18().state_dict(), file)
        extract(tmp_path / "features", images, **backbone)
        return sum(computed)

    assert computed_with(seed=0) == computed_with(seed=1) == len(images) + 3
    assert computed_with(seed=1) == 0


def test_a_damaged_row_is_computed_again(tmp_path, images, caplog):
    before = np.array(extract(tmp_path, images)._trained.features())
    path = tmp_path / "trained.features"
    content = bytearray(path.read_bytes())
    content[5 * before[0].nbytes + 100] ^= 64
    path.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        after = extract(tmp_path, images)._trained.features()
    assert "1 rows of" in caplog.text
    assert "damaged" in caplog.text
    np.testing.assert_allclose(before, after, rtol=2e-3, atol=2e-3)


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def empty(content):
    return b""


@pytest.mark.parametrize("damage", [cut, flip, empty])
@pytest.mark.parametrize("name", ["trained.features", "trained.index", "trained.json", "rows.npz"])
def test_any_damaged_file_is_mended_by_the_next_computation(tmp_path, images, name, damage):
    before = extract(tmp_path, images).training_set("a", sets(images)["a"])
    whole = np.array(before["unlabelled_images"][before["rows"]])
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    after = extract(tmp_path, images).training_set("a", sets(images)["a"])
    np.testing.assert_allclose(
        after["unlabelled_images"][after["rows"]], whole, rtol=2e-3, atol=2e-3
    )
    assert np.array_equal(after["labels"], LABELS)


@pytest.mark.parametrize("damage", [cut, empty])
@pytest.mark.parametrize("name", ["trained.features", "trained.json", "rows.npz"])
def test_damaged_files_are_named_where_they_are_read(tmp_path, images, name, damage):
    extract(tmp_path, images)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(DamagedFileError, match="run the pipeline feature_extraction"):
        FeatureStore(tmp_path).training_set("a", sets(images)["a"])


def test_workers_give_what_one_process_gives(tmp_path, images):
    one = extract(tmp_path / "one", images)
    arrays = sets(images)
    two = FeatureStore.extract(tmp_path / "two", arrays, {}, settings(), workers=2)
    assert np.array_equal(one._trained.features(), two._trained.features())


def test_a_folder_without_features_is_named_with_the_cure(tmp_path):
    with pytest.raises(DamagedFileError, match="run the pipeline feature_extraction"):
        FeatureStore(tmp_path)


def test_sets_that_were_not_extracted_are_named(tmp_path, images):
    store = extract(tmp_path, images)
    with pytest.raises(DamagedFileError, match="no features of labelled_images of the set c"):
        store.training_set("c", sets(images)["a"])


def test_a_cleared_folder_is_empty(tmp_path, images):
    extract(tmp_path, images)
    FeatureStore.clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_trained_network_has_no_features(tmp_path, images):
    assert with_features(sets(images), tmp_path).keys() == sets(images).keys()


def test_a_part_of_a_pool_is_named_by_its_rows(tmp_path, images):
    arrays = extract(tmp_path, images).training_set("a", sets(images)["a"])
    part = with_rows(arrays, np.array([3, 1]))
    assert np.array_equal(part["rows"], arrays["rows"][[3, 1]])
    assert with_rows({"labels": LABELS}, np.array([2]))["rows"].tolist() == [2]
