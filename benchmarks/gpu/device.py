"""What only a GPU has: waits of the host, memory of its own, graphs of calls.

On a CPU the calls are made all the same, and there is nothing to tell: None.
"""

import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import seconds_of

# What torch says of a call that waits for the device.
WAITED = "called a synchronizing CUDA operation"


def synchronising_lines(call: Callable[[], object], device: torch.device) -> list[str] | None:
    """The lines of Python in which the host waited for the device, each as often as it did.

    Torch does not see all of them: a copy from memory that is not pinned is missed, for one.
    """
    if device.type != "cuda":
        call()
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [warning for warning in caught if WAITED in str(warning.message)]
    return [f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits]


class Memory(NamedTuple):
    """MiB on the device: before a call, and the most during it."""

    before: float
    peak: float


def peak_memory(call: Callable[[], object], device: torch.device) -> Memory | None:
    """What lay on the device as the call began, and the most that did while it went on."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return Memory(before / 2**20, torch.cuda.max_memory_allocated() / 2**20)


def copied_a_second(device: torch.device, size: int) -> float:
    """Bytes read and written a second by a copy of so many bytes; the median of ten."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds_of(lambda: target.copy_(source))
    return 2 * size / statistics.median(seconds_of(lambda: target.copy_(source)) for _ in range(10))


def graphed(step: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """The kernels of a step, recorded once and started together."""
    if device.type != "cuda":
        return None
    # Warmed up aside, as capturing asks for: algorithms are chosen and memory is laid out there.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
