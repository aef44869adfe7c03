"""Nodes of `scoring`: nothing here knows a test label or which image is OOD."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weighmatch.arms import get_arm
from weighmatch.semisup.checkpoint import TrainedRun

Arrays = dict[str, NDArray[Any]]
Runs = dict[str, Callable[[], TrainedRun]]
CELL = ["key", "source", "setting", "regime", "ratio", "labels_per_class"]


def collect_runs(
    checkpoints: Runs,
    oracle_checkpoints: Runs,
    trained_runs: pd.DataFrame,
    oracle_runs: pd.DataFrame,
    manifest: Mapping[str, Any],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a run, with its cell of the grid and what training measured; and all lines of its log.

    Raises:
        ValueError: if a run is of splits that the manifest does not describe.
    """
    rows, lines = [], []
    for name, load in {**checkpoints, **oracle_checkpoints}.items():
        run = load()
        # A clean pool is a part of the pool that the manifest describes.
        pool = "" if get_arm(run.config.arm).pool == "clean" else run.pool_fingerprint
        rows.append((name, run.seconds, run.update_seconds, run.mask_rate(), pool))
        lines += [{"run": name, **line} for line in run.log]
    measured = pd.DataFrame(rows, columns=["run", "seconds", "update_seconds", "mask_rate", "pool"])
    known = pd.concat([table for table in (trained_runs, oracle_runs) if len(table)])
    cells = pd.DataFrame(manifest["cells"])[CELL].astype({"ratio": float})
    if not set(known["key"]) <= set(cells["key"]):
        raise ValueError(
            "the checkpoints are not of the data in the data folder; run the pipeline training"
        )
    numbers = dict.fromkeys(["update_seconds", "mask_rate"], float)
    measured = measured.astype(numbers)
    return known.merge(cells, on="key").merge(measured, on="run"), pd.DataFrame(lines)


def score_images(
    runs: pd.DataFrame,
    checkpoints: Runs,
    oracle_checkpoints: Runs,
    evaluation_images: dict[str, Arrays],
) -> dict[str, Callable[[], Arrays]]:
    """By run, what makes its predictions; one run at a time is read, used and forgotten."""
    load = {**checkpoints, **oracle_checkpoints}
    return {
        name: partial(_predict, load[name], evaluation_images.get(key, {}))
        for name, key in zip(runs["run"], runs["key"], strict=True)
    }


def _predict(load: Callable[[], TrainedRun], images: Arrays) -> Arrays:
    """What a run says of unseen images and, if it was trained on the whole pool, of the pool."""
    run = load()
    found: Arrays = {}
    if "test_images" in images:
        found["test_probabilities"] = run.score(images["test_images"]).probabilities
    if "heldout_images" in images:
        scored = run.score(images["heldout_images"])
        found["heldout_probabilities"] = scored.probabilities
        found |= {"heldout_scores": scored.scores, "heldout_weights": scored.weights}
    if get_arm(run.config.arm).pool == "whole":
        found |= _describe_pool(run)
    return found


def _describe_pool(run: TrainedRun) -> Arrays:
    """Weights and pseudo-labels at the end, measured influences, and weights through training."""
    history, pool = run.history, run.pool
    found = {
        "history_step": np.array(history.step),
        "history_weights": history.weights.numpy(),
        "history_confidence": history.confidence.numpy(),
        "pool_weights": history.weights[-1].numpy(),
    }
    if pool.labels is not None:
        found["pool_labels"] = pool.labels.numpy()
    if pool.measured is not None:
        unknown, measured = ~pool.measured.known, pool.measured
        found["pool_influence"] = measured.mean().masked_fill(unknown, np.nan).numpy()
        found["pool_influence_variance"] = measured.variance().masked_fill(unknown, np.nan).numpy()
        found["pool_evidence"] = measured.evidence.numpy()
    return found
