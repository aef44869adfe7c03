"""What the machine of the command does alone while a pile is ranked, in images a second.

python -m benchmarks.ranking [--images 200000]

Lists a folder of small images, scores them, and merges their rows into a ranking. Then a cluster of
Ray on this machine is given shards with nothing to do. Prints how many of each pass in a second.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from benchmarks.tables import conditions, markdown
from benchmarks.timing import seconds_of
from weighmatch.data.config import DataConfig
from weighmatch.data.rank_config import Preparation
from weighmatch.data.source import get_source
from weighmatch.engine_config import EngineConfig
from weighmatch.ray_engine import run_in_pool
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.schedules import make_schedule
from weighmatch.shards import Shards
from weighmatch.streaming import _merge, _score

# Shards with nothing to do: the time of the few is taken off that of the many.
FEW, MANY = 50, 2050


def nothing(number: int, progress: Callable[[float], None]) -> int:
    """A shard with nothing to do."""
    progress(1)
    return number


def train(folder: Path) -> TrainedRun:
    """A run of a few steps on digits."""
    source, config = get_source("digits"), DataConfig((0,))
    splits = source.draw(source.load(config), config, 0)
    assert splits.pool is not None
    data = TrainingSet(splits.labelled_images, splits.labels, splits.pool.images)
    training = TrainingConfig(device="cpu", snapshots=1)
    return make_schedule(RunConfig("fixmatch", 0, 20, data.classes, training)).fit(data, folder)


def draw(root: Path, count: int) -> None:
    """Write small images, a thousand in a folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = root / f"{number // 1000:06d}" / f"{number:09d}.png"
        if number % 1000 == 0:
            place.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(place, compress_level=1)


def rank(count: int) -> list[list[str]]:
    """Rows of how many images are listed, scored and merged in a second."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        run = train(place / "run")
        draw(place / "images", count)
        made: list[Shards] = []

        def list_images() -> None:
            made.append(Shards(place / "work", run, place / "images", Preparation(), "cpu"))

        listing = seconds_of(list_images)
        scoring = seconds_of(lambda: _score(made[0], "auto", EngineConfig()))
        target = place / "ranking"
        merging = seconds_of(lambda: _merge(made[0], run, place / "images", target, None))
    rows = {"images listed": listing, "small images scored": scoring, "rows merged": merging}
    return [[name, f"{count / seconds:,.0f}"] for name, seconds in rows.items()]


def hand_out() -> list[str]:
    """A row of how many shards a cluster is handed in a second."""

    def give(count: int) -> float:
        jobs = [(number,) for number in range(count)]
        return seconds_of(lambda: list(run_in_pool(nothing, jobs, title="shards", total=count)))

    give(1)  # a cluster is started
    few, many = give(FEW), give(MANY)
    return ["shards handed out", f"{(MANY - FEW) / (many - few):,.0f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200_000)
    rows = [*rank(parser.parse_args().images), hand_out()]
    print("\n".join(markdown(["what", "a second"], rows)), end="\n\n")
    print(conditions(["torch", "ray"]))


if __name__ == "__main__":
    from benchmarks.ranking import main  # a worker cannot find what is in `__main__`

    main()
