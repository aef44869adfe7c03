"""What is chosen for images as they are found."""

import pytest

from weighmatch.data import recipes
from weighmatch.data.recipes import BACKBONE, EXTENTS, make_recipe
from weighmatch.data.source import Wishes
from weighmatch.semisup.config import RunsConfig, TrainingConfig

PHOTOGRAPHS = (3, 32, 32)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(recipes, "backbone_available", lambda network, weights: True)
    monkeypatch.setattr(recipes.os, "cpu_count", lambda: 2)


def checked(recipe):
    RunsConfig(**recipe["runs"])
    return TrainingConfig(**recipe["training"])


def test_photographs_get_a_frozen_backbone_where_it_is_installed(installed):
    recipe = make_recipe(PHOTOGRAPHS, pool=3000)
    training = checked(recipe)
    assert training.frozen
    assert training.network == BACKBONE
    assert training.augmentation.flip
    assert recipe["data"]["size"] == 128
    assert len(recipe["data"]["seeds"]) == 16
    assert (training.features.weak_views, training.features.strong_views) == (2, 4)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 28, 28), (3, 8, 8)])
def test_grey_and_small_images_are_trained_from_scratch(installed, shape):
    recipe = make_recipe(shape, pool=3000)
    assert not checked(recipe).frozen
    assert "data" not in recipe


def test_without_the_extra_photographs_are_trained_from_scratch(monkeypatch):
    monkeypatch.setattr(recipes, "backbone_available", lambda network, weights: False)
    recipe = make_recipe(PHOTOGRAPHS, pool=3000)
    assert checked(recipe).network == "small_cnn"
    assert "data" not in recipe


def test_another_network_that_is_asked_for_is_not_given_the_weights(installed):
    training = checked(make_recipe(PHOTOGRAPHS, 3000, wishes=Wishes("wrn_28_2")))
    assert training.weights == "none"


def test_a_network_whose_weights_are_asked_for_is_frozen_like_the_packaged_one(monkeypatch):
    # What is asked for is laid over the recipe.
    wishes = Wishes("torchvision/resnet18", "resnet18.pth")
    recipe = make_recipe(PHOTOGRAPHS, 3000, wishes=wishes)
    assert recipe["data"]["size"] == 128
    assert checked(recipe).learning_rate == 1.0
    monkeypatch.setattr(recipes, "backbone_available", lambda network, weights: False)
    assert "data" not in make_recipe(PHOTOGRAPHS, 3000, wishes=wishes)


@pytest.mark.parametrize("weights", ["none", 5])
def test_without_names_of_weights_a_network_is_trained_from_scratch(installed, weights):
    recipe = make_recipe(PHOTOGRAPHS, 3000, wishes=Wishes("efficientnet_lite0", weights))
    assert "data" not in recipe
    assert checked(recipe).weights == "none"


def test_a_network_that_is_trained_further_has_no_stored_features(installed):
    recipe = make_recipe(PHOTOGRAPHS, 3000, wishes=Wishes(fine_tuned=True))
    training = checked({**recipe, "training": {**recipe["training"], "fine_tune": "last"}})
    assert training.weights == "packaged"
    assert training.learning_rate < 1
    assert "features" not in recipe["training"]


@pytest.mark.parametrize(
    ("pool", "seconds", "extent"),
    [(3_000, None, EXTENTS[0]), (100_000, None, EXTENTS[4]), (3_000, 60.0, EXTENTS[3]),
     (10_000_000, None, EXTENTS[-1])],
)  # fmt: skip
def test_size_and_views_follow_the_number_of_images_and_the_time(installed, pool, seconds, extent):
    recipe = make_recipe(PHOTOGRAPHS, pool, wishes=Wishes(seconds=seconds))
    features = checked(recipe).features
    found = (recipe["data"]["size"], features.weak_views, features.strong_views)
    assert found == extent
    assert ("seeds" in recipe["data"]) == (pool <= 20_000)
