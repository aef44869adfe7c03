"""Starts the processes that train one run together, and gives them work.

The first process is the one that the user started. The others are its children, or, under
`torchrun`, the other processes of all machines. They wait until the first one names a function of
a module and its arguments, and then call it at the same time as the first one does.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from weighmatch.semisup.parts.group import ALONE, Group, GroupError, Processes, needs_all
from weighmatch.semisup.training.dividing import LAUNCHED
from weighmatch.semisup.training.place import INTERVAL, MINUTES, Place
from weighmatch.workers import leave_with

# Seconds that the first process has to tell by itself that another one is lost.
GRACE = 1.0
# The code of a process that ends because another one is lost.
LOST = 75


class Team:
    """The processes, seen from the first one.

    Args:
        place: where the first process stands; None: there are no others.

    Attributes:
        group: the processes, once they are joined.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.group: Group = ALONE
        self._place, self._orders = place, 0

    def __reduce__(self) -> tuple[Callable[[], "Team"], tuple[()]]:
        return _team_there, ()

    def join(self, device: str) -> None:
        """Make a group of all processes, once; the device is "cpu" or "cuda"."""
        if self._place is not None and self.group is ALONE:
            self._say(f"join {device}")
            self.group = self._place.join(device)

    def also(self, function: Callable[..., object], *arguments: object) -> None:
        """Let all others call `function(*arguments, group)`; this process goes on at once."""
        if self._place is not None:
            self._say("work")
            self.group.from_first(lambda: (function, arguments))

    def end(self) -> None:
        """Let all others end."""
        self._say("end")

    def explained(self, error: GroupError) -> GroupError:
        """What a process has failed of, where it could say so; else the words of `error`."""
        assert self._place is not None
        return self._place.explained(error)

    def _say(self, order: str) -> None:
        if self._place is not None:
            with needs_all(self._place.size, MINUTES):
                self._place.store.set(f"order {self._orders}", order)
            self._orders += 1


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
        GroupError: if one of them fails or ends before the first one is done.
    """
    if LAUNCHED in os.environ:
        (team,) = _teams
        try:
            team.join(device)
            yield team
        except GroupError as error:
            raise team.explained(error) from error
    elif processes == 1:
        yield Team()
    else:
        yield from _with_children(processes, device)


# --- children -------------------------------------------------------------------------------


def _with_children(processes: int, device: str) -> Iterator[Team]:
    context = multiprocessing.get_context("spawn")
    over = threading.Event()
    with tempfile.TemporaryDirectory(prefix="weighmatch-") as folder:
        path = Path(folder) / "store"
        given = [(path, rank, processes, os.getpid()) for rank in range(1, processes)]
        children: list[BaseProcess] = [
            context.Process(target=_accompany, args=each, daemon=True) for each in given
        ]
        place = _child_place(path, 0, processes)
        try:
            for child in children:
                child.start()
            while not all(place.store.check([f"ready {rank}"]) for rank in range(1, processes)):
                if not all(child.is_alive() for child in children):
                    raise GroupError("a process of this training did not start")
                time.sleep(INTERVAL)
            # It has a store of its own: another thread may wait in that of `place`.
            watched = (children, _child_place(path, 0, processes), over)
            threading.Thread(target=_watch, args=watched, daemon=True).start()
            team = Team(place)
            team.join(device)
            yield team
            over.set()
            team.end()
            for child in children:
                child.join(5)
        except GroupError as error:
            if not _by_nccl():  # which may take forever even to leave, and stays watched
                over.set()
            told = _explained(error, place, children)
            _dismiss(children)
            _leave()
            raise told from error
        finally:
            over.set()
            _dismiss(children)
            _leave()


def _child_place(path: Path, rank: int, processes: int) -> Place:
    store = FileStore(str(path), processes)
    store.set_timeout(timedelta(minutes=MINUTES))
    return Place(store, rank, processes)


def _watch(children: Sequence[BaseProcess], place: Place, over: threading.Event) -> None:
    """Tell of a child that has ended, and end this process, where it would not notice itself.

    By gloo the next operation fails at once. By nccl, or before the group is there, this process
    would wait for minutes.
    """
    wait([child.sentinel for child in children])
    if over.wait(GRACE) or (dist.is_initialized() and not _by_nccl()):
        return
    error = GroupError(
        f"one of the {place.size} processes of this training has ended; start the same command "
        "again, and training goes on from its last checkpoint"
    )
    _write(_explained(error, place, children))
    # Files are written beside themselves and renamed: none is left in part.
    os._exit(1)


def _explained(error: GroupError, place: Place, children: Sequence[BaseProcess]) -> GroupError:
    """The error, or one that says what a child has failed of or how it ended."""
    told = place.failure()
    if told is not None:
        return told
    for child in children:
        child.join(1)
    # Those that end because another one is lost do so with a code of their own, or abort.
    codes = [child.exitcode for child in children]
    causes = [code for code in codes if code and code not in (LOST, -signal.SIGABRT)]
    if not causes:
        return GroupError(*error.args)
    code = -signal.SIGKILL if -signal.SIGKILL in causes else causes[0]
    how = "has failed, see what it wrote"
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += ", most likely because memory ran out"
    return GroupError(
        f"one of the {len(children) + 1} processes of this training {how}; start the same "
        "command again, and training goes on from its last checkpoint"
    )


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
    place = _child_place(path, rank, processes)
    place.store.set(f"ready {rank}", "")
    try:
        place.serve()
    except GroupError:  # the first process tells
        os._exit(LOST)
    _leave()


def _leave() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):  # another process is gone
            dist.destroy_process_group()


def _by_nccl() -> bool:
    return dist.is_initialized() and "nccl" in dist.get_backend_config()


def _write(error: GroupError) -> None:
    sys.stderr.write(f"Error: {error}\n")
    sys.stderr.flush()


# --- under torchrun -------------------------------------------------------------------------

# The team of the first process that torchrun started: it is joined only once.
_teams: list[Team] = []


@contextmanager
def launched() -> Iterator[bool]:
    """Under `torchrun`, where the first process works and the others do what it says.

    If a process is lost, one of the others says so, whichever notices first.

    Yields:
        Whether this is the first process. Each of the others has done its part by then; they end
        when the first one leaves.
    """
    place = _own_place()
    # It has a store of its own: another thread may wait in that of `place`.
    _tell_when_ended(_own_place())
    team = Team(place)
    try:
        if place.rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a child
            place.serve()
        else:
            _teams.append(team)
        yield place.rank == 0
    except BaseException as error:
        if not _claim(place):
            raise SystemExit(LOST) from error
        raise
    finally:
        if place.rank == 0:
            with suppress(GroupError):
                team.end()
    _leave()


def _own_place() -> Place:
    store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=MINUTES)))
    # The store may be that of all attempts, and keeps what was said in those before.
    attempt = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return Place(attempt, rank, size)


def _claim(place: Place) -> bool:
    """Whether this process is the first to tell why all of them end."""
    try:
        return bool(place.store.add("told", 1) == 1)
    except RuntimeError:  # the store is gone with its machine
        return True


def _tell_when_ended(place: Place) -> None:
    """Tell why this process ends where torchrun ends it, which it does if another one is lost.

    A handler in Python would wait for an operation that waits for the lost process; a thread that
    reads the numbers of signals does not.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno())
    signal.signal(signal.SIGTERM, lambda *_: None)

    def listen(kept: socket.socket) -> None:
        while signal.SIGTERM not in ours.recv(16):
            pass
        error = GroupError(
            f"torchrun has ended the {place.size} processes of this training, because one of them "
            "was lost or because it was stopped itself; start the same command again, and training "
            "goes on from its last checkpoint"
        )
        if _claim(place):
            _write(place.explained(error))
        else:
            time.sleep(5 * GRACE)  # this very process may be about to tell
        os._exit(1)

    threading.Thread(target=listen, args=(theirs,), daemon=True).start()
