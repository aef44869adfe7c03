import math

import pytest
import torch

from tests.semisup.weightings.drawing import draw_logits
from weighmatch.semisup.parts.losses import pseudo_label
from weighmatch.semisup.weightings.base import BELOW_CUT
from weighmatch.semisup.weightings.inlier import (
    InlierFilter,
    inlier_probability,
    one_vs_all_loss,
)


def test_the_one_vs_all_loss_takes_the_hardest_negative():
    logits, labels = draw_logits(5, 4).double(), torch.tensor([0, 1, 2, 3, 1])
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = [1 / (1 + math.exp(-z)) for z in row]
        total -= math.log(p[label]) + math.log(1 - max(p[:label] + p[label + 1 :]))
    assert float(one_vs_all_loss(logits, labels)) == pytest.approx(total / 5)
    chosen = [1 / (1 + math.exp(-row[k])) for row, k in zip(logits, labels, strict=True)]
    assert inlier_probability(logits, labels).tolist() == pytest.approx(chosen)


def test_the_inlier_filter_weighs_foreign_images_down(classifier, half_noise, make_context):
    settings = {"fit_steps": 20, "learning_rate": 0.05}
    weighting = InlierFilter(make_context(classifier, weighting=settings))
    images = torch.from_numpy(half_noise.unlabelled_images).float() / 255
    with torch.no_grad():
        pseudo = pseudo_label(classifier(images), 0.1)
    assert torch.equal(weighting.weights(images, pseudo), torch.ones(40))  # heads know nothing
    before = [p.clone() for p in classifier.parameters()]
    first = weighting.update(classifier)["inlier_loss"]
    for _ in range(9):
        last = weighting.update(classifier)["inlier_loss"]
    assert last < 0.5 * first
    weights = weighting.scores(images, pseudo, None)
    probability = inlier_probability(weighting.heads(classifier.features(images)), pseudo.labels)
    assert torch.equal(weights, torch.where(probability > 0.5, 1.0, BELOW_CUT))
    assert weights[:20].mean() > weights[20:].mean() + 0.3
    # The classifier is read, never trained, by the heads.
    assert all(map(torch.equal, before, classifier.parameters()))
    assert all(p.grad is None for p in classifier.parameters())
