import numpy as np
import pytest
import torch

from weighmatch.semisup.parts.losses import pseudo_label
from weighmatch.semisup.weightings.base import BELOW_CUT, confidence_weights, otsu_cut
from weighmatch.semisup.weightings.max_probability import MaxProbability
from weighmatch.semisup.weightings.uniform import Uniform


def pseudo_labels(n=6):
    return pseudo_label(torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), 0.5)


def test_uniform_and_max_probability(make_context):
    images, pseudo = torch.rand(6, 1, 8, 8), pseudo_labels()
    assert torch.equal(Uniform(make_context()).weights(images, pseudo), torch.ones(6))
    weights = MaxProbability(make_context()).weights(images, pseudo)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
    assert torch.equal(weights.argsort(), pseudo.confidence.argsort())


def test_otsu_cut_maximises_the_variance_between_groups():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0.2, 0.05, 30), rng.normal(0.7, 0.1, 12)])
    cut = otsu_cut(torch.from_numpy(scores))

    def between(t):
        low, high = scores[scores <= t], scores[scores > t]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    assert between(cut) == pytest.approx(max(between(t) for t in np.sort(scores)[:-1]))


def test_hard_weights_have_two_sizes_and_no_cut_none():
    scores = torch.tensor([0.1, 0.4, 0.9])
    assert torch.equal(confidence_weights(scores, None), scores)
    expected = torch.tensor([BELOW_CUT, BELOW_CUT, 1.0])
    assert torch.equal(confidence_weights(scores, 0.5), expected)
