"""How well one run classifies, how well it is calibrated and what its weights tell apart."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

CALIBRATION_BINS = 10


def negative_log_likelihood(probabilities: Floats, labels: Integers) -> float:
    """−mean log p(label) in nats, from probabilities (n, classes) and labels (n,)."""
    chosen = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(chosen, 1e-12, None)).mean())


def reliability(probabilities: Floats, labels: Integers) -> pd.DataFrame:
    """Accuracy against confidence in bins of equal width (Guo et al., 2017).

    Returns:
        One row a bin that holds images: `confidence` and `accuracy` (means), `count`.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    table = pd.DataFrame({"bin": bins, "confidence": confidence, "accuracy": correct.astype(float)})
    grouped = table.groupby("bin")
    return grouped.mean().assign(count=grouped.size()).reset_index()


def expected_calibration_error(probabilities: Floats, labels: Integers) -> float:
    """Mean gap between confidence and accuracy over the bins of `reliability`, 0 to 1."""
    bins = reliability(probabilities, labels)
    gaps = (bins["confidence"] - bins["accuracy"]).abs()
    return float((gaps * bins["count"]).sum() / bins["count"].sum())


def auroc(scores: Floats, is_id: NDArray[np.bool_]) -> float | None:
    """Chance that an in-distribution image outscores an OOD one; None if one kind is missing.

    Scores that are all the same tell nothing apart: .5.
    """
    if is_id.all() or not is_id.any():
        return None
    return float(roc_auc_score(is_id, scores))
