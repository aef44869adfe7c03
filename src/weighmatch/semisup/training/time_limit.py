"""How many steps fit into the time that somebody has (`runs.time_limit`)."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from weighmatch.arms import FIXMATCH
from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.semisup.training.config import RunConfig, TrainingSet, pick_device
from weighmatch.semisup.training.jobs import plan_jobs
from weighmatch.semisup.training.loop import Run
from weighmatch.workers import default_workers, one_thread

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]
# What training may take of the limit; the rest is for reading images, scoring and the report.
SHARE = 0.8
# Several processes slow one another down by about this much.
CROWDING = 1.2
# Seconds of steps that are timed, after some that are not.
TIMED, WARM_UP = 3.0, 3
FEWEST_STEPS = 100


def fit_steps(
    sets: Mapping[str, Arrays], training: TrainingConfig, runs: RunsConfig, folder: Path
) -> TrainingConfig:
    """The configuration with no more steps than fit into the time limit, if there is one.

    What was chosen once for these settings, sets and this limit is kept in `folder`, so that a run
    that goes on, or is looked at again, has as many steps as before.

    Args:
        sets: by key, the arrays of a `TrainingSet`.
        training: the configuration; its steps are the most that are ever taken.
        runs: the runs to be done, with their limit.
        folder: where runs lie.
    """
    if runs.time_limit is None or not sets:
        return training
    asked = json.dumps([asdict(training), asdict(runs), sorted(sets)], sort_keys=True)
    path = folder / f"time_limit-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    steps = _kept(path)
    if steps is None:
        steps = _choose(sets, training, runs)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({"steps": steps}))
        os.replace(partial, path)
    log.info("runs.time_limit %s: %d steps of %d", runs.time_limit, steps, training.steps)
    return replace(training, steps=steps)


def _kept(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing is kept, or nothing that can be read


def _choose(sets: Mapping[str, Arrays], training: TrainingConfig, runs: RunsConfig) -> int:
    seconds = _seconds_of_a_step(next(iter(sets.values())), training)
    # The cost of runs is a part that every step has and a part, such as ranking, that runs have.
    half = max(FEWEST_STEPS, training.steps // 2)
    whole_cost, half_cost = (_cost(sets, replace(training, steps=n), runs) for n in
                             (2 * half, half))  # fmt: skip
    slope = (whole_cost - half_cost) / half
    fixed = half_cost - slope * half
    device = pick_device(training.device).type
    workers = default_workers(device) if runs.workers == "auto" else runs.workers
    crowding = CROWDING if workers > 1 else 1.0
    affordable = SHARE * runs.seconds() * workers / (seconds * crowding)
    steps = int((affordable - fixed) / slope)
    fewest = max(FEWEST_STEPS, runs.rounds)
    chosen = min(training.steps, max(fewest, steps))
    minutes = (fixed + slope * chosen) * seconds * crowding / workers / 60
    log.info(
        "a step of FixMatch takes %.0f ms here; %d steps a run take about %.1f minutes in all",
        1000 * seconds,
        chosen,
        minutes,
    )
    if steps < fewest:
        log.warning(
            "runs.time_limit %s is too short for %d arms on %d sets: even %d steps take about %.0f "
            "minutes; take fewer arms or seeds, or smaller images",
            runs.time_limit,
            len(runs.arms),
            len(sets),
            chosen,
            minutes,
        )
    return chosen


def _cost(sets: Mapping[str, Arrays], training: TrainingConfig, runs: RunsConfig) -> float:
    """The cost of all runs, in steps of FixMatch; sets are about as large as the first."""
    first = dict(list(sets.items())[:1])
    return len(sets) * sum(job.cost for job in plan_jobs(runs.arms, first, training, runs))


def _seconds_of_a_step(arrays: Arrays, training: TrainingConfig) -> float:
    """Seconds of a step of FixMatch on this machine, on one thread."""
    data = TrainingSet(**dict[str, Any](arrays))
    config = RunConfig(FIXMATCH.name, 0, 10_000, data.classes, replace(training, snapshots=1))
    with one_thread(), TemporaryDirectory() as folder:
        run = Run(config, data, Path(folder))
        run.train_steps(WARM_UP)
        began, done = time.monotonic(), 0
        while time.monotonic() - began < TIMED:
            run.train_steps(2)
            done += 2
        return (time.monotonic() - began) / done
