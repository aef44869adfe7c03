"""Nodes of `training`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weighmatch.arms import get_arm
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.semisup.feature_store import with_features, with_rows
from weighmatch.semisup.training.jobs import finish_jobs, plan_jobs, read_job
from weighmatch.semisup.training.time_limit import fit_steps

Arrays = dict[str, NDArray[Any]]
Runs = dict[str, Callable[[], TrainedRun]]


def train_arms(
    training_sets: dict[str, Arrays],
    features: Path,
    training: TrainingConfig,
    runs: RunsConfig,
    run_folder: str,
) -> tuple[Runs, pd.DataFrame]:
    """Train every arm on the contaminated pools, but those that need a clean one."""
    arms = [arm for arm in runs.arms if get_arm(arm).pool != "clean"]
    sets = with_features(training_sets, features)
    return _train(arms, sets, training, runs, run_folder)


def find_useful(ood_truth: dict[str, Arrays]) -> dict[str, Arrays]:
    """The positions of those images of each pool that are no OOD; none without a truth."""
    return {
        key: {"rows": np.flatnonzero(truth["pool_sources"] == 0)}
        for key, truth in ood_truth.items()
    }


def train_oracle(
    oracle_sets: dict[str, Arrays],
    training_sets: dict[str, Arrays],
    features: Path,
    training: TrainingConfig,
    runs: RunsConfig,
    run_folder: str,
) -> tuple[Runs, pd.DataFrame]:
    """Train the arms of a clean pool, if there are any among the arms."""
    arms = [arm for arm in runs.arms if get_arm(arm).pool == "clean"]
    sets = {
        key: with_rows(arrays, oracle_sets[key]["rows"])
        for key, arrays in with_features(training_sets, features).items()
        if key in oracle_sets
    }
    return _train(arms, sets, training, runs, run_folder)


def _train(
    arms: list[str],
    sets: Mapping[str, Arrays],
    training: TrainingConfig,
    runs: RunsConfig,
    run_folder: str,
) -> tuple[Runs, pd.DataFrame]:
    """By name, what reads a finished run; and a row a run."""
    training = fit_steps(sets, training, runs, Path(run_folder))
    jobs = plan_jobs(arms, sets, training, runs) if arms else []
    finish_jobs(jobs, Path(run_folder), runs.workers)
    columns = ["run", "key", "arm", "schedule", "seed", "steps", "cost"]
    rows = [
        (job.name, job.key, run.arm, run.schedule, run.seed, job.steps, job.cost)
        for job in jobs
        for run in [job.config]
    ]
    finished: Runs = {job.name: partial(read_job, job, Path(run_folder)) for job in jobs}
    return finished, pd.DataFrame(rows, columns=columns)
