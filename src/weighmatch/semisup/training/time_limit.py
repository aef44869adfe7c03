"""What fits into the time that somebody has (`runs.time_limit`).

Steps and seeds are chosen before training, in this order. Steps are taken from all seeds until each
run has half of those asked for. Then seeds are left out, the last ones first, until three are left.
Only then do runs have less than half of the steps. Steps come first as they cost each run a little,
and all runs alike; three instead of six folds make the interval of a comparison twice as wide
(t quantile × √(1/k + n_test / n_train), Nadeau & Bengio, 2003). A seed less comes before runs that
have hardly begun to converge. The size of images is settled before, see docs/own_images.md.

While runs are trained a deadline holds, see `deadline` and `jobs.finish_jobs`.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from weighmatch.arms import FIXMATCH, get_arm
from weighmatch.ray_engine import make_engine
from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.semisup.training.config import RunConfig, TrainingSet, pick_device
from weighmatch.semisup.training.deadline import CLOCK, Deadline
from weighmatch.semisup.training.jobs import plan_jobs
from weighmatch.semisup.training.loop import Run
from weighmatch.workers import one_thread

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]
# The shares of the limit at which training is planned to end, and is stopped; the rest is for
# scoring and the report.
PLANNED, STOPPED = 0.7, 0.85
# Several processes slow one another down by about this much.
CROWDING = 1.2
# Seconds of steps that are timed, after some that are not.
TIMED, WARM_UP = 3.0, 3
FEWEST_STEPS, FEWEST_SEEDS = 100, 3


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        steps: `training.steps` of the runs.
        seeds: the seeds that are trained.
        seconds: what a step of FixMatch takes here, shared out over all processes.
    """

    steps: int
    seeds: tuple[int, ...]
    seconds: float


def choose_runs(
    sets: Mapping[str, Arrays], training: TrainingConfig, runs: RunsConfig, folder: Path
) -> Choice | None:
    """The steps and seeds that fit into the time limit; None without a limit.

    What was chosen once for these settings, sets and this limit is kept in `folder`, so that a run
    that goes on, or is looked at again, has as many steps and seeds as before.

    Args:
        sets: by key, the arrays of a `TrainingSet`.
        training: the configuration; its steps are the most that are ever taken.
        runs: the runs to be done, with their limit.
        folder: where runs lie.
    """
    if runs.time_limit is None or not sets:
        return None
    asked = json.dumps([asdict(training), asdict(runs), sorted(sets)], sort_keys=True)
    path = folder / f"time_limit-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    choice = _kept(path)
    if choice is None:
        choice = _choose(sets, training, runs)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(asdict(choice)))
        os.replace(partial, path)
    log.info(
        "runs.time_limit %s: %d of %d steps a run, and %d of %d seeds",
        runs.time_limit,
        choice.steps,
        training.steps,
        len(choice.seeds),
        len(_seeds(sets)),
    )
    return choice


def make_deadline(
    choice: Choice, sets: Mapping[str, Arrays], training: TrainingConfig, runs: RunsConfig
) -> Deadline:
    """When the runs that need no clean pool have to end, so that there is time for the others.

    Args:
        choice: what is trained.
        sets: as in `choose_runs`.
        training: as in `choose_runs`.
        runs: as in `choose_runs`.
    """
    clean = tuple(arm for arm in runs.arms if get_arm(arm).knows_truth)
    cost = 0.0
    if clean:
        steps, later = replace(training, steps=choice.steps), replace(runs, arms=clean)
        cost = _count_sets(sets, choice.seeds) * _cost_of_a_set(sets, steps, later)
    ends = CLOCK.began() + STOPPED * runs.seconds() - cost * choice.seconds
    return Deadline(ends, choice.seconds)


def seed_of(key: str) -> int:
    """The seed of a set, from its key."""
    return int(key.rpartition("_")[2])


def _seeds(sets: Mapping[str, Arrays]) -> list[int]:
    return list(dict.fromkeys(map(seed_of, sets)))


def _kept(path: Path) -> Choice | None:
    try:
        kept = json.loads(path.read_text())
        return Choice(int(kept["steps"]), tuple(map(int, kept["seeds"])), float(kept["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing is kept, or nothing that can be read


def _choose(sets: Mapping[str, Arrays], training: TrainingConfig, runs: RunsConfig) -> Choice:
    seconds = _seconds_of_a_step(next(iter(sets.values())), training)
    device = pick_device(training.device).type
    workers = make_engine(runs, device).count() if runs.workers == "auto" else runs.workers
    shared = seconds * (CROWDING if workers > 1 else 1.0) / workers
    left = PLANNED * runs.seconds() - (CLOCK.now() - CLOCK.began())
    seeds = _seeds(sets)
    sizes = [_count_sets(sets, seeds[: count + 1]) for count in range(len(seeds))]
    # The cost of a set is a part that every step has and a part, such as ranking, that runs have.
    fewest = max(FEWEST_STEPS, runs.rounds)
    most = 2 * max(fewest, training.steps)
    low, high = (_cost_of_a_set(sets, replace(training, steps=n), runs) for n in (fewest, most))
    slope = (high - low) / (most - fewest)
    affordable = [int((left / shared / size - low) / slope) + fewest for size in sizes]
    half = max(fewest, training.steps // 2)
    counts = range(len(seeds), min(FEWEST_SEEDS, len(seeds)) - 1, -1)
    count = next((count for count in counts if affordable[count - 1] >= half), counts[-1])
    steps = min(training.steps, max(fewest, affordable[count - 1]))
    minutes = sizes[count - 1] * (low + slope * (steps - fewest)) * shared / 60
    log.info(
        "a step of FixMatch takes %.0f ms here; %d steps a run on %d seeds take about %.1f minutes",
        1000 * seconds,
        steps,
        count,
        minutes,
    )
    if affordable[count - 1] < fewest:
        log.warning(
            "runs.time_limit %s leaves %.0f s for training, and even %d steps of %d arms on %d "
            "seeds take about %.0f s, so that seeds may be left out; take fewer arms, or more time",
            runs.time_limit,
            max(left, 0),
            steps,
            len(runs.arms),
            count,
            60 * minutes,
        )
    return Choice(steps, tuple(seeds[:count]), shared)


def _count_sets(sets: Mapping[str, Arrays], seeds: Sequence[int]) -> int:
    return sum(seed_of(key) in seeds for key in sets)


def _cost_of_a_set(sets: Mapping[str, Arrays], training: TrainingConfig, runs: RunsConfig) -> float:
    """The cost of all runs of the first set, in steps of FixMatch; the others are about as dear."""
    first = dict(list(sets.items())[:1])
    return sum(job.cost for job in plan_jobs(runs.arms, first, training, runs))


def _seconds_of_a_step(arrays: Arrays, training: TrainingConfig) -> float:
    """Seconds of a step of FixMatch on this machine, on one thread."""
    data = TrainingSet.of(arrays)
    config = RunConfig(FIXMATCH.name, 0, 10_000, data.classes, replace(training, snapshots=1))
    with one_thread(), TemporaryDirectory() as folder:
        run = Run(config, data, Path(folder))
        run.train_steps(WARM_UP)
        began, done = time.monotonic(), 0
        while time.monotonic() - began < TIMED:
            run.train_steps(2)
            done += 2
        return (time.monotonic() - began) / done
