"""`python -m weighmatch`: the same as `kedro run`."""

import sys
from pathlib import Path

from kedro.framework.project import configure_project


def main() -> None:
    """Run the project in the current folder."""
    configure_project(Path(__file__).parent.name)
    from weighmatch.cli import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
