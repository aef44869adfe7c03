"""The runner of many jobs on a cluster of Ray: what `workers.run_all` does on one machine.

Nothing is installed or imported of Ray until a job is run here. A task or an actor computes on one
thread, so that its answer is the one that a process of one machine gives, to the bit.
"""

import io
import logging
import pickle
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, TypeVar
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from weighmatch import ray_cluster as cluster
from weighmatch import workers as local
from weighmatch.engine_config import EngineConfig
from weighmatch.workers import MAX_RESTARTS, WorkerError

log = local.log

T = TypeVar("T")
# Bytes from which an array goes into the object store, once for all jobs that have it.
LARGE = 2**16
# Jobs that a pool of actors is given together; each is a block of Ray Data.
WAVE = 10_000
# Seconds between two reports of a task's progress, between two looks at them, and those that
# cancelled tasks have to end.
REPORT_INTERVAL, LOOK_INTERVAL, CANCEL_WAIT = 1.0, 1.0, 10


def run_all(
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    workers: int | Literal["auto"] = "auto",
    *,
    title: str,
    total: float,
    done: float = 0,
    skips: Callable[[int], bool] = lambda position: False,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Iterator[tuple[int, T]]:
    """Do every job as a task of Ray; see `workers.run_all` for what is the same.

    A task that was killed is begun again, `MAX_RESTARTS` times at most. One whose machine is lost
    is begun again on another as often as that happens.

    A large array that several jobs have is sent to the cluster once. `workers` "auto" is as many
    tasks at a time as the cluster has room for, new machines included. `num_cpus` and `num_gpus`
    are what a task takes, or parts of one.

    Yields:
        The position of a job and its answer, in the order in which they are done.

    Raises:
        WorkerError: if a task is killed more than `MAX_RESTARTS` times or gets no memory, if no
            machine has room for one, or if a machine has another version of the software.
        Exception: what a job raised; the other tasks have been cancelled by then.
    """
    if not jobs:
        return
    ray = cluster.connect()
    with local.progress_bar(title, total, done) as bar, _Progress(bar) as progress:
        yield from _run_tasks(ray, function, jobs, workers, progress, skips, (num_cpus, num_gpus))


def _run_tasks(
    ray: Any,
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    workers: int | Literal["auto"],
    progress: "_Progress",
    skips: Callable[[int], bool],
    demand: tuple[float, float],
) -> Iterator[tuple[int, T]]:
    task = ray.remote(_work).options(num_cpus=demand[0], num_gpus=demand[1], max_retries=0)
    store, title, versions = Store(ray), progress.title, cluster.versions()
    waiting, kills = deque(range(len(jobs))), Counter[int]()
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            slots = cluster.count_workers(*demand)
            count = slots if workers == "auto" else min(workers, slots)
            while waiting and len(running) < count:
                position = waiting.popleft()
                if not skips(position):
                    packed, arrays = store.pack((function, jobs[position]))
                    key = progress.key(position)
                    running[task.remote(packed, key, versions, *arrays)] = position
            finished, _ = ray.wait(list(running), timeout=LOOK_INTERVAL) if running else ([], [])
            for reference in finished:
                position = running.pop(reference)
                try:
                    kind, value, units, told = pickle.loads(ray.get(reference))
                except ray.exceptions.RayError as lost:
                    _raise_unable(ray, lost)
                    progress.set(position, 0)
                    waiting.appendleft(position)
                    if isinstance(lost, ray.exceptions.NodeDiedError):
                        log.warning("%s: a machine is lost; its job goes on elsewhere", title)
                        continue
                    kills[position] += 1
                    how = f"was ended ({type(lost).__name__}), most likely because memory ran out"
                    local.report_kill(how, kills[position], title, count)
                    continue
                progress.set(position, units)
                progress.tell(told)
                if kind == "failed":
                    local.raise_failed(value, title, count)
                yield position, value
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if running:  # so that none of them writes any more
            ray.wait(list(running), num_returns=len(running), timeout=CANCEL_WAIT)


def run_in_pool(
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    workers: int | Literal["auto"] = "auto",
    *,
    title: str,
    total: float,
    done: float = 0,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Iterator[tuple[int, T]]:
    """Do very many jobs by Ray Data with a pool of actors, which keep what `function` caches.

    Arguments, answers and errors are those of `run_all`. An actor that was killed, or whose machine
    is lost, is begun again, and so is its job.
    """
    if not jobs:
        return
    ray = cluster.connect()
    from ray import data

    count = cluster.count_workers(num_cpus, num_gpus)
    count = min(count if workers == "auto" else min(workers, count), len(jobs))
    data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with local.progress_bar(title, total, done) as bar, _Progress(bar) as progress:
        for first in range(0, len(jobs), WAVE):
            rows = [
                {"position": first + k, "job": pickle.dumps((function, job))}
                for k, job in enumerate(jobs[first : first + WAVE])
            ]
            found = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Actor,
                fn_constructor_args=(progress.name, cluster.versions()),
                batch_size=1,
                compute=data.ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            )
            try:
                for batch in found.iter_batches(batch_size=1, prefetch_batches=0):
                    (position,), (answer,) = batch["position"].tolist(), batch["answer"].tolist()
                    kind, value, units, told = pickle.loads(answer)
                    progress.set(position, units)
                    progress.tell(told)
                    if kind == "failed":
                        local.raise_failed(value, progress.title, count)
                    yield position, value
            except ray.exceptions.RayError as error:
                _raise_unable(ray, error)
                raise WorkerError(
                    f"{progress.title}: Ray cannot go on ({type(error).__name__}); look at its "
                    "machines and start again, what is finished is kept"
                ) from error


def _raise_unable(ray: Any, error: Exception) -> None:
    """Raise a WorkerError if Ray says that a machine cannot even begin with a job."""
    unable = (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError)
    if isinstance(error, unable):
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise WorkerError(
            f"a machine of the cluster cannot run WeighMatch ({words[-1]}); install the same "
            "versions of WeighMatch, Python and torch on every machine"
        ) from error


@dataclass(frozen=True)
class Engine:
    """A place where jobs are done.

    Attributes:
        run_all: does jobs, as `workers.run_all`.
        run_in_pool: the same for very many jobs that need the same model.
        count: tells how many jobs are done at a time where nobody says it.
        prepare: begins with what takes time before the first job; called early, if at all.
        far: whether jobs may be done on other machines.
    """

    run_all: Callable[..., Iterator[tuple[int, Any]]]
    run_in_pool: Callable[..., Iterator[tuple[int, Any]]]
    count: Callable[[], int]
    prepare: Callable[[], None] = lambda: None
    far: bool = False


def make_engine(config: EngineConfig, device_type: str = "cpu") -> Engine:
    """The engine that `config` names, for jobs on a device of that type."""
    demand: Any = config.demand(device_type)
    engines = {
        "local": Engine(local.run_all, local.run_all, partial(local.default_workers, device_type)),
        "ray": Engine(
            partial(run_all, **demand),
            partial(run_in_pool, **demand),
            partial(cluster.count_workers, **demand),
            cluster.begin_to_connect,
            far=True,
        ),
    }
    return engines[config.engine]


def _work(packed: bytes, key: str, versions: Mapping[str, str], *arrays: NDArray[Any]) -> bytes:
    """Do a job; a pickle of "answer" or "failed", what came of it, units done, and warnings."""
    report = _Report(key)
    found: tuple[str, object]
    with local.overheard() as told:
        try:
            cluster.require_versions(versions)
            function, job = unpack(packed, arrays)
            with local.one_thread():
                found = ("answer", function(*job, report.add))
        except Exception as error:
            found = ("failed", local.portable(error))
    return pickle.dumps((*found, report.units, told))


class _Actor:
    """What Ray Data calls with one job at a time."""

    def __init__(self, name: str, versions: Mapping[str, str]) -> None:
        self.name, self.versions = name, versions

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (position,), (packed,) = batch["position"].tolist(), batch["job"].tolist()
        ends = self._begin(position)
        # Ray Data itself would begin a job again for ever that ends its actor.
        if ends > MAX_RESTARTS:
            error = WorkerError(
                f"an actor was ended {ends} times at the same job, most likely because memory ran "
                "out; free memory or set fewer workers and start again, what is finished is kept"
            )
            return {"position": [position], "answer": [pickle.dumps(("failed", error, 0.0, []))]}
        answer = _work(packed, f"{self.name}/{position}", self.versions)
        return {"position": [position], "answer": [answer]}

    def _begin(self, position: int) -> int:
        """Note that a job begins; how often it has ended an actor on a machine that is there."""
        ray = cluster.connect()
        key = f"{self.name}-begun/{position}"
        earlier = (_notes()._internal_kv_get(key) or b"").decode().split()
        here = ray.get_runtime_context().get_node_id()
        _notes()._internal_kv_put(key, " ".join([*earlier, here]))
        # A job whose machine is lost has done nothing wrong.
        there = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if earlier else ()
        return sum(node in there for node in earlier)


def _notes() -> Any:
    """What all processes of a cluster can write and read: Ray's own store of keys and values.

    An actor would do as well, but even one that waits wakes a hundred times a second.
    """
    from ray.experimental import internal_kv

    return internal_kv


class _Report:
    """Adds up the progress of a job and notes it now and then, from the start of this attempt.

    That it cannot be noted, or read, for a while ends no job.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.units, self.sent = 0.0, time.monotonic()

    def add(self, units: float) -> None:
        self.units += units
        if time.monotonic() - self.sent > REPORT_INTERVAL:
            with suppress(Exception):
                _notes()._internal_kv_put(self.key, str(self.units))
            self.sent = time.monotonic()


class _Progress:
    """The bar of all jobs, and their warnings. A thread moves the bar by what the jobs note."""

    def __init__(self, bar: Any) -> None:
        self.name = f"weighmatch-{uuid4().hex}"
        self.title = bar.desc.strip(": ")
        self._bar = bar
        self._units: dict[int, float] = {}
        self._told: set[str] = set()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(CANCEL_WAIT)
        with suppress(Exception):
            _notes()._internal_kv_del(self.name, del_by_prefix=True)

    def key(self, position: int) -> str:
        """Where a job notes how far it is."""
        return f"{self.name}/{position}"

    def set(self, position: int, units: float) -> None:
        """Say how far a job is that has ended, or that begins again: 0."""
        with self._lock:
            with suppress(Exception):
                _notes()._internal_kv_del(self.key(position))
            self._move(position, units)

    def tell(self, warnings: Sequence[str]) -> None:
        """Log the warnings of a job that has ended, each of them once."""
        for warning in warnings:
            if warning not in self._told:
                log.warning("%s", warning)
        self._told.update(warnings)

    def _follow(self) -> None:
        while not self._ended.wait(LOOK_INTERVAL):
            with self._lock, suppress(Exception):
                for key in _notes()._internal_kv_list(f"{self.name}/"):
                    note = _notes()._internal_kv_get(key)
                    if note is not None:
                        self._move(int(key.rpartition(b"/")[2]), float(note))

    def _move(self, position: int, units: float) -> None:
        self._bar.update(units - self._units.get(position, 0))
        self._units[position] = units


class Store:
    """Puts large arrays into the object store, each once however many jobs have it.

    Args:
        ray: the package.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._known: dict[tuple[Any, ...], tuple[Any, NDArray[Any]]] = {}

    def pack(self, call: Any) -> tuple[bytes, list[Any]]:
        """A pickle of a call, and what is not in it: references to arrays.

        Where the call itself has references, each is in a list, so that Ray leaves it as it is.
        """
        file = io.BytesIO()
        pickler = _Pickler(file, self)
        pickler.dump(call)
        return file.getvalue(), pickler.references

    def refer(self, value: Any) -> Any:
        """What is in the place of a value that is not in a pickle; None: it is in it."""
        if isinstance(value, self._ray.ObjectRef):
            return [value]
        large = isinstance(value, np.ndarray) and value.nbytes >= LARGE
        if not large or value.dtype.hasobject:
            return None
        # Two views of the same memory are the same array.
        place = value.__array_interface__
        key = (place["data"][0], value.shape, place["strides"], value.dtype.str)
        if key not in self._known:
            # The array is kept, so that no other one gets its memory.
            self._known[key] = self._ray.put(np.asarray(value)), value
        return self._known[key][0]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, store: Store) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.references: list[Any] = []
        self._store = store

    def persistent_id(self, value: Any) -> int | None:
        reference = self._store.refer(value)
        if reference is None:
            return None
        self.references.append(reference)
        return len(self.references) - 1


def unpack(packed: bytes, found: Sequence[Any]) -> Any:
    """The call that `Store.pack` packed, given what Ray has for its references."""
    return _Unpickler(io.BytesIO(packed), found).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, found: Sequence[Any]) -> None:
        super().__init__(file)
        self._found = found

    def persistent_load(self, number: int) -> Any:
        found = self._found[number]
        return found[0] if isinstance(found, list) else found
