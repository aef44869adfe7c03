"""Nodes of `feature_extraction`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from weighmatch.evaluation.chosen import EVERYTHING, paths_of
from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.semisup.feature_store import FeatureStore, with_features
from weighmatch.semisup.training.config import TrainingSet
from weighmatch.semisup.training.ranking import rank_early

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


def write_early_ranking(
    training_sets: dict[str, Arrays], features: Path, image_files: pd.DataFrame
) -> pd.DataFrame:
    """The pool by nearness to the labelled images, before anything is trained; `path`, `score`.

    It is empty where no backbone is frozen, or where there is no set of all labelled images.
    """
    key = next((key for key in training_sets if f"-{EVERYTHING}-" in f"-{key}"), None)
    if key is None or not FeatureStore.is_in(features):
        return pd.DataFrame({"path": [], "score": []})
    arrays = with_features({key: training_sets[key]}, features)[key]
    scores = rank_early(TrainingSet.of(arrays)).double().numpy()
    table = pd.DataFrame({"path": paths_of(image_files, key, "pool"), "score": scores})
    return table.sort_values("score", ascending=False, kind="stable")
