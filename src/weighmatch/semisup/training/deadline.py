"""When the time that somebody has is up (`runs.time_limit`)."""

import time
from collections.abc import Callable
from dataclasses import dataclass


class Clock:
    """Tells the time, and how long ago the command began.

    Attributes:
        now: gives the time in seconds; all processes of a computer have the same one.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.now = now
        self._began: float | None = None

    def start(self) -> None:
        """Note that a command begins."""
        self._began = self.now()

    def began(self) -> float:
        """When the command began; a clock that was not started starts now."""
        if self._began is None:
            self.start()
        return self._began or 0.0


CLOCK = Clock()


class TimeUpError(Exception):
    """The time is up in the middle of a run, which can go on from its last checkpoint."""


@dataclass(frozen=True)
class Deadline:
    """When training has to end, and how long runs take.

    Attributes:
        ends: the time at which runs are stopped, in seconds, as `Clock.now` tells it.
        seconds: what a step of FixMatch takes here, shared out over all processes.
    """

    ends: float
    seconds: float

    def allows(self, cost: float) -> bool:
        """Whether runs of this cost, in steps of FixMatch, would end in time."""
        return CLOCK.now() + cost * self.seconds <= self.ends
