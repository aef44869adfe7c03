"""Runs on stored features: every arm, resuming, saving, scoring pixels and features alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_sample_images

from weighmatch.arms import all_arms
from weighmatch.export import Portable
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.feature_store import FeatureStore, Recipe
from weighmatch.semisup.parts.feature_classifier import FeatureClassifier
from weighmatch.semisup.parts.views import StoredViews, make_views
from weighmatch.semisup.ranked_pool import describe_pool
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.ranking import rank_early
from weighmatch.semisup.training.schedules import make_schedule

pytestmark = pytest.mark.integration

SETTINGS = {
    "network": "efficientnet_lite0",
    "weights": "packaged",
    "steps": 20,
    "learning_rate": 1.0,
    "batch_size": 4,
    "unlabelled_ratio": 2,
    "threshold": 0.1,
    "distribution_alignment": True,
    "checkpoint_every": 3,
    "device": "cpu",
    "features": {"weak_views": 1, "strong_views": 2},
    "weighting": {"interval": 3, "fit_batch": 8, "warmup": 0.0},
    "ranking": {"steps": 5},
}


@pytest.fixture(scope="module")
def training():
    return TrainingConfig(**SETTINGS)


@pytest.fixture(scope="module")
def images():
    """Patches of two photographs in turn, which a backbone tells apart."""
    noise, patches = np.random.default_rng(1), []
    for _ in range(22):
        for photograph in load_sample_images().images:
            top, left = noise.integers(0, 350), noise.integers(0, 500)
            patches.append(photograph[top : top + 64, left : left + 64].transpose(2, 0, 1))
    return np.stack(patches)


@pytest.fixture(scope="module")
def data(tmp_path_factory, images, training):
    arrays = {
        "labelled_images": images[:8],
        "labels": np.array([0, 1] * 4),
        "unlabelled_images": images[8:],
        "class_names": np.array(["china", "flower"]),
    }
    folder = tmp_path_factory.mktemp("features")
    store = FeatureStore.extract(folder, {"a": arrays}, {}, training, workers=1)
    return TrainingSet(**store.training_set("a", arrays), useful_share=0.5)


def config_of(arm, schedule, training):
    rounds = 2 if schedule == "rounds" else 1
    return RunConfig(arm, 0, training.steps, 2, training, schedule, rounds)


PAIRS = [(arm.name, schedule) for arm in all_arms() for schedule in arm.schedules]


@pytest.mark.parametrize(("arm", "schedule"), PAIRS)
def test_every_arm_trains_on_features(tmp_path, data, images, training, arm, schedule):
    run = make_schedule(config_of(arm, schedule, training)).fit(data, tmp_path)
    assert isinstance(run.classifier, FeatureClassifier)
    scored = run.score(images[:6])
    assert np.isfinite(scored.scores).all()
    assert run.image_shape == (3, 64, 64)
    found = describe_pool(run, data)
    assert found["probabilities"].shape == (36, 2)


def test_a_head_learns_and_scores_features_as_pixels(tmp_path, data, images, training):
    training = replace(training, threshold=0.95, steps=100)
    run = make_schedule(config_of("learned", "rounds", training)).fit(data, tmp_path)
    features = Recipe.of(training, views=False).compute(images)
    by_pixels, by_features = run.score(images), run.score(features)
    np.testing.assert_allclose(by_pixels.probabilities, by_features.probabilities, atol=2e-3)
    np.testing.assert_allclose(by_pixels.scores, by_features.scores, atol=2e-2)
    labels = np.array([0, 1] * 22)
    assert (by_pixels.probabilities.argmax(1) == labels).mean() > 0.8
    run.save(tmp_path / "run.pt")
    again = TrainedRun.load(tmp_path / "run.pt").score(images)
    assert np.array_equal(again.probabilities, by_pixels.probabilities)
    with torch.no_grad():
        probabilities, scores = Portable(run).eval()(torch.from_numpy(images))
    np.testing.assert_allclose(probabilities.numpy(), by_pixels.probabilities, atol=1e-5)
    np.testing.assert_allclose(scores.numpy(), by_pixels.scores, atol=1e-4)


@pytest.mark.parametrize(("arm", "schedule"), [("fixmatch", "online"), ("learned", "rounds")])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, data, training, arm, schedule):
    config = config_of(arm, schedule, training)
    whole = make_schedule(config).fit(data, tmp_path / "whole")

    def interrupt(steps):
        done.append(steps)
        if sum(done) >= 13:
            raise KeyboardInterrupt

    done = []
    with pytest.raises(KeyboardInterrupt):
        make_schedule(config).fit(data, tmp_path / "parts", interrupt)
    parts = make_schedule(config).fit(data, tmp_path / "parts")
    for name, value in whole.classifier.state_dict().items():
        assert torch.equal(value, parts.classifier.state_dict()[name]), name


def test_features_of_another_width_are_refused(tmp_path, data, training):
    run = make_schedule(config_of("fixmatch", "online", training)).fit(data, tmp_path)
    with pytest.raises(ValueError, match="trained on features of width 1280"):
        run.score(np.zeros((2, 1, 64), np.float16))


def test_another_file_of_weights_in_its_place_is_refused(tmp_path, images, training):
    torch.manual_seed(0)
    file = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    training = replace(training, network="torchvision/resnet18", weights=str(file))
    arrays = {
        "labelled_images": images[:4],
        "labels": np.array([0, 1] * 2),
        "unlabelled_images": images[4:8],
    }
    store = FeatureStore.extract(tmp_path / "features", {"a": arrays}, {}, training, workers=1)
    data = TrainingSet(**store.training_set("a", arrays))
    config = replace(config_of("fixmatch", "online", training), steps=2)
    make_schedule(config).fit(data, tmp_path / "runs").save(tmp_path / "run.pt")
    run = TrainedRun.load(tmp_path / "run.pt")
    before = run.score(images[:2])
    torch.save(torchvision.models.resnet18().state_dict(), file)
    with pytest.raises(ValueError, match="other weights of torchvision"):
        run.score(images[:2])
    with pytest.raises(ValueError, match=r"weights\.pth"):
        Portable(run)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), file)
    assert np.array_equal(run.score(images[:2]).probabilities, before.probabilities)


def test_stored_features_need_the_shape_of_their_images():
    features = np.zeros((2, 3, 8), np.float16)
    with pytest.raises(ValueError, match="image_shape"):
        TrainingSet(features, np.array([0, 1]), features)


def test_views_are_drawn_from_their_own_place():
    images = torch.arange(6).view(1, 6, 1).expand(50, 6, 2).half()
    generator = torch.Generator().manual_seed(0)
    views = StoredViews(2, 3)
    assert set(views.plain(images).flatten().tolist()) == {0.0}
    assert set(views.weak(images, generator).flatten().tolist()) == {1.0, 2.0}
    assert set(views.strong(images, generator).flatten().tolist()) == {3.0, 4.0, 5.0}
    alone = StoredViews(0, 0)
    assert torch.equal(alone.weak(images, generator), alone.plain(images))
    assert torch.equal(alone.strong(images, generator), alone.plain(images))


def test_pixels_and_features_have_views_of_their_own(training):
    assert isinstance(make_views(training), StoredViews)
    assert not isinstance(make_views(TrainingConfig()), StoredViews)


def test_an_early_ranking_needs_no_training(data):
    scores = rank_early(data)
    assert scores.shape == (data.pool_size,)
    assert scores.std() > 0
    # An image that is labelled lies nearer than the others of its pool.
    again = replace(data, labelled_images=np.asarray(data.unlabelled_images[data.rows[:8]]))
    assert rank_early(again)[:8].mean() > rank_early(again)[8:].mean()
