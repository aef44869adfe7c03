"""All that these measurements ask of `weighmatch.semisup`, so that a change there ends here."""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.images import CLASSES, SEEN, ImageSet, Labels, Pictures
from benchmarks.gpu.session import Bench
from benchmarks.steps import Setting, bare_loop, rank, start_run, time_steps
from weighmatch.arms import FIXMATCH, LEARNED, Schedule
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.config import (
    AugmentationConfig,
    InfluenceConfig,
    RankingConfig,
    RunsConfig,
    TrainingConfig,
    WeightingConfig,
)
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.training.numerics import algorithms
from weighmatch.semisup.training.schedules import make_schedule

__all__ = ["bare_loop", "rank"]

ARMS = (FIXMATCH.name, LEARNED.name)
# How often the main job ranks its pool.
ROUNDS = RunsConfig().rounds
# Options of `torch.compile`; None: the network as it is. The first two are what
# `training.compile` chooses between.
Options = dict[str, Any]
WAYS: dict[str, Options | None] = {
    "as it is": None,
    "torch.compile": {},
    "torch.compile with CUDA graphs": {"mode": "reduce-overhead", "dynamic": False},
}
# Of the run that is compared between devices.
COMPARED_STEPS, TOLERANCE = 12, 1e-3


def fastest() -> AbstractContextManager[None]:
    """The algorithms that `Trainer.fit` trains with."""
    return algorithms(deterministic=False)


def training_of(bench: Bench, **changes: Any) -> TrainingConfig:
    """FixMatch as on CIFAR-10 (Sohn et al., 2020), in half precision; tiny in a rehearsal."""
    common: Options = {
        "device": bench.device.type,
        "precision": "bfloat16",
        "channels_last": True,
        "learning_rate": 0.03,
        "ema": 0.999,
        "augmentation": AugmentationConfig(flip=True),
    }
    if bench.tiny:
        return TrainingConfig(
            **common,
            batch_size=4,
            unlabelled_ratio=2,
            width=4,
            weighting=WeightingConfig(fit_batch=4),
            influence=InfluenceConfig(outer_batch=4, curvature_batch=4, batch=4),
            ranking=RankingConfig(steps=4),
            **changes,
        )
    network: Options = {"network": "wrn_28_2", "batch_size": 64, "unlabelled_ratio": 7}
    return TrainingConfig(**{**common, **network, **changes})


def fixmatch_setting(bench: Bench) -> Setting:
    """FixMatch with forty labelled images, ten classes, and all others in the pool."""
    labelled = 4 * len(CLASSES)
    images = bench.images.images
    # Labels of every class, whatever the images are: only times are taken of it.
    data = TrainingSet(images[:labelled], np.arange(labelled) % len(CLASSES), images[labelled:])
    steps = 2 if bench.tiny else 20
    name = f"{training_of(bench).network} at {images.shape[-1]}×{images.shape[-1]}"
    return Setting(name, data, training_of(bench), steps, steps, run_steps=10_000)


def start(setting: Setting, folder: Path, options: Options | None) -> Run:
    """A run of FixMatch whose network runs as one of `WAYS` says."""
    run = start_run("fixmatch", setting, folder)
    if options is not None:
        run._forward = torch.compile(run.classifier, **options)
    return run


def steps_at_once(run: Run, bench: Bench) -> int:
    """How many steps training takes from one augmentation of their images."""
    return 2 if bench.tiny else run.batches.chunk()


def images_in_step(training: TrainingConfig) -> int:
    """That pass the network: B labelled ones and two views of µB others."""
    return training.batch_size * (1 + 2 * training.unlabelled_ratio)


@dataclass(frozen=True)
class LearnedTimes:
    """Medians; the attributes are those of `records.Learned`."""

    fixmatch: float
    learned: float
    update: float
    interval: int
    overhead: float
    overhead_of_run: float


def learned_times(
    setting: Setting, rounds: int, folder: Path, enough: Callable[[], bool]
) -> LearnedTimes:
    """A step of FixMatch beside one of the learned arm, weights learned while training."""
    times = time_steps(setting, rounds, folder, enough)
    weighting = setting.training.weighting
    return LearnedTimes(
        statistics.median(times.fixmatch),
        statistics.median(times.learned),
        statistics.median(times.update),
        weighting.interval,
        statistics.median(times.overheads(weighting)),
        statistics.median(times.run_overheads(weighting)),
    )


