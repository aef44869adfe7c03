"""What runs survive: each fault as trials at tiny sizes, in one command.

    uv run python -m benchmarks.reliability [--tries 3] [--only flipped,killed] [--write FILE]

A trial survives if it ends with the result of an undisturbed run, at once or after one clear
sentence and the pipelines that the sentence names. It is lost if the result is another one, if the
error is no clear sentence, or if following it does not help. Trials write to temporary folders.
"""

import argparse
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from benchmarks import faults
from benchmarks.faults import ROOT, LostError, Workshop
from benchmarks.tables import markdown

HEADER = ("fault", "tries", "survived", "lost")


@dataclass
class Row:
    """A row of the table."""

    fault: str
    tries: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """As text."""
        return self.fault, str(self.tries), str(self.survived), str(len(self.lost))


def kill_one(process: int) -> None:
    """End a process as the kernel does."""
    os.kill(process, signal.SIGKILL)


def starve(process: int) -> None:
    """Let a process get no more memory from the kernel (Linux)."""
    resource.prlimit(process, resource.RLIMIT_AS, (1, 1))


# --- the table -------------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, Callable[[Workshop], None]]] = {
    "a flipped bit in npz": ("flipped", lambda shop: faults.flipped(shop, "*.npz")),
    "a flipped bit in parquet": ("flipped", lambda shop: faults.flipped(shop, "*.parquet")),
    "a flipped bit in json": ("flipped", lambda shop: faults.flipped(shop, "*.json")),
    "a flipped bit in png": ("flipped", lambda shop: faults.flipped(shop, "*.png")),
    "a flipped bit in a checkpoint": (
        "flipped",
        lambda shop: faults.flipped(shop, "06_models/test/*checkpoints/*.pt"),
    ),
    "a flipped bit in checkpoint.pt of an unfinished run": (
        "flipped",
        lambda shop: faults.flipped_unfinished(shop, "checkpoint.pt"),
    ),
    "a flipped bit in ranking.pt of an unfinished run": (
        "flipped",
        lambda shop: faults.flipped_unfinished(shop, "ranking.pt"),
    ),
    "a flipped bit in run.pt": ("flipped", lambda shop: faults.flipped_unfinished(shop, "run.pt")),
    "kill -9 twice, online": ("killed", lambda shop: faults.killed(shop, "online")),
    "kill -9 twice, two stages": ("killed", lambda shop: faults.killed(shop, "two_stages")),
    "kill -9 twice, rounds": ("killed", lambda shop: faults.killed(shop, "rounds")),
    "kill -9 of a preparation of other data": ("killed", faults.killed_preparation),
    "kill -9 of a study": ("killed", faults.killed_study),
    "kill -9 of a worker in training": (
        "killed",
        lambda shop: faults.hit_worker(shop, kill_one),
    ),
    "a worker in training gets no more memory": (
        "memory",
        lambda shop: faults.hit_worker(shop, starve),
    ),
    "kill -9 of a worker of a study": ("study", faults.killed_study_worker),
    "two runs at once, the same": ("two", lambda shop: faults.two_at_once(shop, other=False)),
    "two runs at once, other parameters": (
        "two",
        lambda shop: faults.two_at_once(shop, other=True),
    ),
    "a file is missing": ("mixed", faults.missing),
    "a file too many, of the user's": ("mixed", faults.extra),
    "data prepared anew under old results": ("mixed", faults.mixed),
    "a loss that diverges": ("diverging", faults.diverging),
}


def table(shop: Workshop, tries: int, only: Sequence[str]) -> Iterator[Row]:
    """A row a fault, as it is done."""
    for fault, (group, trial) in FAULTS.items():
        if only and group not in only:
            continue
        row = Row(fault)
        for _ in range(tries):
            row.tries += 1
            try:
                trial(shop)
                row.survived += 1
            except LostError as error:
                row.lost.append(str(error))
        yield row


def commit() -> str:
    """The commit that is tried, with "+" where files were changed since."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "src"]).returncode
    return name.stdout.strip() + ("+" if changed else "")


def main() -> None:
    """Try every fault, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=3, help="of each fault")
    parser.add_argument(
        "--only", default="", help="groups: flipped, killed, memory, study, two, mixed, diverging"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a file for the table, in Markdown")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shop = Workshop(Path(folder), given.seed)
        for row in table(shop, given.tries, [name for name in given.only.split(",") if name]):
            print(" | ".join(row.cells()), flush=True)
            for lost in row.lost:
                print(f"  lost: {lost}", flush=True)
            rows.append(row)
            if given.write:
                given.write.write_text(page(rows, given.tries, given.seed))


def page(rows: Sequence[Row], tries: int, seed: int) -> str:
    """The table in Markdown, with what was tried and when."""
    note = NOTE.format(command=f"`python -m benchmarks.reliability --tries {tries}`")
    when = f"Commit {commit()}, {date.today().isoformat()}, seed {seed}."
    lines = markdown(HEADER, [row.cells() for row in rows])
    lost = [f"- {row.fault}: {error}" for row in rows for error in row.lost]
    return "\n".join(
        ["# What runs survive", "", note, "", when, "", *lines, *(["", *lost] if lost else []), ""]
    )


NOTE = (
    "{command} made this table. Each try is a run of the project at tiny sizes (`--env test`) with "
    "one fault. A try survives if it ends with the result of an undisturbed run: at once, or after "
    "one clear sentence and the pipelines that the sentence names. A loss that diverges survives "
    "if a sentence names the arm, the seed and the parameter, or if the result is finite."
)


if __name__ == "__main__":
    main()
