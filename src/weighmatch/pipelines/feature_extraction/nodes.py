"""Nodes of `feature_extraction`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.semisup.feature_store import FeatureStore

Arrays = dict[str, NDArray[Any]]


def extract_features(
    training_sets: dict[str, Arrays],
    evaluation_images: dict[str, Arrays],
    training: TrainingConfig,
    runs: RunsConfig,
) -> Callable[[Path], object]:
    """What fills a folder with the features that it lacks.

    It stays empty where the network is trained and no backbone is frozen.
    """
    if not training.frozen:
        return FeatureStore.clear
    return partial(
        FeatureStore.extract,
        training_sets=training_sets,
        evaluation_images=evaluation_images,
        training=training,
        workers=runs.workers,
    )
