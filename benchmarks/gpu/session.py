"""Parts one after another, each with its share of the time, each on disk as soon as it is done."""

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.gpu.images import ImageSet
from benchmarks.gpu.records import PARTS, Document, Part

# What a part may take beyond its end, as a share of all the time, before it is stopped.
GRACE = 0.05


class OutOfTimeError(BaseException):
    """Raised in the midst of a part that goes on beyond its end.

    No `Exception`, so that nothing that a part calls takes it for its own.
    """


@dataclass
class Budget:
    """The time of one part.

    Attributes:
        end: when it is spent, on `time.monotonic`.
        not_done: what was not begun for that.
    """

    end: float
    not_done: list[str] = field(default_factory=list)

    def left(self) -> float:
        """Seconds; below zero once it is spent."""
        return self.end - time.monotonic()

    def spent(self) -> bool:
        """Whether nothing is left."""
        return self.left() <= 0

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether something that takes about so long may begin; what may not is noted."""
        if self.left() > seconds:
            return True
        self.not_done.append(what)
        return False


@dataclass(frozen=True)
class Bench:
    """What every part works with.

    Attributes:
        device: that is measured.
        images: to train on.
        tiny: whether this is a rehearsal.
        folder: for what runs write.
    """

    device: torch.device
    images: ImageSet
    tiny: bool
    folder: Path


@dataclass(frozen=True)
class Row:
    """A part: its name in `PARTS`, its share of the time, and what measures it.

    `measure` fills in the record it is given, step by step, so that a cut leaves what is there.
    """

    name: str
    share: float
    measure: Callable[[Any, Bench, Budget], None]


def run_parts(
    rows: Sequence[Row],
    bench: Bench,
    document: Document,
    out: Path,
    ends: float,
) -> bool:
    """Do the parts in order; whether none of them failed.

    Each ends where the shares up to its own do, so that what one leaves over goes to the next.

    Args:
        rows: the parts.
        bench: for each of them.
        document: gets the parts, and is written to `out` after each.
        out: the file.
        ends: when all of the time is over, on `time.monotonic`.
    """
    started = time.monotonic()
    total, shares, good = max(ends - started, 0.0), 0.0, True
    whole = sum(row.share for row in rows)
    for row in rows:
        shares += row.share / whole
        budget = Budget(started + shares * total)
        record = PARTS[row.name]()
        began, error, cut = time.monotonic(), None, False
        if budget.spent():
            cut = True
            budget.not_done.append("all of it")
        else:
            try:
                with _stopped_at(min(budget.end + GRACE * total, ends)):
                    row.measure(record, bench, budget)
            except OutOfTimeError:
                cut = True
                budget.not_done.append("what was going on when its time was over")
            except Exception as failure:  # the next parts can be measured all the same
                error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        seconds = time.monotonic() - began
        cut = cut or bool(budget.not_done)
        part = Part(round(seconds, 3), cut, budget.not_done, error, record)
        document.parts[row.name] = part
        write(document, out)
        print(line(row.name, part), flush=True)
        good = good and error is None
    return good


@contextmanager
def _stopped_at(moment: float) -> Iterator[None]:
    """Raise `OutOfTimeError` inside at that moment; in the main thread, where signals go, alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if _imports(frame):  # a module that is half imported would fail all parts that follow
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(moment - time.monotonic(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _imports(frame: FrameType | None) -> bool:
    """Whether an import is going on in this frame or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def line(name: str, part: Part) -> str:
    """What is printed of a part."""
    said = [f"{name}: {part.seconds:.1f} s"]
    said.append("failed" if part.error else "cut by the time" if part.cut else "done")
    if part.error:
        said.append(part.error)
    if part.not_done:
        said.append(f"not done: {'; '.join(part.not_done)}")
    return ", ".join(said)


def write(document: Document, out: Path) -> None:
    """Replace the file by the whole document, so that a reader never sees half of one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    text = json.dumps(_plain(dataclasses.asdict(document)), indent=1, allow_nan=False)
    partial.write_text(text + "\n")
    os.replace(partial, out)


def _plain(value: Any) -> Any:
    """Without NaN and infinities, which JSON does not have: None."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
