"""Nodes of `reporting`."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from weighmatch.arms import LEARNED, Arm, in_order
from weighmatch.data.ood import KIND_NAMES
from weighmatch.evaluation import benchmark_figures, figures, report
from weighmatch.evaluation.judging import Arrays, Predictions


def draw_accuracy(run_scores: pd.DataFrame) -> Figure:
    """Test accuracy of each arm."""
    return figures.draw_accuracy(run_scores)


def draw_differences(run_scores: pd.DataFrame) -> Figure:
    """Each arm against FixMatch on the same seed."""
    return figures.draw_differences(run_scores)


def draw_weights(weight_trace: pd.DataFrame) -> Figure:
    """Mean weight of each kind of image through training."""
    return figures.draw_weights(weight_trace)


def draw_auroc(run_scores: pd.DataFrame) -> Figure:
    """What tells held-out OOD images apart."""
    return figures.draw_auroc(run_scores)


def draw_calibration(calibration: pd.DataFrame) -> Figure:
    """Reliability diagram."""
    return figures.draw_calibration(calibration)


def draw_compute(run_scores: pd.DataFrame) -> Figure:
    """Accuracy against compute."""
    return benchmark_figures.draw_compute(run_scores)


def draw_gap(comparison: pd.DataFrame) -> Figure:
    """How much of the oracle's gap is closed."""
    return benchmark_figures.draw_gap(comparison)


def draw_gallery(
    runs: pd.DataFrame,
    predictions: Predictions,
    training_sets: dict[str, Arrays],
    evaluation_images: dict[str, Arrays],
    ood_truth: dict[str, Arrays],
) -> Figure:
    """Images of the first cell and seed by the weights of one arm: held-out ones, or the pool."""
    first = runs[runs["key"] == runs["key"].iloc[0]]
    arm = _shown(first["arm"].tolist())
    run = first[first["arm"] == arm.name].iloc[-1]
    found, key = predictions[run["run"]](), run["key"]
    place, images = "heldout", evaluation_images[key].get("heldout_images")
    if images is None:
        place, images = "pool", training_sets[key]["unlabelled_images"]
    weights = found[f"{place}_weights"]
    kinds = ood_truth.get(key, {}).get(f"{place}_sources")
    names = ["unlabelled"] * len(images) if kinds is None else [KIND_NAMES[k] for k in kinds]
    scores = found.get(f"{place}_scores", weights)
    return figures.draw_gallery(images, scores, weights, names, arm.name)


def _shown(names: list[str]) -> Arm:
    """Learned weights, or else the last arm that weighs unseen images, or else the first."""
    arms = in_order(names)
    weighing = [arm for arm in arms if arm.weighs and arm.inductive]
    return LEARNED if LEARNED in arms else [arms[0], *weighing][-1]


def write_report(
    metrics: dict[str, Any],
    table: pd.DataFrame,
    study: pd.DataFrame,
    manifest: dict[str, Any],
    ihvp_figures: dict[str, bytes],
    **drawn: bytes,
) -> str:
    """One self-contained page."""
    shown = {**drawn, "ihvp": ihvp_figures["cost"]}
    return report.render_report(metrics, table, study, manifest, shown)
