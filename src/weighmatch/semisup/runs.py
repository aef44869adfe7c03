"""Many runs at once: one process a core, one thread each, resumed run by run."""

import functools
import logging
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from weighmatch.semisup.compute import matched_steps
from weighmatch.semisup.config import (
    ARMS,
    REALIGNED,
    RESTARTED,
    ArmName,
    TrainingConfig,
    schedules,
)
from weighmatch.semisup.rounds import RoundsTrainer
from weighmatch.semisup.trainer import (
    RunConfig,
    Trainer,
    TrainingSet,
    fingerprint,
    pick_device,
)
from weighmatch.semisup.two_stages import TwoStageTrainer

log = logging.getLogger(__name__)

# FixMatch with the compute of `learned`.
AS_DEAR: tuple[ArmName, ...] = ("fixmatch_matched", REALIGNED, RESTARTED)


@dataclass(frozen=True)
class Job:
    """One run to be done."""

    name: str
    config: RunConfig
    data: TrainingSet
    stages: int = 1

    @property
    def steps(self) -> int:
        """Of all stages."""
        first = TwoStageTrainer(self.config).first_steps if self.stages == 2 else 0
        return first + self.config.steps


def make_jobs(
    arms: Sequence[ArmName],
    sets: Mapping[str, Mapping[str, Any]],
    training: TrainingConfig,
    stages: Sequence[int] = (1,),
) -> list[Job]:
    """One job a seed, arm and, of the weighted arms, schedule.

    Args:
        arms: what to run.
        sets: by a key that ends in `_<seed>`, the arrays of a `TrainingSet`.
        training: the configuration that all share.
        stages: schedules, each 1, 2 or a number of rounds; `fixmatch_matched`,
            `fixmatch_realigned` and `fixmatch_rounds` have the compute of the dearest of `learned`.
    """
    jobs: list[Job] = []
    matched = 0
    for arm in arms:
        if not schedules(arm, stages):
            log.warning("%s is left out: it takes rounds, which are 3 stages or more", arm)
    for key, arrays in sets.items():
        data, seed = TrainingSet(**arrays), int(key.rpartition("_")[2])
        classes = int(data.labels.max()) + 1
        if not matched and {*AS_DEAR, "fixmatch_converged"} & set(arms):
            # The same for every seed: their data have the same shapes.
            with one_thread():
                matched = max(matched_steps(classes, training, data, count) for count in stages)
        steps = {**dict.fromkeys(AS_DEAR, matched), "fixmatch_converged": 2 * matched}
        for arm in arms:
            config = RunConfig(arm, seed, steps.get(arm, training.steps), classes, training)
            for count in schedules(arm, stages):
                name = arm if count == 1 else f"{arm}_{count}_stages"
                jobs.append(Job(f"{name}-{key}", config, data, count))
    return jobs


def train_all(
    jobs: Sequence[Job], folder: Path, workers: int | Literal["auto"] = "auto"
) -> dict[str, dict[str, Any]]:
    """Train every job as `finish_all` does.

    Returns:
        `Trainer.fit`'s answer by the name of the job, in the order of `jobs`.
    """
    finish_all(jobs, folder, workers)
    return {job.name: read_run(job, folder) for job in jobs}


def finish_all(
    jobs: Sequence[Job],
    folder: Path,
    workers: int | Literal["auto"] = "auto",
    others: tuple[int, int] = (0, 0),
) -> None:
    """Train every job, `workers` at a time; what `folder` holds finished is not trained again.

    Nothing is kept in memory: `read_run` has the results, one at a time.

    Args:
        jobs: with different names.
        folder: each run resumes from, and writes to, `folder/<name>-<fingerprint>`.
        workers: processes; 1 trains in this one; "auto": one a core, a single one on a GPU.
        others: steps of runs that another call has done, and that another call will do, which
            the progress bar and its time left count too.
    """
    if not jobs:
        return
    if workers == "auto":
        workers = default_workers(pick_device(jobs[0].config.training.device))
    at_once = max(1, min(workers, len(jobs)))
    log.info("training %d runs, %d at a time", len(jobs), at_once)
    before, after = others
    total = before + sum(job.steps for job in jobs) + after
    description = f"training {len(jobs)} runs"
    with tqdm(total=total, initial=before, desc=description, unit="step", mininterval=0.5) as bar:
        if at_once > 1:
            _train_in_processes(jobs, folder, at_once, bar)
            return
        with one_thread():
            for job in jobs:
                _train(job, folder, bar.update)


def read_run(job: Job, folder: Path) -> dict[str, Any]:
    """`Trainer.fit`'s answer for a job that `finish_all` has trained."""
    return _train(job, folder, lambda _: None)


def _train(job: Job, folder: Path, progress: Any) -> dict[str, Any]:
    directory = folder / f"{job.name}-{fingerprint(job.config, job.data)}"
    trainer: Trainer | TwoStageTrainer | RoundsTrainer = Trainer(job.config)
    if job.stages == 2:
        trainer = TwoStageTrainer(job.config)
    elif job.stages > 2:
        trainer = RoundsTrainer(job.config, job.stages)
    return trainer.fit(job.data, directory, progress)


def _train_in_processes(jobs: Sequence[Job], folder: Path, workers: int, bar: "tqdm[Any]") -> None:
    pool, steps = _pool(workers)
    # The longest first (`ARMS` goes from cheap to dear), so that no core waits at the end.
    order = sorted(jobs, key=lambda job: (-job.steps, -ARMS.index(job.config.arm)))
    try:
        pending: set[Future[None]] = {pool.submit(_work, job, folder) for job in order}
        while pending:
            done, pending = wait(pending, timeout=0.3, return_when=FIRST_EXCEPTION)
            _drain(steps, bar)
            for future in done:
                future.result()
        _drain(steps, bar)
    except BaseException:
        _end_pool(pool)
        raise


@functools.lru_cache(maxsize=1)
def _pool(workers: int) -> tuple[ProcessPoolExecutor, Any]:
    """Workers and the queue that they report steps on; kept, since they take seconds to start."""
    context = multiprocessing.get_context("spawn")
    steps = context.Queue()
    initial = (os.getpid(), steps)
    return ProcessPoolExecutor(workers, context, _start_worker, initial), steps


def _end_pool(pool: ProcessPoolExecutor) -> None:
    """Stop the workers at once: their runs resume from their last checkpoints."""
    _pool.cache_clear()
    processes = list(pool._processes.values())  # ProcessPoolExecutor.kill_workers is of 3.14
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()


def _drain(steps: Any, bar: "tqdm[Any]") -> None:
    while True:
        try:
            bar.update(steps.get_nowait())
        except queue.Empty:
            return


_report: Any = None


def _start_worker(parent: int, steps: Any) -> None:
    global _report
    _report = steps
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this process when the one that started it is gone, even if it was killed.

    Otherwise an orphan would go on writing to the folder that a restarted run resumes from.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(job: Job, folder: Path) -> None:
    _train(job, folder, _report.put)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: small images gain nothing from more, and results then do not depend
    on how many cores there are or whether runs share them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_workers(device: torch.device) -> int:
    """One process a core on the CPU; on a GPU a single one."""
    if device.type == "cuda":
        return 1
    # What this process may use, where the system tells (Linux), else what there is.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
