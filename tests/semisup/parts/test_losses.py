import math
from dataclasses import replace

import pytest
import torch

from weighmatch.semisup.parts.losses import fixmatch_loss, mean_one, pseudo_label


def slow_fixmatch(labelled, labels, weak, strong, weights, threshold, unlabelled_weight):
    """Equations 3 and 4 of Sohn et al. (2020) in plain Python, with weights."""

    def probabilities(logits):
        powers = [math.exp(z - max(logits)) for z in logits]
        return [p / sum(powers) for p in powers]

    supervised = 0.0
    for logits, label in zip(labelled, labels, strict=True):
        supervised -= math.log(probabilities(logits)[label]) / len(labels)
    consistency = 0.0
    for weak_logits, strong_logits, weight in zip(weak, strong, weights, strict=True):
        p = probabilities(weak_logits)
        if max(p) >= threshold:
            pseudo = p.index(max(p))
            consistency -= weight * math.log(probabilities(strong_logits)[pseudo]) / len(weak)
    return supervised + unlabelled_weight * consistency


@pytest.mark.parametrize("threshold", [0.1, 0.6, 0.999])
def test_fixmatch_loss_equals_a_slow_loop(threshold):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labelled, weak, strong = draw(5, 4), 2 * draw(11, 4), draw(11, 4)
    labels, weights = torch.tensor([0, 1, 2, 3, 1]), draw(11).abs()
    pseudo = pseudo_label(weak, threshold)
    pseudo = replace(pseudo, mask=pseudo.mask.double())
    loss = fixmatch_loss(torch.cat([labelled, strong]), labels, pseudo, weights, 0.7)
    expected = slow_fixmatch(
        labelled.tolist(),
        labels.tolist(),
        weak.tolist(),
        strong.tolist(),
        weights.tolist(),
        threshold,
        0.7,
    )
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_pseudo_labels_carry_no_graph():
    logits = torch.randn(3, 2, requires_grad=True)
    pseudo = pseudo_label(logits, 0.5)
    assert not pseudo.probabilities.requires_grad
    assert not pseudo.confidence.requires_grad


def test_mean_one():
    assert torch.allclose(mean_one(torch.tensor([1.0, 3.0])), torch.tensor([0.5, 1.5]))
    assert torch.isfinite(mean_one(torch.zeros(3))).all()
