"""The log of a run: lines of numbers, and `metrics.jsonl`, a copy of them for people."""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from weighmatch.semisup.checkpoint import LogLine

# What one step adds: numbers, or tensors that are still on their device.
Entry = dict[str, Tensor | float]


class RunLog:
    """The lines of a run. The checkpoint keeps them; the file is only ever appended to or cut.

    Args:
        path: the file, which need not exist yet.
        writes: whether this process writes it; of several that train a run one does.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        self.lines: list[LogLine] = []

    def add(self, entries: Sequence[Entry], **numbers: float) -> None:
        """One line of means over steps: a line a step would cost a device synchronisation.

        Numbers that are not finite are left out, as JSON knows none.
        """
        line: LogLine = dict(numbers)
        for name in sorted({name for entry in entries for name in entry}):
            values = [entry[name] for entry in entries if name in entry]
            tensors = [value for value in values if isinstance(value, Tensor)]
            mean = float(torch.stack(tensors).mean() if tensors else sum(values) / len(values))
            if math.isfinite(mean):
                line[name] = mean
        self.lines.append(line)
        if not self._writes:
            return
        with self.path.open("ab") as file:
            file.write(_encoded([line]))

    def restore(self, lines: Sequence[LogLine]) -> None:
        """Go on from these lines.

        A file that begins with them is cut after them. Any other one is written anew beside
        itself, so that no kill loses it.
        """
        self.lines = list(lines)
        if not self._writes:
            return
        wanted = _encoded(lines)
        found = self.path.read_bytes() if self.path.exists() else b""
        if found == wanted:
            return
        if wanted and found.startswith(wanted):
            os.truncate(self.path, len(wanted))
            return
        if wanted and found:
            logging.getLogger(__name__).warning(
                "%s is not what its run wrote, and is written anew", self.path
            )
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        partial.write_bytes(wanted)
        os.replace(partial, self.path)


def _encoded(lines: Sequence[LogLine]) -> bytes:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
