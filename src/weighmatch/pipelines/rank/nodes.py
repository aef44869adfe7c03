"""Nodes of `rank`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weighmatch.data.rank_config import Preparation, RankConfig
from weighmatch.export import RUN, read_preparation
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.streaming import rank_folder


def rank_images(
    exported_model: Path, pile_verdict: Mapping[str, Any], rank: RankConfig
) -> Callable[[Path], None]:
    """What writes ranking and gallery of a folder of images that training never saw."""
    run = TrainedRun.load(exported_model / RUN)
    preparation = Preparation.of(read_preparation(exported_model))
    temperature = pile_verdict["temperature"]

    def write(folder: Path) -> None:
        rank_folder(run, rank.images, folder, preparation, temperature, rank.workers, rank)

    return write
