"""One runner of many jobs: worker processes of one thread each, which may be killed and go on.

Workers end with the process that started them. A worker that is killed is started again, and its
job is done again; a job that fails ends all the others.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NoReturn, TypeVar, cast

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from weighmatch.checks import ToldError

log = logging.getLogger(__name__)

T = TypeVar("T")
# How often a worker is started again for the same job.
MAX_RESTARTS = 2
# Seconds between two reports of a worker's progress, and between two looks for its parent.
REPORT_INTERVAL, WATCH_INTERVAL = 0.2, 0.5
# The bar of all jobs together, with the time that is left.
BAR = "{desc}: {percentage:3.0f} % |{bar:30}| {elapsed} so far, {remaining} left"
# What torch says where it gets no memory: itself on the CPU and on a GPU, its convolutions (oneDNN)
# and C++.
NO_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory"),
    *("could not create a primitive", "could not create a memory", "bad_alloc"),
)


class WorkerError(ToldError, RuntimeError):
    """A worker that was killed or got no memory; the message says how to go on."""


def run_all(
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    workers: int | Literal["auto"] = "auto",
    *,
    title: str,
    total: float,
    done: float = 0,
    skips: Callable[[int], bool] = lambda position: False,
) -> Iterator[tuple[int, T]]:
    """Do every job, several at a time, and hand over each answer as soon as it is there.

    A single worker, or a single job, runs in this process, on one thread.

    Args:
        function: a function of a module, called as `function(*job, progress)`; `progress(n)`
            says that it has done `n` more units.
        jobs: the arguments of the calls; they are begun in this order, so put the longest first.
        workers: number of processes; "auto": one a core.
        title: what the progress bar is called.
        total: units of all jobs together, those of `done`, and those of a later call that goes on
            with the bar.
        done: units that were done before this call.
        skips: asked with the position of a job when its turn comes; one that is skipped is not
            begun and has no answer.

    Yields:
        The position of a job and its answer, in the order in which they are done.

    Raises:
        WorkerError: if the worker of a job is killed more than `MAX_RESTARTS` times, or gets no
            memory.
        Exception: what a job raised; the other workers have been ended by then.
    """
    if not jobs:
        return
    count = min(default_workers() if workers == "auto" else workers, len(jobs))
    with progress_bar(title, total, done) as bar:
        if count > 1:
            yield from _run_in_processes(function, jobs, count, bar, skips)
        else:
            for position, job in enumerate(jobs):
                if skips(position):
                    continue
                with one_thread():
                    answer = function(*job, bar.update)
                yield position, answer


@contextmanager
def progress_bar(title: str, total: float, done: float) -> "Iterator[tqdm[Any]]":
    """The bar of all jobs together, with the time that is left; see `run_all`."""
    # A file gets a line now and then, and no lines that overwrite one another.
    often = 0.5 if sys.stderr.isatty() else 30
    total *= 1 + 1e-9  # parts that are added up may come to a little more than the whole
    with (
        logging_redirect_tqdm(),  # a line of the log begins a line of the terminal
        tqdm(
            total=total, initial=done, desc=title, bar_format=BAR, mininterval=often, smoothing=0.1
        ) as bar,
    ):
        yield bar
        # Another call goes on with a bar that is not full.
        bar.leave = round(bar.n) >= round(total)


def run_in_order(
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    workers: int | Literal["auto"] = "auto",
    *,
    title: str,
    total: float,
    done: float = 0,
) -> list[T]:
    """The answers of `run_all`, in the order of the jobs."""
    found = dict(run_all(function, jobs, workers, title=title, total=total, done=done))
    return [found[position] for position in range(len(jobs))]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread.

    Small images gain nothing from more threads, and results then depend neither on the number of
    cores nor on whether jobs share them.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def overheard() -> Iterator[list[str]]:
    """Warnings that are given meanwhile, in place of showing them where nobody looks."""
    told: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    ear, root = Ear(logging.WARNING), logging.getLogger()
    root.addHandler(ear)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: told.append(str(message))
            yield told
    finally:
        root.removeHandler(ear)


def default_workers(device_type: str = "cpu") -> int:
    """One process a core on a CPU, and a single one on a GPU."""
    if device_type == "cuda":
        return 1
    # Linux tells which cores this process may use.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@dataclass(eq=False)
class _Worker:
    """A worker process, seen from the process that started it.

    Attributes:
        process: the process itself.
        pipe: carries jobs to it, and messages of `_serve` back.
        ready: whether it waits for a job.
        position: the job that it works on.
        reported: units of that job that it has reported.
    """

    process: BaseProcess
    pipe: Connection
    ready: bool = False
    position: int | None = None
    reported: float = 0

    @classmethod
    def start(cls) -> "_Worker":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()  # so that reading ends when the worker does
        return cls(process, ours)

    def give(self, position: int, call: tuple[Any, ...]) -> None:
        self.ready, self.position, self.reported = False, position, 0
        # Plain pickles: multiprocessing's own would pass tensors as shared memory.
        packed = pickle.dumps(call)
        with suppress(OSError):  # it was killed, which the next read will say
            self.pipe.send_bytes(packed)

    def read(self) -> tuple[str, Any] | None:
        """Its next message; None if it has ended."""
        try:
            kind, value = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return None
        return kind, value


# Workers that wait for the next call: it takes seconds to start one.
_idle: list[_Worker] = []


def _run_in_processes(
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    count: int,
    bar: "tqdm[Any]",
    skips: Callable[[int], bool],
) -> Iterator[tuple[int, T]]:
    waiting, unfinished = deque(range(len(jobs))), len(jobs)
    kills: Counter[int | None] = Counter()
    team = _hire(count)
    try:
        while unfinished:
            for worker in team:
                while worker.ready and waiting:
                    position = waiting.popleft()
                    if skips(position):
                        unfinished -= 1
                    else:
                        worker.give(position, (function, jobs[position]))
            if not unfinished:
                break
            pipes = {worker.pipe: worker for worker in team}
            for pipe in wait(list(pipes)):
                worker = pipes[cast(Connection, pipe)]
                message = worker.read()
                if message is None:
                    bar.update(-worker.reported)
                    kills[worker.position] += 1
                    how = _how_it_ended(worker)
                    report_kill(how, kills[worker.position], bar.desc, count)
                    if worker.position is not None:
                        waiting.appendleft(worker.position)
                    team[team.index(worker)] = _Worker.start()
                    continue
                kind, value = message
                if kind == "progress":
                    worker.reported += value
                    bar.update(value)
                elif kind == "failed":
                    raise_failed(value, bar.desc, count)
                else:
                    worker.ready, answered, worker.position = True, worker.position, None
                    if answered is not None:
                        unfinished -= 1
                        yield answered, value
    except BaseException:
        _dismiss(team)
        raise
    _idle.extend(team)


def _hire(count: int) -> list[_Worker]:
    """Workers that wait, and new ones where there are too few; no others are kept."""
    alive = [worker for worker in _idle if worker.process.is_alive()]
    _dismiss([worker for worker in _idle if worker not in alive] + alive[count:])
    _idle.clear()
    return alive[:count] + [_Worker.start() for _ in range(count - len(alive))]


def _dismiss(team: Sequence[_Worker]) -> None:
    """End the workers at once: what they were at goes on from where it was last kept."""
    for worker in team:
        worker.process.terminate()
    for worker in team:
        worker.process.join(5)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.pipe.close()


def raise_failed(error: BaseException, title: str, workers: int) -> NoReturn:
    """Raise what a job raised; a `WorkerError` in place of an error about memory."""
    no_memory = isinstance(error, RuntimeError) and any(t in str(error) for t in NO_MEMORY)
    if no_memory or isinstance(error, MemoryError):
        raise WorkerError(
            f"{title.strip(': ')}: memory ran out; free memory or set fewer workers (there were "
            f"{workers}) and start again, what is finished is kept"
        ) from error
    raise error


def _how_it_ended(worker: _Worker) -> str:
    worker.process.join()
    worker.pipe.close()
    code = worker.process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return how + (", most likely because memory ran out" if code == -signal.SIGKILL else "")


def report_kill(how: str, kills: int, title: str, workers: int) -> None:
    """Warn that a worker process was killed and is started again.

    Args:
        how: how it ended, such as "was ended by SIGKILL".
        kills: how often that happened at the same job.
        title: what the progress bar is called.
        workers: number of processes.

    Raises:
        WorkerError: if it happened more than `MAX_RESTARTS` times.
    """
    if kills > MAX_RESTARTS:
        raise WorkerError(
            f"{title.strip(': ')}: a worker process {how}, {kills} times at the same job; free "
            f"memory or set fewer workers (there were {workers}) and start again, what is "
            f"finished is kept"
        )
    log.warning(
        "%s: a worker process %s; it is started again (%d of %d times)",
        title.strip(": "),
        how,
        kills,
        MAX_RESTARTS,
    )


def _serve(pipe: Connection, parent: int) -> None:
    """Do jobs that come through `pipe` until it is closed.

    Messages are pairs: "answer" with what a job gave (None at the start), "progress" with the
    units done since the last report, "failed" with an exception.
    """
    # Ctrl-C reaches all processes of a terminal; the parent decides what becomes of workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    report = _Report(pipe)
    pipe.send_bytes(pickle.dumps(("answer", None)))
    while True:
        try:
            packed = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, job = pickle.loads(packed)
            answer = pickle.dumps(("answer", function(*job, report.add)))
            report.flush()
            pipe.send_bytes(answer)
        except BaseException as error:
            pipe.send_bytes(pickle.dumps(("failed", portable(error))))


class _Report:
    """Adds up progress and sends it now and then."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.units, self.sent = pipe, 0.0, 0.0

    def add(self, units: float) -> None:
        self.units += units
        if time.monotonic() - self.sent > REPORT_INTERVAL:
            self.flush()

    def flush(self) -> None:
        self.pipe.send_bytes(pickle.dumps(("progress", self.units)))
        self.units, self.sent = 0, time.monotonic()


def portable(error: BaseException) -> BaseException:
    """The exception, or one of the same words if it cannot be sent to another process."""
    where = "".join(traceback.format_exception(error))
    try:
        error.add_note(f"In a worker process:\n{where}")
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
        error.add_note(f"In a worker process:\n{where}")
    return error


def leave_with(parent: int) -> None:
    """End this process when the one that started it is gone, even if that was killed.

    Otherwise an orphan would go on writing to the folder that a restarted run resumes from.
    """
    while os.getppid() == parent:
        time.sleep(WATCH_INTERVAL)
    os._exit(1)
