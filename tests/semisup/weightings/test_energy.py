import numpy as np
import torch

from tests.semisup.weightings.drawing import draw_images, draw_logits
from weighmatch.semisup.parts.losses import pseudo_label
from weighmatch.semisup.weightings.base import BELOW_CUT, POOL_SAMPLE, otsu_cut
from weighmatch.semisup.weightings.energy import Energy, negative_free_energy


def test_energy_is_cut_where_the_pool_falls_apart(classifier, half_noise, make_context):
    context = make_context()
    pool, weighting = context.pool, Energy(context)
    logits = draw_logits()
    torch.testing.assert_close(negative_free_energy(logits), logits.exp().sum(dim=1).log())
    pseudo = pseudo_label(logits, 0.5)
    assert torch.equal(weighting.weights(draw_images(), pseudo), torch.ones(12))
    report = weighting.update(classifier)
    with torch.no_grad():
        pool_logits = classifier(pool[torch.arange(40)].float() / 255)
    scores = negative_free_energy(pool_logits)
    assert weighting.cut == otsu_cut(scores) == -report["energy_cut"]
    weights = weighting.scores(draw_images(40), pseudo_label(pool_logits, 0.5), None)
    assert torch.equal(weights, torch.where(scores > weighting.cut, 1.0, BELOW_CUT))
    assert weights[:20].mean() > weights[20:].mean() + 0.3


def test_a_large_pool_is_sampled_for_the_cut(classifier, make_context):
    images = np.zeros((POOL_SAMPLE + 1, 1, 8, 8), dtype=np.uint8)
    seen = []
    classifier.head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    Energy(make_context(pool=images)).update(classifier)
    assert seen == [POOL_SAMPLE]
