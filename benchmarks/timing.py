"""Times of calls, taken by turns."""

import time
from collections.abc import Callable, Mapping

import torch


def seconds_of(call: Callable[[], object]) -> float:
    """Wall-clock time of one call, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after a round of warming up.

    What disturbs the machine for a while disturbs all of a round: compare within rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            seconds = seconds_of(call)
            if turn:
                times[name].append(seconds)
    return times
