"""Many runs: planned from arms, seeds and schedules, trained several at a time, read one by one."""

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from weighmatch.arms import Arm, get_arm
from weighmatch.checks import ToldError
from weighmatch.engine_config import EngineConfig
from weighmatch.ray_engine import Engine
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.semisup.parts.group import Group
from weighmatch.semisup.parts.state_file import DamagedFileError, read_state
from weighmatch.semisup.training.compute import Sizes, matched_steps, relative_cost
from weighmatch.semisup.training.config import RunConfig, TrainingSet, fingerprint, pick_device
from weighmatch.semisup.training.deadline import CLOCK, Deadline, TimeUpError
from weighmatch.semisup.training.dividing import count_processes, require_divisible
from weighmatch.semisup.training.loop import CHECKPOINT
from weighmatch.semisup.training.processes import Team, together
from weighmatch.semisup.training.ray_train import make_runner
from weighmatch.semisup.training.rounds import beyond
from weighmatch.semisup.training.schedules import RUN, make_schedule
from weighmatch.workers import one_thread

log = logging.getLogger(__name__)

# Bytes from which a pool is shared by processes rather than sent to each of them.
LARGE = 2**24
# How many unfinished runs are named.
NAMED = 4

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
    def seed(self) -> int:
        """The seed of the run."""
        return self.config.seed

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
    planned = []
    for arm in map(get_arm, arms):
        if arm.schedules_among(runs.schedule):
            planned.append(arm)
        else:
            log.warning("%s is left out: it can only be trained in rounds", arm.name)
    jobs: list[Job] = []
    for key, arrays in sets.items():
        data, seed = TrainingSet.of(arrays), int(key.rpartition("_")[2])
        sizes = Sizes.of(data, data.classes, training)
        for arm in planned:
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


def cost_of(
    arms: Sequence[str], sets: Mapping[str, Arrays], training: TrainingConfig, runs: RunsConfig
) -> float:
    """The cost of all runs of these arms, in steps of FixMatch; sets are as large as the first."""
    first = dict(list(sets.items())[:1])
    able = [arm for arm in arms if get_arm(arm).schedules_among(runs.schedule)]
    return len(sets) * sum(job.cost for job in plan_jobs(able, first, training, runs))


@dataclass(frozen=True)
class Kept:
    """What lies in a folder of runs beside the runs of some jobs.

    Attributes:
        new: the folders of jobs of which nothing lies there.
        known: the folders of the others, which go on or are read.
        older: the folders of runs of the same names, of other data, settings or code.
    """

    new: list[Path]
    known: list[Path]
    older: list[Path]


def find_kept(jobs: Sequence[Job], folder: Path) -> Kept:
    """Tell the runs of jobs from older ones of the same names, which nothing ever removes."""
    _hash_pools(jobs)
    mine = {job.folder(folder): job.name for job in jobs}
    # The name of a folder ends in the 16 digits of a fingerprint.
    alike = {path for name in mine.values() for path in folder.glob(f"{name}-{'?' * 16}")}
    return Kept(
        new=[path for path in mine if path not in alike],
        known=[path for path in mine if path in alike],
        older=sorted(alike - mine.keys()),
    )


def finish_jobs(
    jobs: Sequence[Job],
    folder: Path,
    workers: int | Literal["auto"] = "auto",
    others: tuple[float, float] = (0.0, 0.0),
    deadline: Deadline | None = None,
    engine: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
    processes: int = 1,
) -> list[Job]:
    """Train every job, `workers` at a time; what `folder` holds finished is not trained again.

    Nothing is kept in memory: `read_job` has the results, one at a time.

    Args:
        jobs: jobs with different names.
        folder: each run resumes from, and writes to, `Job.folder`.
        workers: processes; 1 trains in this one; "auto": one a core, a single one on a GPU, or as
            many as a cluster has room for.
        others: cost of the runs that another call has done, and that another call will do, which
            the progress bar and its time left count too.
        deadline: when training has to end, or None. Seeds that would not end in time are left out
            with all of their jobs; another call goes on with them.
        engine: where the runs are done. Machines that share `folder` resume a run from the
            checkpoints of another; a machine that does not sends its finished runs back.
        processes: how many train a run together, on this machine or on a cluster; more than one
            train one run at a time.

    Returns:
        The jobs that are finished, in the order of `jobs`.

    Raises:
        ToldError: if several processes have a deadline or a batch that is too small for them, or
            those of torchrun have a cluster.
        KeyboardInterrupt: with a note that says which runs are finished and where others go on.
    """
    if not jobs:
        return []
    _hash_pools(jobs)
    device = pick_device(jobs[0].config.training.device).type
    if all(kept_steps(job, folder) == job.steps for job in jobs):
        processes = 1
    else:
        runs = [(job.config.arm, job.config.schedule) for job in jobs]
        count = count_processes(processes)
        training, pool = jobs[0].config.training, min(job.data.pool_size for job in jobs)
        require_divisible(count, training, runs, limited=deadline is not None, pool=pool)
    runner = make_runner(engine, device, processes)
    with together(1 if runner.far else processes, device) as team:
        count = max(processes, team.group.size)
        if team.group.size > 1 and runner.far:
            raise ToldError(
                "the processes of torchrun train together themselves; leave out runs.engine, or "
                "start without torchrun and set runs.processes"
            )
        return _finish(jobs, folder, 1 if count > 1 else workers, others, deadline, runner, team)