@dataclass(frozen=True)
class Outcome:
    """What two devices are compared by.

    Attributes:
        losses: one a step, (steps,).
        parameters: of the averaged classifier, (P,).
    """

    losses: Tensor
    parameters: Tensor


def short_run(arm: str, device: str, folder: Path) -> Outcome:
    """A tiny run in single precision; with the same seed on every device."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (48, 3, 8, 8), dtype=np.uint8)
    data = TrainingSet(images[:12], np.arange(12) % 3, images[12:])
    # Soft weights, and a threshold that every image passes: a decision that falls the other way
    # by a rounding would make two runs differ by more than roundings.
    training = TrainingConfig(
        width=8,
        steps=COMPARED_STEPS,
        batch_size=6,
        unlabelled_ratio=2,
        threshold=1e-6,
        snapshots=1,
        checkpoint_every=COMPARED_STEPS,
        device="cuda" if device == "cuda" else "cpu",
        weighting=WeightingConfig(weights="soft", interval=4, warmup=0.0, fit_batch=16),
        influence=InfluenceConfig(outer_batch=8, curvature_batch=8, batch=16),
    )
    config = RunConfig(arm, 0, COMPARED_STEPS, 3, training)
    with algorithms(deterministic=False):
        run = Run(config, data, folder / f"{arm}-{device}")
        for _ in range(COMPARED_STEPS):
            run.train_steps(1)
        found = run.result()
    losses = torch.tensor([line["loss"] for line in found.log])
    state = found.classifier.state_dict()
    return Outcome(losses, torch.cat([value.flatten() for value in state.values()]))


def classifier_after(bench: Bench, steps: int, batch: int, folder: Path) -> nn.Module:
    """A network trained on labelled images for so many steps, in single precision, no graph."""
    images = bench.images
    data = TrainingSet(images.images, images.labels, images.images[:1])
    training = training_of(bench)
    setting = Setting(
        training.network, data, replace(training, batch_size=batch), steps, steps, steps
    )
    run = start_run("supervised", setting, folder)
    run.train_steps(steps)
    # In the plain layout, which forward mode through group norm needs in torch 2.11.
    network = run.classifier.to(memory_format=torch.contiguous_format)
    return network.requires_grad_(False)


@dataclass(frozen=True)
class OpenSetData:
    """Six classes seen, all other images in the pool.

    Attributes:
        training: what training may see.
        foreign: images of unseen classes in the pool.
        test_images: of the seen classes.
        test_labels: 0 to 5.
    """

    training: TrainingSet
    foreign: int
    test_images: Pictures
    test_labels: Labels


def open_set(images: ImageSet, labels_per_class: int) -> OpenSetData:
    """The first images of each seen class are labelled; the order of `images` is drawn."""
    numbers = [CLASSES.index(name) for name in SEEN]
    chosen = [np.flatnonzero(images.labels == number)[:labels_per_class] for number in numbers]
    labelled = np.concatenate(chosen)
    rest = np.setdiff1d(np.arange(len(images.labels)), labelled)
    training = TrainingSet(
        images.images[labelled],
        np.repeat(np.arange(len(SEEN)), [len(part) for part in chosen]),
        images.images[rest],
    )
    seen = np.isin(images.test_labels, numbers)
    test_labels = np.array([numbers.index(label) for label in images.test_labels[seen]])
    foreign = int((~np.isin(images.labels[rest], numbers)).sum())
    return OpenSetData(training, foreign, images.test_images[seen], test_labels)


def trained(
    arm: str,
    data: OpenSetData,
    training: TrainingConfig,
    folder: Path,
    progress: Callable[[int], None],
) -> TrainedRun:
    """A whole run, the learned arm's in rounds as in the main job."""
    schedule: Schedule = "rounds" if arm == LEARNED.name else "online"
    rounds = ROUNDS if schedule == "rounds" else 1
    config = RunConfig(arm, 0, training.steps, len(SEEN), training, schedule, rounds)
    return make_schedule(config).fit(data.training, folder / f"openset-{arm}", progress)


def accuracy(run: TrainedRun, data: OpenSetData, device: torch.device) -> float:
    """Accuracy of the averaged classifier on the test images, 0 to 1."""
    labels = run.classify(data.test_images, device).argmax(dim=1).numpy()
    return float((labels == data.test_labels).mean())
