"""Measuring at a trained classifier: influences of pool images, and what they say of a ranking."""

import copy

import torch
from torch import Tensor

from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.parts.streams import Streams, derive_seed
from weighmatch.semisup.parts.views import make_views
from weighmatch.semisup.training.config import RunConfig, TrainingSet, pick_device
from weighmatch.semisup.weightings import Context
from weighmatch.semisup.weightings.meter import InfluenceMeter, Measured
from weighmatch.semisup.weightings.share import Slope


def measure_pool(
    trained: TrainedRun,
    data: TrainingSet,
    kept: Tensor,
    scores: Tensor,
    before: Measured | None,
    config: RunConfig,
    seed: int,
) -> tuple[Measured, Slope]:
    """Influences of images of the pool at a trained classifier, and what they say of a ranking.

    Each of `influence.measurements` draws images, views, outer batch and curvature batch anew.

    Args:
        trained: a run trained with equal weights.
        data: with the pool of N images.
        kept: the images that it was trained on, (N,) bool.
        scores: the ranking of the pool, (N,).
        before: the influences measured at earlier classifiers, or nothing.
        config: what defines the whole run.
        seed: seed of what is drawn; another one at each classifier.

    Returns:
        All influences so far, averaged, and what they say of the useful share.
    """
    training = config.training
    device = pick_device(training.device)
    classifier = copy.deepcopy(trained.classifier).to(device)
    labelled = torch.from_numpy(data.labelled_images).to(device)
    labels = torch.from_numpy(data.labels).to(device)
    context = Context(
        classifier,
        labelled,
        labels,
        (labelled, labels),
        data.store(device, training.pool_memory, config.group),
        config.classes,
        make_views(training),
        training,
        Streams(derive_seed(seed, "influence of the pool")),
        group=config.group,
    )
    meter = InfluenceMeter(
        context, lambda weak, pseudo, indices: torch.ones(len(weak), device=weak.device)
    )
    if before is not None:
        meter.measured = copy.deepcopy(before).to(device)
    ranks = scores.argsort(stable=True).argsort() / len(scores)
    trained_on, measured, found = kept.nonzero().squeeze(1), [], []
    for _ in range(training.influence.measurements):
        everyone = torch.randperm(data.pool_size, generator=context.streams["measured images"])
        images = everyone[: training.influence.batch]
        found.append(meter.measure_at(classifier, trained_on, images).cpu())
        measured.append(ranks[images])
    share = float(kept.float().mean())
    slope = Slope.of(share, torch.stack(measured), torch.stack(found))
    return meter.measured.to("cpu"), slope
