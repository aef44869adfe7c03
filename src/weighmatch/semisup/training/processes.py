"""Starts the processes that train one run together, and gives them work.

The first process is the one that the user started. The others are its children, or, under
`torchrun`, the other processes of all machines. They wait until the first one names a function of
a module and its arguments, and then call it at the same time as the first one does.
"""

import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from weighmatch.checks import ToldError
from weighmatch.semisup.parts.group import ALONE, Group, GroupError, Processes
from weighmatch.workers import leave_with

# How long a process waits for another one before it gives up.
MINUTES = 10.0
# Seconds between two looks for work or for children that have ended.
INTERVAL = 0.05
# What torchrun sets in its processes, and nothing else does.
LAUNCHED = "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True)
class _Place:
    """Which process this is.

    Attributes:
        store: what all processes share.
        rank: the number of this process.
        size: the number of all.
        beside: how many of them this machine has.
    """

    store: Store
    rank: int
    size: int
    beside: int

    def join(self, device: str) -> Group:
        """Make this process a member of the group, on the device "cpu" or "cuda"."""
        backend = "gloo"
        if device == "cuda":
            count = torch.cuda.device_count()
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)) % count)
            if self.beside <= count:  # nccl wants a GPU for each process
                backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend,
            store=PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(minutes=MINUTES),
        )
        return Processes(MINUTES)

    def serve(self) -> None:
        """Do what the first process says until it says that all is done."""
        torch.set_num_threads(1)
        group = ALONE
        for number in itertools.count():
            # Not by a collective operation: the first process may have other work for hours.
            while not self.store.check([f"order {number}"]):
                time.sleep(INTERVAL)
            order, _, device = self.store.get(f"order {number}").decode().partition(" ")
            if order == "end":
                return
            if order == "join":
                group = self.join(device)
                continue
            function, arguments = group.from_first(_nothing)
            try:
                function(*arguments, group)
            except (ToldError, FloatingPointError) as error:
                # The first process meets the same error, or that this one has ended: it tells.
                raise SystemExit(1) from error


def _nothing() -> tuple[Callable[..., object], tuple[object, ...]]:
    """What no process but the first would have to say, and it says something else."""
    raise AssertionError("the first process alone gives orders")


class Team:
    """The processes, seen from the first one.

    Args:
        place: where the first process stands; None: there are no others.
        device: "cpu" or "cuda".

    Attributes:
        group: the processes.
        orders: how many orders the others were given.
    """

    def __init__(self, place: _Place | None = None, device: str = "cpu") -> None:
        self.group, self._place, self.orders = ALONE, place, 0
        if place is not None:
            self._say(f"join {device}")
            self.group = place.join(device)

    def __reduce__(self) -> tuple[Callable[[], "Team"], tuple[()]]:
        return _team_there, ()

    def also(self, function: Callable[..., object], *arguments: object) -> None:
        """Let all others call `function(*arguments, group)`; this process goes on at once."""
        if self._place is not None:
            self._say("work")
            self.group.from_first(lambda: (function, arguments))

    def end(self) -> None:
        """Let all others end."""
        self._say("end")

    def _say(self, order: str) -> None:
        if self._place is not None:
            self._place.store.set(f"order {self.orders}", order)
            self.orders += 1


def _team_there() -> Team:
    """The team of a process to which one was sent, where all others make the same calls."""
    team = Team()
    if dist.is_initialized():
        team.group = Processes(MINUTES)
    return team


@contextmanager
def together(processes: int, device: str) -> Iterator[Team]:
    """This process and others that train with it.

    Under `torchrun` they are those that it started, whatever `processes` is.

    Args:
        processes: how many on this machine, this one among them.
        device: "cpu" or "cuda".

    Raises:
        GroupError: if one of them ends before the first one is done.
    """
    if LAUNCHED in os.environ:
        yield _launched(device)
    elif processes == 1:
        yield Team()
    else:
        yield from _with_children(processes, device)


def _with_children(processes: int, device: str) -> Iterator[Team]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="weighmatch-") as folder:
        path = Path(folder) / "store"
        given = [(path, rank, processes, os.getpid()) for rank in range(1, processes)]
        children: list[BaseProcess] = [
            context.Process(target=_accompany, args=each, daemon=True) for each in given
        ]
        try:
            for child in children:
                child.start()
            store = FileStore(str(path), processes)
            while not all(store.check([f"ready {rank}"]) for rank in range(1, processes)):
                if not all(child.is_alive() for child in children):
                    raise GroupError("a process of this training did not start")
                time.sleep(INTERVAL)
            team = Team(_Place(store, 0, processes, processes), device)
            yield team
            team.end()
            for child in children:
                child.join(5)
        except GroupError as error:
            raise _explained(error, children) from error
        finally:
            _dismiss(children)
            _leave()


def _explained(error: GroupError, children: Sequence[BaseProcess]) -> GroupError:
    """The error, or one that says how a child ended."""
    for child in children:
        child.join(1)
    for child in children:
        code = child.exitcode
        if code:
            how = "has failed, see what it wrote"
            if code < 0:
                how = f"was ended by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += ", most likely because memory ran out"
            return GroupError(
                f"one of the {len(children) + 1} processes of this training {how}; start the same "
                "command again, and training goes on from its last checkpoint"
            )
    return error


def _dismiss(children: Sequence[BaseProcess]) -> None:
    started = [child for child in children if child.pid is not None]
    for child in started:
        child.terminate()
    for child in started:
        child.join(5)
        if child.is_alive():
            child.kill()
            child.join()


def _accompany(path: Path, rank: int, processes: int, parent: int) -> None:
    """What a child does."""
    # Ctrl-C reaches all processes of a terminal; the first one decides what becomes of the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    store = FileStore(str(path), processes)
    store.set(f"ready {rank}", "")
    _Place(store, rank, processes, processes).serve()
    _leave()


def _leave() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):  # another process is gone
            dist.destroy_process_group()


# --- under torchrun -------------------------------------------------------------------------

# The team of a process that torchrun started, once it is there: a process joins only once.
_teams: list[Team] = []


@contextmanager
def launched() -> Iterator[bool]:
    """Under `torchrun`, where the first process works and the others do what it says.

    Yields:
        Whether this is the first process. Each of the others has done its part by then; they end
        when the first one leaves.
    """
    place = _own_place()
    if place.rank:
        place.serve()
        yield False
    else:
        try:
            yield True
        finally:
            team = _teams[0] if _teams else Team()
            place.store.set(f"order {team.orders}", "end")
    _leave()


def _launched(device: str) -> Team:
    if not _teams:
        _teams.append(Team(_own_place(), device))
    return _teams[0]


def _own_place() -> _Place:
    store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=MINUTES)))
    return _Place(store, rank, size, int(os.environ["LOCAL_WORLD_SIZE"]))