def _finish(
    jobs: Sequence[Job],
    folder: Path,
    workers: int | Literal["auto"],
    others: tuple[float, float],
    deadline: Deadline | None,
    runner: Engine,
    team: Team,
) -> list[Job]:
    """`finish_jobs` with its engine and the processes that train a run together."""
    planned = jobs
    count = min(runner.count() if workers == "auto" else workers, len(jobs))
    if runner.far:
        jobs = _unmapped(jobs)
    elif count > 1 or team.group.size > 1:
        jobs = [_shared(job, folder) for job in jobs]
    kept = [kept_steps(job, folder) for job in jobs]
    state = f": {_in_words(jobs, kept)}" if any(kept) else ""
    log.info("training %d runs, %d at a time%s", len(jobs), count, state)
    before, after = others
    total = before + sum(job.cost for job in jobs) + after
    done = before + sum(job.cost * k / job.steps for job, k in zip(jobs, kept, strict=True))
    # The longest first, so that no core waits at the end; under a deadline seed by seed.
    seeds = list(dict.fromkeys(job.seed for job in jobs)) if deadline else []
    order = sorted(jobs, key=lambda job: (seeds.index(job.seed) if seeds else 0, -job.cost))
    admission = _Admission(order, deadline or Deadline(float("inf"), 0.0))
    known = dict(zip((job.name for job in jobs), kept, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".seen-{uuid4().hex}"
    mark.touch()
    calls = [
        (job, folder, known[job.name], admission.ends(k), mark, team) for k, job in enumerate(order)
    ]

    def skips(position: int) -> bool:
        job = order[position]
        # Another machine may not see that a run is finished, and would train it again.
        return admission.skips(position) or (runner.far and known[job.name] == job.steps)

    answers = runner.run_all(
        _train,
        calls,
        workers,
        title="training",
        total=total,
        done=done,
        skips=skips,
    )
    try:
        for position, finished in answers:
            if isinstance(finished, bytes):
                _write(order[position].folder(folder) / RUN, finished)
            elif not finished:
                admission.left_out.add(order[position].seed)
    except KeyboardInterrupt as stopped:
        now = [kept_steps(job, folder) for job in jobs]
        stopped.add_note(f"Of {len(jobs)} runs, {_in_words(jobs, now)}")
        raise
    finally:
        mark.unlink(missing_ok=True)
    shutil.rmtree(folder / "pools", ignore_errors=True)
    return [job for job in planned if job.seed not in admission.left_out]


class _Admission:
    """Decides, as each job's turn comes, whether it is begun; seeds are left out as a whole.

    The first seed is always trained to the end, so that there is a result. Another one is begun if
    all of its runs are expected to end in time.

    Args:
        jobs: in the order in which they are begun, those of a seed one after another.
        deadline: when training has to end.

    Attributes:
        left_out: the seeds that are not trained, or not to the end.
    """

    def __init__(self, jobs: Sequence[Job], deadline: Deadline) -> None:
        self._jobs, self._deadline = jobs, deadline
        self._costs: dict[int, float] = defaultdict(float)
        for job in jobs:
            self._costs[job.seed] += job.cost
        self._begun = {jobs[0].seed}
        self.left_out: set[int] = set()

    def skips(self, position: int) -> bool:
        """Whether the job at this position is not to begin."""
        seed = self._jobs[position].seed
        if seed in self.left_out:
            return True
        if seed == self._jobs[0].seed:
            return False
        needed = 0.0 if seed in self._begun else self._costs[seed]
        if not self._deadline.allows(needed):
            self.left_out.add(seed)
            return True
        self._begun.add(seed)
        return False

    def ends(self, position: int) -> float:
        """When the job at this position is stopped; infinity for the first seed."""
        first = self._jobs[position].seed == self._jobs[0].seed
        return float("inf") if first else self._deadline.ends


def _hash_pools(jobs: Sequence[Job]) -> None:
    """Hash each pool here and once, however many sets have it; no worker process does so again."""
    first: dict[int, TrainingSet] = {}
    for data in (job.data for job in jobs):
        other = first.setdefault(id(data.unlabelled_images), data)
        data.__dict__["images_fingerprint"] = other.images_fingerprint


def kept_steps(job: Job, folder: Path) -> int:
    """Steps of all stages that `folder` keeps of a job, so that they are not done again."""
    place, config = job.folder(folder), job.config
    if (place / RUN).exists():
        return job.steps
    if config.schedule == "two_stages":
        return sum(_step_in(place / stage) for stage in ("first_stage", "second_stage"))
    if config.schedule != "rounds":
        return _step_in(place)
    for number in reversed(range(config.rounds)):
        step = _step_in(place / f"round_{number}")
        if step:
            begin, end = (n * config.steps // config.rounds for n in (number, number + 1))
            # As long as nothing is dropped, rounds count on from one another.
            return step if step > end - begin else begin + step
    return 0


def _step_in(folder: Path) -> int:
    """The step of a checkpoint; 0 if there is none, or a damaged one."""
    state = None
    with suppress(DamagedFileError):
        state = read_state(folder / CHECKPOINT)
    return 0 if state is None else int(state["step"])


def _in_words(jobs: Sequence[Job], kept: Sequence[int]) -> str:
    """How far runs are, as `5 are finished, a goes on from step 40 of 100, 3 begin anew`."""
    pairs = list(zip(jobs, kept, strict=True))
    going = [(job, steps) for job, steps in pairs if 0 < steps < job.steps]
    finished = sum(steps >= job.steps for job, steps in pairs)
    more, new = max(len(going) - NAMED, 0), len(jobs) - finished - len(going)
    parts = [f"{finished} {'is' if finished == 1 else 'are'} finished"] if finished else []
    parts += [f"{job.name} goes on from step {n} of {job.steps}" for job, n in going[:NAMED]]
    parts += [f"{more} more {'goes' if more == 1 else 'go'} on"] if more else []
    parts += [f"{new} {'begins' if new == 1 else 'begin'} anew"] if new else []
    return ", ".join(parts)


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


def _unmapped(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with their images in memory, from where they travel to other machines."""
    known: dict[int, TrainingSet] = {}
    for data in (job.data for job in jobs):
        if id(data) not in known:
            images: Any = [np.asarray(data.labelled_images), np.asarray(data.unlabelled_images)]
            known[id(data)] = replace(data, labelled_images=images[0], unlabelled_images=images[1])
            known[id(data)].__dict__["images_fingerprint"] = data.images_fingerprint
    return [replace(job, data=known[id(job.data)]) for job in jobs]


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _train(
    job: Job,
    folder: Path,
    kept: int,
    ends: float,
    mark: Path,
    team: Team,
    progress: Callable[[float], None],
) -> bool | bytes:
    """Train a job; whether it was finished before the time `ends`.

    A machine that does not see the file `mark` has a folder of its own: the file of the finished
    run is returned then.

    Progress is told in parts of the job's cost, without the steps that were `kept`.
    """
    told = beyond(kept, lambda steps: progress(steps * job.cost / job.steps))

    def report(steps: int) -> None:
        told(steps)
        if CLOCK.now() > ends:
            raise TimeUpError

    team.also(_fit, job, folder)
    try:
        _fit(job, folder, team.group, report)
    except TimeUpError:
        return False
    seen = mark.exists() or not team.group.first
    return True if seen else (job.folder(folder) / RUN).read_bytes()


def _fit(
    job: Job, folder: Path, group: Group, progress: Callable[[int], None] = lambda steps: None
) -> None:
    """Train a job as a member of a group."""
    config = replace(job.config, group=group)
    make_schedule(config).fit(job.data, job.folder(folder), progress)
