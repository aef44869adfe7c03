"""What Ray costs on one machine: the default job is trained by both engines in turn.

python -m benchmarks.engines [--turns 3]

Each turn runs the pipelines up to training twice, in folders of their own. Prints seconds and their
ratio, and whether the stored runs are the same to the bit.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.tables import markdown
from benchmarks.timing import seconds_of
from weighmatch.engine_config import ENGINES
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.parts.state_file import content_digest

PIPELINES = "data_preparation,feature_extraction,training"


def train(engine: str, folder: str) -> None:
    """Run the pipelines."""
    given = f"data_folder={folder},runs.engine={engine}"
    command = [sys.executable, "-m", "kedro", "run", "--pipelines", PIPELINES, "--params", given]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def digests(folder: str) -> dict[str, str]:
    """Digests of the classifiers of all stored runs, by name."""
    return {
        path.stem: content_digest(dict(TrainedRun.load(path).classifier.state_dict()))
        for path in Path(folder, "06_models").rglob("*checkpoints/*.pt")
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    rows, same = [], True
    for turn in range(parser.parse_args().turns):
        seconds, found = [], []
        for engine in ENGINES:
            with TemporaryDirectory() as folder:
                seconds.append(seconds_of(partial(train, engine, folder)))
                found.append(digests(folder))
        same &= found[0] == found[1] != {}
        ratio = f"{seconds[1] / seconds[0]:.2f}"
        rows.append([f"{turn + 1}", *(f"{one:.0f}" for one in seconds), ratio])
        print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(markdown(["turn", *(f"{name}, s" for name in ENGINES), "ratio"], rows)))
    print(f"\nThe {len(found[0])} classifiers are {'' if same else 'not '}the same to the bit.")


if __name__ == "__main__":
    main()
