"""Times of calls, taken by turns, and the operations that take them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile


def seconds_of(call: Callable[[], object]) -> float:
    """Wall-clock time of one call, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    enough: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """Seconds of each call in each round, after a round of warming up.

    What disturbs the machine for a while disturbs all of a round: compare within rounds. `enough`
    is asked after each round that counts; where it says so, the rounds that are left are not run.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        if turn > 1 and enough():
            break
        for name, call in calls.items():
            seconds = seconds_of(call)
            if turn:
                times[name].append(seconds)
    return times


@dataclass(frozen=True)
class Operation:
    """A row of a profile.

    Attributes:
        name: torch's.
        share: of the time of all operations, each without what it calls, 0 to 1.
        calls: in a step.
    """

    name: str
    share: float
    calls: float


def top_operations(
    call: Callable[[], object], device: torch.device, steps: int, longest: int
) -> list[Operation]:
    """The operations of a call of so many steps that take most time themselves.

    On a GPU that of the kernels that an operation starts; the kernels are listed as events, too,
    which would count their time twice.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        call()
    times = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in recorded.key_averages()
        if event.device_type == DeviceType.CPU
    ]
    total = sum(taken for taken, _ in times) or 1.0
    ordered = sorted(times, key=lambda item: -item[0])[:longest]
    return [Operation(event.key, taken / total, event.count / steps) for taken, event in ordered]
