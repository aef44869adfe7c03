"""The runner of jobs of which each is done by several workers of Ray Train together.

A task of Ray, which takes no CPU, starts the workers of a job by Ray Train's `TorchTrainer` and
waits for them. All workers make the same call. The first one reads and writes the files, tells how
far the job is, and has the answer. Nothing of Ray is imported until a job is run here.
"""

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from weighmatch import ray_cluster, ray_engine
from weighmatch.engine_config import EngineConfig
from weighmatch.ray_engine import Engine, Store, make_engine, unpack
from weighmatch.semisup.parts.group import GroupError
from weighmatch.semisup.training.place import MINUTES
from weighmatch.workers import WorkerError, log, one_thread, overheard, portable

T = TypeVar("T")
# The one of two interfaces of Ray Train that is used here; read when it is imported.
VERSION = ("RAY_TRAIN_V2_ENABLED", "1")
# How often a start of the workers is tried again.
TRIES = 10


def make_runner(config: EngineConfig, device_type: str, processes: int) -> Engine:
    """The engine that `config` names; on a cluster, `processes` workers do each job together."""
    engine = make_engine(config, device_type)
    if not engine.far or processes == 1:
        return engine
    demand: Any = config.demand(device_type)
    return replace(engine, run_all=partial(run_all, processes=processes, **demand))


def run_all(
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    workers: object = 1,
    *,
    title: str,
    total: float,
    done: float = 0,
    skips: Callable[[int], bool] = lambda position: False,
    processes: int,
    num_cpus: float,
    num_gpus: float,
) -> Iterator[tuple[int, T]]:
    """Do one job after another, each by several workers that Ray places where there is room.

    There are `processes` workers, and each of them takes `num_cpus` and `num_gpus`. They talk by
    nccl where each has a GPU, and by gloo otherwise. `function` is called in each of them, where
    the default process group of `torch.distributed` is there. `workers` has no effect. The other
    arguments, the answers and the errors are those of `ray_engine.run_all`.

    Raises:
        WorkerError: if the cluster has no room for all of them.
        GroupError: if one of them is lost.
    """
    if not jobs:
        return
    store = Store(ray_cluster.connect())
    calls = [(*store.pack((function, job)), processes, num_cpus, num_gpus) for job in jobs]
    yield from ray_engine.run_all(
        _conduct, calls, 1, title=title, total=total, done=done, skips=skips, num_cpus=0
    )


def _conduct(
    packed: bytes,
    references: Sequence[Any],
    processes: int,
    num_cpus: float,
    num_gpus: float,
    progress: Callable[[float], None],
) -> Any:
    """Start the workers of a job, wait for them, and hand over the answer of the first one.

    `packed` and `references` are of `ray_engine.Store.pack`. `progress` travels to the first
    worker, which tells from there how far the job is.
    """
    room = ray_cluster.count_workers(num_cpus, num_gpus)
    if room < processes:
        raise WorkerError(
            f"the cluster has room for {room} of the {processes} processes of a training, each "
            f"with {num_cpus:g} CPUs and {num_gpus:g} GPUs; set runs.processes to {room}, or add "
            "a machine, and start again: what is finished is kept"
        )
    os.environ.setdefault(*VERSION)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    box: Any = ray.remote(_Box).options(num_cpus=0).remote()
    lost: Exception | None = None
    with tempfile.TemporaryDirectory(prefix="weighmatch-") as folder:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"task": _Task(packed, references, progress, box)},
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if num_gpus >= 1 else "gloo",
                timeout_s=int(60 * MINUTES),
            ),
            scaling_config=ScalingConfig(
                num_workers=processes,
                use_gpu=num_gpus > 0,
                resources_per_worker={"CPU": num_cpus, "GPU": num_gpus},
            ),
            run_config=RunConfig(
                storage_path=folder,  # for its own notes; it keeps no checkpoint
                # A start that fails, or that finds no room for a minute, is tried again.
                failure_config=FailureConfig(  # mypy knows the older interface
                    max_failures=0,
                    controller_failure_limit=TRIES,  # type: ignore[call-arg]
                ),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            lost = error
    letters = [pickle.loads(letter) for letter in ray.get(box.take.remote())]
    for *_, told in letters:
        for warning in told:
            log.warning("%s", warning)
    for kind, value, units, _ in letters:
        if kind == "answer":
            progress(units)
            return value
    for _, value, _, _ in letters:
        # That another worker is gone is what the others see of an error, too.
        if not isinstance(value, GroupError):
            raise value
    raise GroupError(
        f"one of the {processes} processes of this training has ended or did not start, most "
        "likely because memory ran out or a machine was lost; start the same command again, and "
        "training goes on from its last checkpoint"
    ) from lost


@dataclass(frozen=True)
class _Task:
    """What the workers of a job are given.

    Attributes:
        packed: a function and its arguments, see `ray_engine.Store.pack`.
        references: of Ray, to the arrays that are not in it.
        progress: the last argument in the first worker.
        box: the actor that gets letters.
    """

    packed: bytes
    references: Sequence[Any]
    progress: Callable[[float], None]
    box: Any


def _work(config: Mapping[str, _Task]) -> None:
    """What each worker does."""
    import ray

    task, done = config["task"], 0.0
    first = ray.train.get_context().get_world_rank() == 0

    def report(units: float) -> None:
        nonlocal done
        done += units
        task.progress(units)

    def hand_over(kind: str, value: object) -> None:
        # All of them warn of the same.
        letter = (kind, value, done, told if first else [])
        ray.get(task.box.put.remote(pickle.dumps(letter)))

    function, job = unpack(task.packed, ray.get(task.references))
    with overheard() as told:
        try:
            with one_thread():
                answer = function(*job, report if first else _ignore)
        except Exception as error:
            hand_over("failed", portable(error))
            raise
    if first:
        hand_over("answer", answer)


def _ignore(units: float) -> None:
    """The first worker alone tells how far a job is."""


class _Box:
    """An actor that holds what the workers of a job have handed over."""

    def __init__(self) -> None:
        self.letters: list[bytes] = []

    def put(self, letter: bytes) -> None:
        self.letters.append(letter)

    def take(self) -> list[bytes]:
        return self.letters
