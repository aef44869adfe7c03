"""What an arm costs, counted in floating-point operations so that it does not depend on noise."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from weighmatch.semisup.config import RANKED_ANEW, UNWEIGHTED, ArmName, TrainingConfig
from weighmatch.semisup.learned import PROBE_EVERY
from weighmatch.semisup.parts.networks import Classifier, build_classifier
from weighmatch.semisup.rounds import PoolInfluence
from weighmatch.semisup.trainer import Run, RunConfig, TrainingSet
from weighmatch.semisup.two_stages import (
    FITTED,
    POOL_VIEWS,
    WITH_HEAD,
    fit_to_features,
    labelled_copies,
)

# Steps that are counted: with an update of the weights on each, as many as there are between two
# probes of the curvature, so that a probe is counted with its share.
COUNTED = PROBE_EVERY

Count = Callable[[ArmName, int, TrainingConfig, TrainingSet], float]


def flops_per_step(arm: ArmName, classes: int, config: TrainingConfig, data: TrainingSet) -> float:
    """Mean operations of a step once the warm-up is over, its share of an update included.

    Counts the convolutions and matrix products of steps that are really taken, on the CPU, but
    not the snapshots of the pool, which are measurement. What was counted once is not counted
    again for other images of the same shapes.
    """
    return _once(_flops_per_step, arm, classes, config, data)


def _once(
    count: Count, arm: ArmName, classes: int, config: TrainingConfig, data: TrainingSet
) -> float:
    shapes = data.labelled_images.shape, data.unlabelled_images.shape
    key = (count.__name__, arm, classes, config, *shapes)
    if key not in _counted:
        _counted[key] = count(arm, classes, config, data)
    return _counted[key]


_counted: dict[tuple[Any, ...], float] = {}


def _flops_per_step(arm: ArmName, classes: int, config: TrainingConfig, data: TrainingSet) -> float:
    # Steps without an update are all alike.
    without = _count(arm, classes, config, data, steps=1, interval=2 * COUNTED)
    if arm in UNWEIGHTED:
        return without
    with_updates = _count(arm, classes, config, data, steps=COUNTED, interval=1)
    return without + (with_updates / COUNTED - without) / config.weighing.interval


def _count(
    arm: ArmName,
    classes: int,
    config: TrainingConfig,
    data: TrainingSet,
    steps: int,
    interval: int,
) -> int:
    """Operations of the first `steps` of a run that updates its weights every `interval` steps."""
    weighing = replace(config.weighing, warmup=0.0, interval=interval)
    # Any confidence passes, so that an untrained network's step does all that a trained one's does.
    config = replace(config, device="cpu", snapshots=1, threshold=1e-6, weighing=weighing)
    run_config = RunConfig(arm, seed=0, steps=2 * COUNTED, classes=classes, training=config)
    with TemporaryDirectory() as folder:
        run = Run(run_config, data, Path(folder))
        with FlopCounterMode(display=False) as counter:
            run.train_steps(steps)
    return int(counter.get_total_flops())


def matched_steps(classes: int, config: TrainingConfig, data: TrainingSet, stages: int = 1) -> int:
    """Steps that give `fixmatch` the total compute of `learned` with `config.steps` steps."""
    (cost,) = relative_costs(("learned",), classes, config, data, stages)
    return ceil(config.steps * cost)


def relative_costs(
    arms: Sequence[ArmName],
    classes: int,
    config: TrainingConfig,
    data: TrainingSet,
    stages: int = 1,
) -> list[float]:
    """Operations of a whole run of each arm, over those of `fixmatch` with as many steps.

    With two stages, weighted arms take the second and, for `first_stage` of its steps, the arm's
    own; rounds are steps of FixMatch. Ranking the pool is counted too: the passes that it makes,
    fitting a head, and what `learned` measures of the pool.
    """
    counted = [arm for arm in arms if arm not in UNWEIGHTED or arm == "supervised"]
    costs = dict.fromkeys(arms, 1.0)
    plain = flops_per_step("fixmatch", classes, config, data) if counted else 1.0
    for arm in counted:
        if stages > 2 and arm in RANKED_ANEW:
            ranking = _once(_ranking_flops, arm, classes, config, data)
            if arm == "learned":
                ranking += _once(_measuring_flops, arm, classes, config, data)
            costs[arm] += stages * ranking / plain / config.steps
            continue
        # Weights are learned after the warm-up; `supervised` is cheaper from the first step.
        share = 1.0 if arm in UNWEIGHTED else 1 - config.weighing.warmup
        costs[arm] += share * (flops_per_step(arm, classes, config, data) / plain - 1)
        if stages == 2 and arm not in UNWEIGHTED:
            costs[arm] = 1 + config.weighing.first_stage * costs[arm]
            costs[arm] += _once(_ranking_flops, arm, classes, config, data) / plain / config.steps
    return list(costs.values())


def _measuring_flops(
    arm: ArmName, classes: int, config: TrainingConfig, data: TrainingSet
) -> float:
    """Operations of measuring the influences of a pool once."""
    run_config, classifier = _untrained(arm, classes, config, data)
    meter = PoolInfluence(data, run_config, 0, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        meter.measure(classifier, torch.arange(len(data.unlabelled_images)))
    return float(counter.get_total_flops())


def _ranking_flops(arm: ArmName, classes: int, config: TrainingConfig, data: TrainingSet) -> float:
    """Operations of ranking a pool once, given its influences.

    What an arm without a head ranks by is as cheap as confidence. Passes are counted by one of
    one image, as those over a large pool would take as long as the ranking itself.
    """
    run_config, classifier = _untrained(arm, classes, config, data)
    pool, labelled = len(data.unlabelled_images), len(data.labels)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        width = classifier.features(torch.zeros(1, *data.unlabelled_images.shape[1:])).shape[1]
    one = counter.get_total_flops()
    if arm not in WITH_HEAD:
        return float(one * pool)
    copies, fitted = labelled_copies(labelled), min(pool, FITTED)
    generator = torch.Generator().manual_seed(0)
    positives = torch.randn(copies, width, generator=generator)
    views = torch.randn(POOL_VIEWS, fitted, width, generator=generator)
    with FlopCounterMode(display=False) as counter:
        head, _ = fit_to_features(positives, torch.from_numpy(data.labels), views, None, run_config)
        with torch.no_grad():
            head(views[0])
    # The whole pool is scored, by features as its images are; the head itself is a hundredth of it.
    return float(counter.get_total_flops() + one * (copies + POOL_VIEWS * fitted + pool))


def _untrained(
    arm: ArmName, classes: int, config: TrainingConfig, data: TrainingSet
) -> tuple[RunConfig, Classifier]:
    """A run on the CPU whose images all pass τ, and its classifier as it starts.

    The curvature's probe and solve make no fewer products there than at a trained one.
    """
    config = replace(config, device="cpu", threshold=1e-6)
    channels = data.unlabelled_images.shape[1]
    classifier = build_classifier(config.network, channels, classes, 0, config.width)
    return RunConfig(arm, seed=0, steps=1, classes=classes, training=config), classifier
