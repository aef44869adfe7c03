import math

import pytest
import torch

from tests.semisup.weightings.drawing import draw_images, draw_logits
from weighmatch.semisup.parts.losses import pseudo_label
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.weightings.softmatch import SoftMatch, truncated_gaussian


def test_the_truncated_gaussian_is_its_formula():
    confidence = torch.tensor([0.4, 0.6, 0.7, 0.9])
    weights = truncated_gaussian(confidence, torch.tensor(0.7), torch.tensor(0.04))
    # Standard deviation .2, of which the Gaussian takes half.
    expected = [math.exp(-0.5 * (0.3 / 0.1) ** 2), math.exp(-0.5), 1.0, 1.0]
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_softmatch_follows_the_confidences_it_trains_on_and_no_others(make_context):
    weighting = SoftMatch(make_context())
    first, second = (pseudo_label(draw_logits(seed=s), 0.99) for s in (0, 1))
    images = draw_images()
    assert torch.equal(weighting.scores(images, first, None), torch.ones(12))
    weighting.weights(images, first)
    weights = weighting.weights(images, second)
    mean = (first.confidence.mean() + second.confidence.mean()) / 2
    variance = (first.confidence.var() + second.confidence.var()) / 2
    expected = truncated_gaussian(second.confidence, mean, variance)
    torch.testing.assert_close(weights, expected)
    assert float(weights.mean()) < 1  # SoftMatch's own, not scaled
    assert torch.equal(weighting.scores(images, second, None), weights)  # looking moves nothing


def test_softmatch_takes_a_batch_of_one(make_context):
    pseudo = pseudo_label(draw_logits(1), 0.5)
    weights = SoftMatch(make_context()).weights(draw_images(1), pseudo)
    assert torch.equal(weights, torch.ones(1))


def test_softmatch_has_no_threshold_after_the_warm_up(training_set, run_config, tmp_path):
    """No pseudo-label reaches τ: FixMatch's loss is the supervised one, SoftMatch's is not."""
    losses = {}
    for arm in ("fixmatch", "softmatch"):
        settings = {"threshold": 0.999999, "weighting": {"warmup": 0.5}}
        run = Run(run_config(arm, steps=20, **settings), training_set, tmp_path / arm)
        run.train_steps(10)
        run.train_steps(1)
        lines = run.result().log
        assert [line["mask_rate"] for line in lines] == [0, 0]  # of τ, whatever the arm does
        losses[arm] = [line["loss"] for line in lines]
    assert losses["fixmatch"][0] == losses["softmatch"][0]
    assert losses["fixmatch"][1] < losses["softmatch"][1] - 0.05
