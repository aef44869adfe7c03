import pytest
import torch

from tests.semisup.weightings.drawing import draw_images
from weighmatch.semisup.weightings.base import otsu_cut
from weighmatch.semisup.weightings.free import FreeWeights
from weighmatch.semisup.weightings.meter import Measured

MEASURED = {"batch": 32, "outer_batch": 12, "curvature_batch": 8}


@pytest.mark.parametrize("weights", ["hard", "soft"])
def test_free_weights_are_the_running_means_of_learned(weights, classifier, make_context):
    measured = {**MEASURED, "batch": 12}
    free = FreeWeights(make_context(None, {"weights": weights}, measured))
    views = free.meter.draw_views(classifier)
    pseudo, direction = views.pseudo, free.meter.outer_gradient(classifier)
    influence = free.meter.influence(classifier, views, direction)
    memory = Measured.nothing(40, torch.device("cpu"))
    for remembered in (memory, free.meter.measured):
        remembered.remember(views.indices, influence, free.meter.config.memory)
    # What follows a measurement, with this one.
    free.meter.measure = lambda classifier: {}
    free.update(classifier)
    everyone = torch.arange(40)
    known = memory.evidence > 0
    assert 0 < int(known.sum()) < 40
    means = memory.influence[known] / memory.evidence[known]
    scores = free.scores(draw_images(40), pseudo, everyone)
    if weights == "soft":
        torch.testing.assert_close(scores[known], means.sigmoid())
    else:
        cut = otsu_cut(means.sigmoid())
        assert torch.equal(scores[known] == 1, means.sigmoid() > cut)
    assert (scores[~known] == 1).all()
    # Images outside of the pool: no opinion.
    assert torch.equal(free.scores(draw_images(), pseudo, None), torch.ones(12))


def test_free_weights_measure_as_learned_does(classifier, make_context):
    weighting = FreeWeights(make_context(influence=MEASURED))
    report = weighting.update(classifier)
    assert report["products"] <= weighting.meter.config.max_products
    assert report["weight_spread"] > 0
    assert int((weighting.meter.measured.evidence > 0).sum()) > 0
    assert not hasattr(weighting, "network")
