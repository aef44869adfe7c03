"""Locks: one run at a time writes to a place, and one that was killed does not block it."""

import atexit
import json
import logging
import os
import shlex
import socket
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import ClassVar

from weighmatch.io.files import is_running

log = logging.getLogger(__name__)

# Seconds between two heartbeats of a holder, and without one after which a holder on another host
# counts as gone.
BEAT_EVERY, STALE_AFTER = 30.0, 600.0
MAX_COMMAND, TRIES = 200, 5


class HeldError(RuntimeError):
    """Another run holds the lock; the message says who."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: name of the computer.
        process: number of the process.
        born: when that process began, as the operating system counts, or "" if it does not say.
        since: when the lock was taken.
        command: what the process was started with.
        token: tells this taking of the lock from any other.
    """

    host: str
    process: int
    born: str
    since: str
    command: str
    token: str

    @classmethod
    def here(cls) -> "Holder":
        """This process, now."""
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:MAX_COMMAND]
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        process = os.getpid()
        return cls(_host(), process, _born(process), now, command, uuid.uuid4().hex)

    def is_gone(self, age: float) -> bool:
        """Whether the process has ended, given the seconds since its last heartbeat.

        A process of another host cannot be asked, so that its heartbeat alone tells.
        """
        if self.host != _host():
            return age > STALE_AFTER
        return not is_running(self.process) or self.born != _born(self.process)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}: {self.command}"


class Lock:
    """A file that says who writes to a place.

    Args:
        path: the file.
    """

    # Which threads of this process hold which locks.
    held: ClassVar[dict[Path, threading.Thread]] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = ""
        self._made: list[Path] = []  # folders that were made for it, the deepest first

    def take(self) -> None:
        """Take the lock, also from a run that is gone.

        Raises:
            HeldError: if another run holds it.
            OSError: if its folder cannot be written.
        """
        for _ in range(TRIES):
            with suppress(FileNotFoundError):  # another run removed the folder, as it was empty
                self._take()
                return
        self._take()

    def _take(self) -> None:
        places = (self.path.parent, *self.path.parent.parents)
        self._made = [place for place in places if not place.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self.path.parent):
            if self.path.exists():
                holder = self.holder()
                if holder is not None:
                    raise HeldError(str(holder))
                left = self._read()
                if self.path.exists():  # else it was given back just now
                    log.warning(
                        "%s was left by a run that is gone (%s); it is taken over", self.path, left
                    )
                    self.path.unlink(missing_ok=True)
            mine = Holder.here()
            try:
                with self.path.open("x") as file:
                    file.write(json.dumps(asdict(mine), indent=1))
            except FileExistsError:
                raise HeldError("a run that began at the same time") from None
        self._token = mine.token
        Lock.held[self.path] = threading.current_thread()

    def holder(self) -> Holder | None:
        """Who holds the lock; None: nobody, or a run that is gone."""
        found = self._read()
        if found is None:
            return None
        if found.process == os.getpid() and found.host == _host():
            thread = Lock.held.get(self.path)
            alive = thread is not None and thread.is_alive()
            # A run that was interrupted in a notebook left it, and no longer goes on.
            return found if alive and thread is not threading.current_thread() else None
        return None if found.is_gone(self._age()) else found

    def beat(self) -> None:
        """Say that the holder is alive."""
        with suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Give the lock back, if it is still this one's."""
        Lock.held.pop(self.path, None)
        found = self._read()
        if found is not None and found.token == self._token:
            self.path.unlink(missing_ok=True)
        # A run that was refused leaves no empty folder, which would look like a result.
        for place in self._made:
            with suppress(OSError):  # it is not empty
                place.rmdir()

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(self.path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _age(self) -> float:
        """Seconds since the last heartbeat, by the clock of the file system."""
        with TemporaryFile(dir=self.path.parent) as file:
            now = os.fstat(file.fileno()).st_mtime
        try:
            return now - self.path.stat().st_mtime
        except FileNotFoundError:
            return float("inf")


class Locks:
    """Several locks that are held together, with a heartbeat."""

    def __init__(self) -> None:
        self._locks: list[Lock] = []
        self._done = threading.Event()

    @property
    def paths(self) -> list[Path]:
        """The files of the locks that are held."""
        return [lock.path for lock in self._locks]

    def take(self, paths: Sequence[Path]) -> None:
        """Take all of them or none.

        Raises:
            HeldError: if another run holds one.
        """
        try:
            for path in sorted(paths):
                lock = Lock(path)
                lock.take()
                self._locks.append(lock)
        except BaseException:
            self.release()
            raise
        # Ctrl-C ends a run without a word to its hooks.
        atexit.register(self.release)
        self._done = threading.Event()
        beat = threading.Thread(target=self._beat, args=(list(self._locks), self._done))
        beat.daemon = True
        beat.start()

    def release(self) -> None:
        """Give all of them back."""
        atexit.unregister(self.release)
        self._done.set()
        while self._locks:
            self._locks.pop().release()

    @staticmethod
    def _beat(locks: list[Lock], done: threading.Event) -> None:
        while not done.wait(BEAT_EVERY):
            for lock in locks:
                lock.beat()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let no other process of this host look at the locks of a folder, where that is possible."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without such locks
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _host() -> str:
    return socket.gethostname()


def _born(process: int) -> str:
    """When a process began, in ticks since which start of the computer; "" if nothing says so."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{start} {fields[19]}"
