"""Nodes of `reporting`. Imports are kept in the functions: matplotlib takes seconds."""

from typing import Any

import numpy as np

from weighmatch.data.config import seed_key

# Whose weights the gallery shows: the first of these arms that was run.
SHOWN = (
    "learned",
    "pu",
    "inlier",
    "ds3l",
    "energy",
    "softmatch",
    "max_prob",
    "free",
    "fixmatch",
    "supervised",
    "fixmatch_matched",
    "fixmatch_converged",
    "fixmatch_realigned",
    "fixmatch_rounds",
    "oracle",
)


# A pandas.DataFrame: pandas itself would take half a second of every start.
Table = Any


def draw_accuracy(run_scores: Table) -> Any:
    """Test accuracy of each arm."""
    from weighmatch.evaluation import figures

    return figures.draw_accuracy(run_scores)


def draw_differences(run_scores: Table) -> Any:
    """Each arm against FixMatch on the same seed."""
    from weighmatch.evaluation import figures

    return figures.draw_differences(run_scores)


def draw_weights(weight_trace: Table) -> Any:
    """Mean weight of each source through training."""
    from weighmatch.evaluation import figures

    return figures.draw_weights(weight_trace)


def draw_auroc(run_scores: Table) -> Any:
    """What tells held-out OOD images apart."""
    from weighmatch.evaluation import figures

    return figures.draw_auroc(run_scores)


def draw_calibration(calibration: Table) -> Any:
    """Reliability diagram."""
    from weighmatch.evaluation import figures

    return figures.draw_calibration(calibration)


def draw_gallery(judgements: Table, evaluation_images: dict[str, Any]) -> Any:
    """Held-out images of the first seed, by the learned weights (or the next arm's)."""
    from weighmatch.evaluation import figures

    arm = next(arm for arm in SHOWN if arm in set(judgements["arm"]))
    rows = judgements[(judgements["arm"] == arm) & (judgements["split"] == "heldout")]
    seed = int(rows["seed"].min())
    rows = rows[rows["seed"] == seed].sort_values("index")
    images = evaluation_images[seed_key(seed)]["heldout_images"]
    scores, weights = (rows[name].to_numpy(np.float64) for name in ("score", "weight"))
    return figures.draw_gallery(images, scores, weights, rows["source"].tolist(), arm)


def write_report(
    metrics: dict[str, Any],
    comparison: Table,
    study: Table,
    manifest: dict[str, Any],
    **figures: bytes,
) -> str:
    """One self-contained page."""
    from weighmatch.evaluation import report

    return report.render_report(metrics, comparison, study, manifest, figures)
