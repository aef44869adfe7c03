"""Nodes of `reporting`."""

from typing import Any

import numpy as np
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
    evaluation_images: dict[str, Arrays],
    ood_truth: dict[str, Arrays],
) -> Figure:
    """Held-out images of the first cell and seed, by the weights of one arm."""
    first = runs[runs["key"] == runs["key"].iloc[0]]
    arm = _shown(first["arm"].tolist())
    run = first[first["arm"] == arm.name].iloc[-1]
    found, key = predictions[run["run"]](), run["key"]
    codes = ood_truth[key]["heldout_sources"]
    return figures.draw_gallery(
        evaluation_images[key]["heldout_images"],
        found["heldout_scores"],
        found["heldout_weights"],
        np.array(KIND_NAMES)[codes].tolist(),
        arm.name,
    )


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
