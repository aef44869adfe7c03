"""Runs that train a pretrained network, or a part of it; on a tiny one, whose weights are made."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.semisup.helpers import fit_until_killed, parameters, same
from tests.test_export import compare_elsewhere
from weighmatch.export import export_run
from weighmatch.semisup import TrainedRun, TrainingSet, make_schedule
from weighmatch.semisup.training.config import fingerprint
from weighmatch.semisup.training.loop import Run

pytestmark = pytest.mark.integration

NETWORK = "timm/test_resnet"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The path of a state dict whose BatchNorm has statistics of its own."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model("test_resnet", pretrained=False, num_classes=5)
    for _ in range(20):
        net(torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "test_resnet.pth"
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def colours():
    """Images of 24×20 pixels that differ by their colour."""
    rng = np.random.default_rng(0)

    def draw(labels):
        images = rng.integers(0, 90, (len(labels), 3, 24, 20), dtype=np.uint8)
        images[np.arange(len(labels)), labels] += 120
        return images

    labels = np.arange(12) % 3
    return TrainingSet(draw(labels), labels, draw(np.arange(40) % 3))


@pytest.fixture
def tuned(run_config, weights):
    """Makes the configuration of a short run that fine-tunes."""

    def make(fine_tune="last", **changes):
        settings = {
            "network": NETWORK,
            "weights": weights,
            "fine_tune": fine_tune,
            "steps": 4,
            "snapshots": 1,
            "checkpoint_every": 2,
            "weighting": {"interval": 2},
        }
        return run_config(**{**settings, **changes})

    return make


def changed(run, network):
    """Names of what differs between a run's classifier and what it started from, and all names."""
    start, end = network.classifier.state_dict(), parameters(run)
    return {name for name in end if not torch.equal(start[name], end[name])}, set(end)


@pytest.mark.parametrize("fine_tune", ["last", "all"])
def test_only_what_is_fine_tuned_moves(fine_tune, tuned, colours, tmp_path):
    config = tuned(fine_tune)
    start = Run(config, colours, tmp_path / "start")
    moved, everything = changed(make_schedule(config).fit(colours, tmp_path / "run"), start)
    trained = {name for name, p in start.classifier.named_parameters() if p.requires_grad}
    assert moved == trained
    blocks = start.classifier.trunk.blocks()
    kept = [] if fine_tune == "all" else blocks[:-2]
    assert trained == {name for name, _ in start.classifier.named_parameters()} - {
        f"trunk.{name}" for block in kept for name in block
    }
    assert any("running_mean" in name for name in everything - moved)


def test_from_scratch_all_parameters_move(run_config, colours, tmp_path):
    config = run_config(network=NETWORK, steps=3, weighting={"interval": 2})
    start = Run(config, colours, tmp_path / "start")
    moved, everything = changed(make_schedule(config).fit(colours, tmp_path / "run"), start)
    assert moved == {name for name, _ in start.classifier.named_parameters()}
    assert everything - moved == {"trunk.mean", "trunk.std"}
    assert set(start.classifier.rates().values()) == {1.0}


def test_learning_rates_fall_from_the_head_to_the_images(tuned, colours, tmp_path):
    run = Run(tuned("all"), colours, tmp_path)
    run.train_steps(1)
    rate_of = {
        p: group["lr"] / run.training.learning_rate
        for group in run.optimizer.param_groups
        for p in group["params"]
    }
    named = dict(run.classifier.named_parameters())
    assert len(rate_of) == len(named)
    assert rate_of[named["head.weight"]] == rate_of[named["head.bias"]] == 1
    for depth, block in enumerate(reversed(run.classifier.trunk.blocks()), 1):
        for name in block:
            assert rate_of[named[f"trunk.{name}"]] == pytest.approx(0.75**depth)


def test_the_head_sees_features_of_length_one(tuned, colours, tmp_path):
    run = Run(tuned(), colours, tmp_path)
    with torch.no_grad():
        features = run.classifier.features(torch.from_numpy(colours.unlabelled_images) / 255)
    torch.testing.assert_close(features.mean(0), torch.zeros(features.shape[1]))
    torch.testing.assert_close(features.square().sum(1).mean(), torch.tensor(1.0))


@pytest.mark.parametrize("schedule", ["online", "rounds"])
def test_a_killed_run_resumes_to_the_same_end(schedule, tuned, colours, tmp_path, monkeypatch):
    monkeypatch.setattr("weighmatch.semisup.training.batches.CHUNK", 1)
    config = replace(tuned(ranking={"steps": 3}), schedule=schedule, rounds=2)
    whole = make_schedule(config).fit(colours, tmp_path / "whole")
    fit_until_killed(make_schedule(config), colours, tmp_path / "killed", 3)
    assert same(whole, make_schedule(config).fit(colours, tmp_path / "killed"))


def test_a_run_is_kept_exported_and_read_without_its_weights(
    tuned, colours, tmp_path, weights, monkeypatch
):
    run = make_schedule(tuned()).fit(colours, tmp_path / "run")
    export_run(run, tmp_path / "export")
    card = (tmp_path / "export" / "model_card.md").read_text("utf-8")
    assert f"{NETWORK}, weights test_resnet.pth, head and last blocks trained, " in card
    assert "mean 0.5, 0.5, 0.5, deviation 0.5, 0.5, 0.5, within" in card

    def fail(*args):
        raise AssertionError("weights are not needed again")

    monkeypatch.setattr("weighmatch.semisup.parts.networks.load_backbone", fail)
    again = TrainedRun.load(tmp_path / "export" / "run.pt")
    assert same(run, again)
    images = np.random.default_rng(1).integers(0, 256, (9, *run.image_shape), dtype=np.uint8)
    assert np.array_equal(run.score(images).probabilities, again.score(images).probabilities)
    assert compare_elsewhere(run, tmp_path / "export", images) < 1e-4


def test_weights_count_by_their_content(tuned, colours, weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    file = tmp_path / "weights.pth"

    def identity(scale):
        torch.save({name: tensor * scale for name, tensor in state.items()}, file)
        return fingerprint(tuned(weights=str(file)), colours)

    assert identity(1) == identity(1) != identity(2)
