"""The runs of the benchmark: planned, trained, and what they say of images that they never saw."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from weighmatch.semisup.compute import relative_costs
from weighmatch.semisup.config import UNWEIGHTED, ArmName, TrainingConfig
from weighmatch.semisup.runs import Job, finish_all, make_jobs, one_thread, read_run
from weighmatch.semisup.scoring import score_images
from weighmatch.studies.benchmark_config import BenchmarkConfig, Cell

Arrays = dict[str, NDArray[Any]]
Checkpoint = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """A run of the benchmark.

    Attributes:
        job: what is trained.
        key: of the splits.
        stages: of the arm's schedule.
        cost: of the whole run, in steps of FixMatch.
    """

    job: Job
    key: str
    stages: int
    cost: float


def plan_runs(
    arms: Sequence[ArmName],
    benchmark: BenchmarkConfig,
    sets: Mapping[str, Mapping[str, Any]],
    training: TrainingConfig,
) -> list[Planned]:
    """Every run: the one place where arms and stages become jobs.

    Args:
        arms: those to be run, of `benchmark.arms`.
        benchmark: which stages.
        sets: by key, the arrays of a `TrainingSet`.
        training: the configuration of all.
    """
    planned = []
    # An operation count belongs to shapes and numbers of images, whatever they show.
    shapes = {
        key: (arrays["labelled_images"].shape, arrays["unlabelled_images"].shape)
        for key, arrays in sets.items()
    }
    for shape in dict.fromkeys(shapes.values()):
        alike = {key: arrays for key, arrays in sets.items() if shapes[key] == shape}
        jobs = make_jobs(arms, alike, training, benchmark.stages)
        if not jobs:
            continue
        costs: dict[tuple[str, int], float] = {}
        for stages in dict.fromkeys((1, *benchmark.stages)):
            with one_thread():
                counted = relative_costs(
                    arms, jobs[0].config.classes, training, jobs[0].data, stages
                )
            costs |= {(arm, stages): cost for arm, cost in zip(arms, counted, strict=True)}
        for job in jobs:
            cost = job.config.steps * costs[job.config.arm, job.stages]
            key = job.name.partition("-")[2]
            planned.append(Planned(job, key, job.stages, cost))
    return planned


def describe_runs(
    planned: Sequence[Planned], cells: Sequence[Cell], source: str
) -> list[dict[str, Any]]:
    """A row a run: `run` (its name), `key` (of its splits), `source`, `setting`, `regime`,
    `ratio`, `labels_per_class`, `arm`, `stages`, `steps`, `cost` (steps of FixMatch), `seed`.
    """
    by_key = {cell.key(seed): cell for cell in cells for seed in cell.data.seeds}
    rows = []
    for run in planned:
        cell, config = by_key[run.key], run.job.config
        rows.append(
            {
                "run": run.job.name,
                "key": run.key,
                "source": source,
                "setting": cell.setting,
                "regime": cell.data.regime,
                "ratio": float(cell.data.ratio),
                "labels_per_class": cell.data.labels_per_class,
                "arm": config.arm,
                "stages": run.stages,
                "steps": run.job.steps,
                "cost": run.cost,
                "seed": config.seed,
            }
        )
    return rows


def train_runs(
    planned: Sequence[Planned],
    folder: Path,
    workers: int | Literal["auto"],
    others: tuple[int, int],
) -> dict[str, Callable[[], Checkpoint]]:
    """Train what `folder` does not hold finished.

    Args:
        planned: which runs.
        folder: of their states.
        workers: see `finish_all`.
        others: see `finish_all`.

    Returns:
        By name, what reads a checkpoint from `folder`: hundreds together would fill the memory.
    """
    finish_all([run.job for run in planned], folder, workers, others)
    return {
        run.job.name: lambda run=run: _final_checkpoint(run, folder)  # type: ignore[misc]
        for run in planned
    }


def _final_checkpoint(run: Planned, folder: Path) -> Checkpoint:
    """What `Trainer.fit` returned, and the splits' key; of the pool only the last snapshot, with
    `labels`, the classes that the classifier sees in its images in the end.
    """
    result = read_run(run.job, folder)
    # Clones: a row of a table would be saved with the whole table.
    last = {
        name: result["history"][name][-1].clone()
        for name in ("weights", "confidence")
        if result["history"]["step"]
    }
    if last and run.job.config.arm != "oracle":
        with one_thread():
            scored = score_images(result, run.job.data.unlabelled_images)
        last["labels"] = torch.from_numpy(scored.probabilities.argmax(axis=1))
    kept = (
        "config",
        "image_shape",
        "classifier",
        "weighting",
        "seconds",
        "update_seconds",
        "ranker",
    )
    found = {name: result[name] for name in kept if name in result}
    return {"key": run.key, "pool": last, **found}


def predict(checkpoint: Checkpoint, images: Mapping[str, NDArray[np.uint8]]) -> Arrays:
    """What a run says of unseen images and, at its end, of its pool.

    Args:
        checkpoint: of `train_runs`.
        images: `test_images` and `heldout_images`.

    Returns:
        `test_probabilities` and `heldout_probabilities` (n, classes), `seconds` and
        `update_seconds` (); where there are any, `heldout_scores` (n,), which rank the held-out
        images, `pool_weights` (N,) of mean 1, `pool_labels` (N,), the classifier's last
        pseudo-labels, `pool_influence` and `pool_influence_variance` (N,), mean and variance of
        each image's measured influence, NaN where none was measured, and `mask_rate` (), the share
        of the pool with a confidence of at least τ (of the averaged classifier, not aligned).
    """
    config = checkpoint["config"]
    with one_thread():
        test = score_images(checkpoint, images["test_images"])
        heldout = score_images(checkpoint, images["heldout_images"])
    found: Arrays = {
        "test_probabilities": test.probabilities.astype(np.float32),
        "heldout_probabilities": heldout.probabilities.astype(np.float32),
        "seconds": np.array(checkpoint["seconds"]),
        "update_seconds": np.array(checkpoint["update_seconds"]),
    }
    if config["arm"] not in UNWEIGHTED:
        found["heldout_scores"] = heldout.scores.astype(np.float32)
    pool: dict[str, torch.Tensor] = checkpoint["pool"]
    if pool:
        passed = pool["confidence"] >= config["training"]["threshold"]
        found["mask_rate"] = np.array(float(passed.float().mean()))
    # The oracle's pool is another one than the truth describes.
    if pool and config["arm"] != "oracle":
        found["pool_weights"] = pool["weights"].numpy()
        found["pool_labels"] = pool["labels"].numpy()
    weighting = checkpoint["weighting"]
    if "evidence" in weighting:
        known = weighting["evidence"] > 0
        evidence = weighting["evidence"].clamp(min=1e-12)
        mean, square = weighting["influence"] / evidence, weighting["influence_square"] / evidence
        variance = (square - mean.square()).clamp(min=0)
        found["pool_influence"] = mean.masked_fill(~known, torch.nan).numpy()
        found["pool_influence_variance"] = variance.masked_fill(~known, torch.nan).numpy()
    return found
