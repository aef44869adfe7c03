"""What a run costs, counted in floating-point operations so that it does not depend on noise."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from weighmatch.arms import FIXMATCH, LEARNED, Arm, Schedule
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.parts.store import as_tensor
from weighmatch.semisup.parts.views import make_views
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.judges import Seen, chance_clean
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.training.measuring import measure_pool
from weighmatch.semisup.training.ranking import (
    MAX_HEAD_IMAGES,
    POOL_VIEWS,
    fit_to_features,
    labelled_copies,
)
from weighmatch.semisup.weightings.meter import PROBE_EVERY

# Steps that are counted: with an update of the weights on each, as many as there are between two
# probes of the curvature, so that a probe is counted with its share.
COUNTED = PROBE_EVERY


@dataclass(frozen=True)
class Sizes:
    """All that an operation count depends on; it is the same for other images of these shapes.

    Attributes:
        labels: labels of the labelled images, in order.
        pool: number of unlabelled images.
        image: shape of a stored image: (C, H, W), or (views, width) of features.
        image_shape: (C, H, W).
        classes: number of classes.
        training: parameters of the run.
    """

    labels: tuple[int, ...]
    pool: int
    image: tuple[int, ...]
    image_shape: tuple[int, ...]
    classes: int
    training: TrainingConfig

    @classmethod
    def of(cls, data: TrainingSet, classes: int, training: TrainingConfig) -> "Sizes":
        """The sizes of a run on `data`."""
        shape = data.unlabelled_images.shape
        labels = tuple(data.labels.tolist())
        return cls(labels, data.pool_size, shape[1:], data.image_shape, classes, training)

    def blank(self) -> TrainingSet:
        """Data of these sizes that show nothing, the pool no larger than is ever measured."""
        dtype: type = np.uint8 if self.image == self.image_shape else np.float16
        return TrainingSet(
            np.zeros((len(self.labels), *self.image), dtype),
            np.array(self.labels),
            np.zeros((min(self.pool, MAX_HEAD_IMAGES), *self.image), dtype),
            image_shape=self.image_shape,
        )


def relative_cost(arm: Arm, schedule: Schedule, rounds: int, sizes: Sizes) -> float:
    """Operations of a whole run of an arm, over those of `fixmatch` with as many steps.

    In two stages it takes the second stage and the first stage's share of the arm's own steps;
    rounds are steps of FixMatch. Ranking the pool is counted too: the passes that it makes,
    fitting a head, and measuring influences.
    """
    if not arm.weighs and arm.pool != "none":
        return 1.0
    training = sizes.training
    plain = flops_per_step(FIXMATCH, sizes)
    if schedule == "rounds":
        ranking = _ranking_flops(arm, sizes) + _measuring_flops(arm, sizes)
        return 1 + rounds * ranking / plain / training.steps
    # Weights are learned after the warm-up; an arm without a pool is cheaper from the first step.
    share = 1 - training.weighting.warmup if arm.weighs else 1.0
    cost = 1 + share * (flops_per_step(arm, sizes) / plain - 1)
    if schedule == "two_stages":
        cost = 1 + training.two_stages.first_share * cost
        cost += _ranking_flops(arm, sizes) / plain / training.steps
    return cost


def matched_steps(schedule: Schedule, rounds: int, sizes: Sizes) -> int:
    """Steps that give `fixmatch` the total compute of `learned` with `training.steps` steps."""
    return ceil(sizes.training.steps * relative_cost(LEARNED, schedule, rounds, sizes))


@functools.lru_cache
def flops_per_step(arm: Arm, sizes: Sizes) -> float:
    """Mean operations of a step once the warm-up is over, its share of an update included.

    Counts the convolutions and matrix products of steps that are really taken, on the CPU, but
    not the snapshots of the pool, which are measurement.
    """
    # Steps without an update are all alike.
    without = _count_steps(arm, sizes, steps=1, interval=2 * COUNTED)
    if not arm.weighs:
        return without
    with_updates = _count_steps(arm, sizes, steps=COUNTED, interval=1)
    interval = sizes.training.weighting.interval
    return without + (with_updates / COUNTED - without) / interval


def _count_steps(arm: Arm, sizes: Sizes, steps: int, interval: int) -> float:
    """Operations of the first `steps` of a run that updates its weights every `interval` steps."""
    weighting = replace(sizes.training.weighting, warmup=0.0, interval=interval)
    config = _config(arm, sizes, 2 * COUNTED, weighting=weighting)
    with TemporaryDirectory() as folder:
        run = Run(config, sizes.blank(), Path(folder))
        return _count(lambda: run.train_steps(steps))


def _count(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _config(arm: Arm, sizes: Sizes, steps: int, **changes: object) -> RunConfig:
    """A run on the CPU whose images all pass τ, so that a step does all that it ever does."""
    training = replace(sizes.training, device="cpu", snapshots=1, threshold=1e-6, **changes)  # type: ignore[arg-type]
    return RunConfig(arm.name, 0, steps, sizes.classes, training)


def _untrained(arm: Arm, sizes: Sizes) -> tuple[RunConfig, TrainedRun]:
    """A run as it starts; probe and solve make no fewer products there than at a trained one."""
    config = _config(arm, sizes, 1)
    fixmatch = replace(config, arm=FIXMATCH.name)
    with TemporaryDirectory() as folder:
        return config, Run(fixmatch, sizes.blank(), Path(folder)).result()


@functools.lru_cache
def _measuring_flops(arm: Arm, sizes: Sizes) -> float:
    """Operations of measuring the influences of a pool once."""
    if arm.judge != "hypergradient" or sizes.training.frozen:
        return 0.0
    config, run = _untrained(arm, sizes)
    data = sizes.blank()
    kept, scores = torch.ones(data.pool_size, dtype=torch.bool), torch.zeros(data.pool_size)
    return _count(lambda: measure_pool(run, data, kept, scores, None, config, 0))


@functools.lru_cache
def _ranking_flops(arm: Arm, sizes: Sizes) -> float:
    """Operations of ranking a pool once, given its influences.

    What an arm without a head ranks by is as cheap as confidence. Passes are counted by one of
    one image, as those over a large pool would take as long as the ranking itself.
    """
    config, run = _untrained(arm, sizes)
    with torch.no_grad():
        shown = make_views(sizes.training).plain(as_tensor(sizes.blank().labelled_images[:1]))
        one = _count(lambda: run.classifier.features(shown))
    if arm.judge == "otsu":
        return one * sizes.pool
    copies, fitted = labelled_copies(len(sizes.labels)), min(sizes.pool, MAX_HEAD_IMAGES)
    generator = torch.Generator().manual_seed(0)
    width = run.classifier.head.in_features
    positives = torch.randn(copies, width, generator=generator)
    views = torch.randn(POOL_VIEWS, fitted, width, generator=generator)
    labels = torch.tensor(sizes.labels)
    plain = views[0]
    seen = Seen(positives, labels, views, positives[: len(labels)], plain)

    def rank() -> None:
        head = fit_to_features(seen, sizes.training.frozen, config)
        with torch.no_grad():
            head(plain)
        if arm.judge != "truth" and not sizes.training.frozen:
            chance_clean(head, seen, sizes.classes)

    # The whole pool is scored, by features as its images are; the head is a hundredth of it.
    return _count(rank) + one * (copies + POOL_VIEWS * fitted + sizes.pool)
