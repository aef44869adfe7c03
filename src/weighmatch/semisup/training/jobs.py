"""Many runs: planned from arms, seeds and schedules, trained several at a time, read one by one."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from weighmatch.arms import Arm, get_arm
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.semisup.training.compute import Sizes, matched_steps, relative_cost
from weighmatch.semisup.training.config import RunConfig, TrainingSet, fingerprint, pick_device
from weighmatch.semisup.training.schedules import make_schedule
from weighmatch.workers import default_workers, one_thread, run_all

log = logging.getLogger(__name__)

# Bytes from which a pool is shared by processes rather than sent to each of them.
LARGE = 2**24

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Job:
    """One run to be done.

    Attributes:
        name: its name, `<arm>-<schedule>-<key>`.
        key: the key of its data.
        config: what defines the run.
        data: what it trains on.
        cost: operations of the whole run, in steps of FixMatch.
    """

    name: str
    key: str
    config: RunConfig
    data: TrainingSet
    cost: float

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return self.config.first_steps + self.config.steps

    def folder(self, runs: Path) -> Path:
        """Where its state lies among all runs."""
        return runs / f"{self.name}-{fingerprint(self.config, self.data)}"


def plan_jobs(
    arms: Sequence[str], sets: Mapping[str, Arrays], training: TrainingConfig, runs: RunsConfig
) -> list[Job]:
    """One job a set, arm and schedule that the arm can be trained in.

    Args:
        arms: names of arms.
        sets: by a key that ends in `_<seed>`, the arrays of a `TrainingSet`.
        training: the configuration that all share.
        runs: schedules and number of rounds. Arms whose compute is "matched" or "doubled" have
            that of the dearest of the learned arm's schedules, or twice it.
    """
    for arm in map(get_arm, arms):
        if not arm.schedules_among(runs.schedule):
            log.warning("%s is left out: it can only be trained in rounds", arm.name)
    jobs: list[Job] = []
    first: dict[int, TrainingSet] = {}
    for key, arrays in sets.items():
        data, seed = TrainingSet(**dict[str, Any](arrays)), int(key.rpartition("_")[2])
        # A pool that several sets have is hashed once, and no worker process hashes it again.
        pool = first.setdefault(id(data.unlabelled_images), data).images_fingerprint
        data.__dict__["images_fingerprint"] = pool
        sizes = Sizes.of(data, data.classes, training)
        for arm in map(get_arm, arms):
            with one_thread():
                steps = _steps(arm, runs, sizes)
                for schedule in arm.schedules_among(runs.schedule):
                    rounds = runs.rounds if schedule == "rounds" else 1
                    config = RunConfig(
                        arm.name, seed, steps, data.classes, training, schedule, rounds
                    )
                    cost = steps * relative_cost(arm, schedule, rounds, sizes)
                    jobs.append(Job(f"{arm.name}-{schedule}-{key}", key, config, data, cost))
    return jobs


def _steps(arm: Arm, runs: RunsConfig, sizes: Sizes) -> int:
    if arm.compute == "equal":
        return sizes.training.steps
    matched = max(matched_steps(schedule, runs.rounds, sizes) for schedule in runs.schedule)
    return matched if arm.compute == "matched" else 2 * matched


def finish_jobs(
    jobs: Sequence[Job],
    folder: Path,
    workers: int | Literal["auto"] = "auto",
    others: tuple[int, int] = (0, 0),
) -> None:
    """Train every job, `workers` at a time; what `folder` holds finished is not trained again.

    Nothing is kept in memory: `read_job` has the results, one at a time.

    Args:
        jobs: jobs with different names.
        folder: each run resumes from, and writes to, `Job.folder`.
        workers: processes; 1 trains in this one; "auto": one a core, a single one on a GPU.
        others: steps of runs that another call has done, and that another call will do, which
            the progress bar and its time left count too.
    """
    if not jobs:
        return
    if workers == "auto":
        workers = default_workers(pick_device(jobs[0].config.training.device).type)
    if min(workers, len(jobs)) > 1:
        jobs = [_shared(job, folder) for job in jobs]
    log.info("training %d runs, %d at a time", len(jobs), min(workers, len(jobs)))
    before, after = others
    # The longest first, so that no core waits at the end.
    order = sorted(jobs, key=lambda job: -job.cost)
    calls = [(job, folder) for job in order]
    total = before + sum(job.steps for job in jobs) + after
    title = f"training {len(jobs)} runs"
    for _ in run_all(_train, calls, workers, title=title, total=total, unit="step", done=before):
        pass
    shutil.rmtree(folder / "pools", ignore_errors=True)


def _shared(job: Job, folder: Path) -> Job:
    """The job with a large pool in a file, which all processes map instead of holding a copy."""
    if job.data.unlabelled_images.nbytes < LARGE or isinstance(
        job.data.unlabelled_images, np.memmap
    ):
        return job
    return replace(job, data=job.data.mapped(folder / "pools"))


def read_job(job: Job, folder: Path) -> TrainedRun:
    """The finished run of a job; it is finished first where `finish_jobs` did not.

    Raises:
        DamagedFileError: if its files are damaged.
    """
    with one_thread():
        return make_schedule(job.config).fit(job.data, job.folder(folder))


def _train(job: Job, folder: Path, progress: Callable[[int], None]) -> None:
    make_schedule(job.config).fit(job.data, job.folder(folder), progress)
