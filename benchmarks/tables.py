"""Tables in Markdown on standard output."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version

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


def conditions(packages: Iterable[str]) -> str:
    """The machine, and the versions that were run."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}), {torch.get_num_threads()} torch thread, "
        f"torch {torch.__version__}, {versions}"
    )


def show(title: str, lines: Iterable[str], note: str = "") -> None:
    """Print a table under its title."""
    print(f"\n### {title}\n")
    if note:
        print(f"{note}\n")
    print("\n".join(lines), flush=True)
