"""Tables in Markdown on standard output."""

import contextlib
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def spread(values: Sequence[float]) -> str:
    """Median and range; nothing of nothing."""
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table, line by line."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def verdict(claim: str, exceptions: Sequence[str]) -> str:
    """A line that says whether the claim holds."""
    return f"{claim}: {'no: ' + '; '.join(exceptions) if exceptions else 'yes'}."


def conditions(packages: Iterable[str], device: str = "cpu") -> str:
    """The machine, and the versions that are run; of packages that are installed."""
    versions = []
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return (
        f"{gpu}{os.cpu_count()} CPUs ({processor()}), {torch.get_num_threads()} torch "
        f"thread, torch {torch.__version__}, {', '.join(versions)}"
    )


def show(title: str, lines: Iterable[str], note: str = "") -> None:
    """Print a table under its title."""
    print(f"\n### {title}\n")
    if note:
        print(f"{note}\n")
    print("\n".join(lines), flush=True)


def processor() -> str:
    """Its model where Linux tells, or else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
