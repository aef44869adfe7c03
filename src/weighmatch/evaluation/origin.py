"""How a page was made: by which command, code and libraries, and when."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version

LIBRARIES = ("weighmatch", "torch", "numpy", "pandas", "scipy", "matplotlib", "kedro")


@dataclass(frozen=True)
class Origin:
    """How a page was made.

    Attributes:
        command: the command that wrote it.
        commit: of the code that wrote it; "": it does not lie in a repository.
        changed: whether that code has changes that are not committed.
        date: when, in UTC.
        versions: of Python and the libraries, by name.
    """

    command: str
    commit: str
    changed: bool
    date: str
    versions: Mapping[str, str]


def find_origin() -> Origin:
    """How this process makes a page."""
    # A package that is installed elsewhere may lie within another repository.
    tracked = _git("ls-files", Path(__file__).name)
    called = Path(sys.argv[0])
    program = called.parent.name if called.name == "__main__.py" else called.stem
    return Origin(
        # Kedro calls itself "python -m kedro" where it was started so.
        command=shlex.join([*program.split(), *sys.argv[1:]]),
        commit=_git("rev-parse", "HEAD") if tracked else "",
        changed=bool(tracked and _git("status", "--porcelain", "--untracked-files=no")),
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        versions={"python": python_version(), **{name: version(name) for name in LIBRARIES}},
    )


def _git(*arguments: str) -> str:
    """What Git says in the folder of this file; "" where it fails or is missing."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
