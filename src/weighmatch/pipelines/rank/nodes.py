"""Nodes of `rank`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from weighmatch.data.rank_config import Preparation, RankConfig
from weighmatch.export import RUN, read_preparation
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.shards import clear
from weighmatch.streaming import rank_folder


def rank_images(
    exported_model: Path, pile_verdict: Mapping[str, Any], rank: RankConfig
) -> Callable[[Path], Callable[[], object]]:
    """What writes ranking and gallery of a pile of images that training never saw."""
    run = TrainedRun.load(exported_model / RUN)
    preparation = Preparation.of(read_preparation(exported_model))
    temperature = pile_verdict["temperature"]

    def write(folder: Path) -> Callable[[], object]:
        # Beside the ranking, whatever the name under which that is filled.
        work = folder.with_name(f"{folder.stem}.shards")
        rank_folder(run, rank.images, folder, preparation, temperature, rank.workers, rank, work)
        return partial(clear, work, rank.images)

    return write
