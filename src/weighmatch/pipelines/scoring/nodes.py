"""Nodes of `scoring`: nothing here knows a test label or which image is OOD."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weighmatch.arms import get_arm
from weighmatch.data.rank_config import Preparation
from weighmatch.evaluation.chosen import choose_run
from weighmatch.export import export_run
from weighmatch.semisup import ranked_pool
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.feature_store import evaluation_inputs, with_features
from weighmatch.semisup.training.config import TrainingSet, pick_device

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
        # The manifest describes whole pools of images: no parts of them, and no features.
        other = get_arm(run.config.arm).pool == "clean" or run.config.training.frozen
        pool = "" if other else run.pool_fingerprint
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
    features: Path,
) -> dict[str, Callable[[], Arrays]]:
    """By run, what makes its predictions; one run at a time is read, used and forgotten."""
    load = {**checkpoints, **oracle_checkpoints}
    images = evaluation_inputs(evaluation_images, features)
    return {
        name: partial(_predict, load[name], images.get(key, {}))
        for name, key in zip(runs["run"], runs["key"], strict=True)
    }


def _predict(load: Callable[[], TrainedRun], images: Mapping[str, NDArray[Any]]) -> Arrays:
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
    if pool.kept is not None:
        found["pool_kept"] = pool.kept.numpy()
    if pool.evidence is not None:
        evidence = pool.evidence
        told = (evidence.share, evidence.low, evidence.high, evidence.p_clean)
        found["pool_belief"] = np.array([np.nan if v is None else v for v in told])
    if pool.labels is not None:
        found["pool_labels"] = pool.labels.numpy()
    if pool.measured is not None:
        unknown, measured = ~pool.measured.known, pool.measured
        found["pool_influence"] = measured.mean().masked_fill(unknown, np.nan).numpy()
        found["pool_influence_variance"] = measured.variance().masked_fill(unknown, np.nan).numpy()
        found["pool_evidence"] = measured.evidence.numpy()
    return found


def describe_pool(
    runs: pd.DataFrame,
    checkpoints: Runs,
    oracle_checkpoints: Runs,
    training_sets: dict[str, Arrays],
    features: Path,
) -> Arrays:
    """What the run whose ranking is handed out says of its whole pool."""
    run = choose_run(runs)
    trained = {**checkpoints, **oracle_checkpoints}[run["run"]]()
    key = run["key"]
    sets = with_features({key: training_sets[key]}, features)
    device = pick_device(trained.config.training.device)
    return ranked_pool.describe_pool(trained, TrainingSet.of(sets[key]), device)


def export_model(
    runs: pd.DataFrame, checkpoints: Runs, oracle_checkpoints: Runs, manifest: Mapping[str, Any]
) -> Callable[[Path], None]:
    """What writes the run whose model is handed out into a folder."""
    run = choose_run(runs)
    load = {**checkpoints, **oracle_checkpoints}[run["run"]]
    (cell,) = (cell for cell in manifest["cells"] if cell["key"] == run["key"])
    facts = {"images": f"{cell['labelled']:,} labelled and {cell['pool']['images']:,} unlabelled"}
    preparation = vars(Preparation.of(manifest["parameters"]))
    return lambda folder: export_run(load(), folder, facts, preparation)
