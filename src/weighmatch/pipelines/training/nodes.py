"""Nodes of `training`."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
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
from weighmatch.semisup.training.config import TrainingSet
from weighmatch.semisup.training.jobs import (
    Job,
    cost_of,
    find_kept,
    finish_jobs,
    plan_jobs,
    read_job,
)
from weighmatch.semisup.training.time_limit import choose_runs, make_deadline, seed_of

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
Runs = dict[str, Callable[[], TrainedRun]]


def train_arms(
    training_sets: dict[str, Arrays],
    features: Path,
    training: TrainingConfig,
    runs: RunsConfig,
    run_folder: str,
) -> tuple[Runs, pd.DataFrame]:
    """Train every arm on the contaminated pools, but those that are told something of the truth.

    Under `runs.time_limit` runs may have fewer steps, and seeds may be left out.
    """
    arms = [arm for arm in runs.arms if not get_arm(arm).knows_truth]
    folder, deadline = Path(run_folder), None
    sets = with_features(training_sets, features)
    choice = choose_runs(sets, training, runs, folder)
    if choice is not None:
        deadline = make_deadline(choice, sets, training, runs)
        training = replace(training, steps=choice.steps)
        sets = {key: arrays for key, arrays in sets.items() if seed_of(key) in choice.seeds}
    jobs = plan_jobs(arms, sets, training, runs) if arms else []
    _say_which(jobs, folder)
    others = [arm for arm in runs.arms if arm not in arms]
    after = cost_of(others, sets, training, runs) if jobs else 0.0
    finished = finish_jobs(jobs, folder, runs.workers, (0.0, after), deadline, runs, runs.processes)
    late = sorted({job.seed for job in jobs} - {job.seed for job in finished})
    if late:
        log.warning(
            "the time of runs.time_limit %s is up: the seeds %s are left out; what is trained of "
            "them is kept, and the same command goes on with them, as does training.steps=%d "
            "without a limit",
            runs.time_limit,
            ", ".join(map(str, late)),
            training.steps,
        )
    return _hand_over(finished, folder)


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
    trained_runs: pd.DataFrame,
    training: TrainingConfig,
    runs: RunsConfig,
    run_folder: str,
) -> tuple[Runs, pd.DataFrame]:
    """Train the arms that are told of the truth, if there are any, on the sets of the others."""
    arms = [arm for arm in runs.arms if get_arm(arm).knows_truth]
    folder, trained = Path(run_folder), set(trained_runs["key"])
    whole = {
        key: arrays
        for key, arrays in with_features(training_sets, features).items()
        if key in oracle_sets and (key in trained or not trained)
    }
    clean = {key: with_rows(arrays, oracle_sets[key]["rows"]) for key, arrays in whole.items()}
    choice = choose_runs(clean, training, runs, folder) if arms else None
    if choice is not None:
        training = replace(training, steps=choice.steps)
    told = {
        key: {**arrays, "useful_share": np.array(_pool_size(clean[key]) / _pool_size(arrays))}
        for key, arrays in whole.items()
    }
    jobs = [
        job
        for pool, sets in (("clean", clean), ("told", told))
        for job in plan_jobs(
            [arm for arm in arms if get_arm(arm).pool == pool], sets, training, runs
        )
    ]
    _say_which(jobs, folder)
    # One bar for the runs of both nodes; those of clean pools come last.
    others = [arm for arm in runs.arms if arm not in arms]
    before = cost_of(others, whole, training, runs) if jobs else 0.0
    finished = finish_jobs(jobs, folder, runs.workers, (before, 0.0), None, runs, runs.processes)
    return _hand_over(finished, folder)


def _pool_size(arrays: Mapping[str, NDArray[Any]]) -> int:
    return TrainingSet.of(arrays).pool_size


def _say_which(jobs: list[Job], folder: Path) -> None:
    """Say which runs are used where others of the same names lie beside them."""
    kept = find_kept(jobs, folder)
    if not kept.older:
        return
    used = [f"{path.name}{' (new)' if path in kept.new else ''}" for path in kept.new + kept.known]
    log.warning(
        "%d runs are new and %d go on or are read, such as %s; %d runs of other data, settings or "
        "code are kept beside them in %s, such as %s. Ranking and report are made of the runs of "
        "this command and replace those that lie there; --params data_folder=… keeps both",
        len(kept.new),
        len(kept.known),
        used[0],
        len(kept.older),
        folder,
        kept.older[0].name,
    )


def _hand_over(jobs: list[Job], folder: Path) -> tuple[Runs, pd.DataFrame]:
    """By name, what reads a finished run; and a row a run."""
    columns = ["run", "key", "arm", "schedule", "seed", "steps", "cost"]
    rows = [
        (job.name, job.key, run.arm, run.schedule, run.seed, job.steps, job.cost)
        for job in jobs
        for run in [job.config]
    ]
    finished: Runs = {job.name: partial(read_job, job, folder) for job in jobs}
    return finished, pd.DataFrame(rows, columns=columns)
