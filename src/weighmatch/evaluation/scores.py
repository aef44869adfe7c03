"""How well one run classifies, how well it is calibrated and what its scores tell apart."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

CALIBRATION_BINS = 10


def negative_log_likelihood(probabilities: Floats, labels: Integers) -> float:
    """−mean log p(label) in nats, from probabilities (n, classes) and labels (n,)."""
    chosen = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(chosen, 1e-12, None)).mean())


def confidence_and_correct(probabilities: Floats, labels: Integers) -> tuple[Floats, Mask]:
    """The highest probability of each image (n,), and whether its class is the label (n,)."""
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


def reliability(confidence: Floats, correct: Mask) -> pd.DataFrame:
    """Accuracy against confidence in bins of equal width (Guo et al., 2017).

    Returns:
        One row a bin that holds images: `bin`, `confidence` and `accuracy` (means, as fractions),
        `count`.
    """
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    table = pd.DataFrame({"bin": bins, "confidence": confidence, "accuracy": correct.astype(float)})
    grouped = table.groupby("bin")
    return grouped.mean().assign(count=grouped.size()).reset_index()


def expected_calibration_error(probabilities: Floats, labels: Integers) -> float:
    """Mean gap between confidence and accuracy over the bins of `reliability`, 0 to 1."""
    bins = reliability(*confidence_and_correct(probabilities, labels))
    gaps = (bins["confidence"] - bins["accuracy"]).abs()
    return float((gaps * bins["count"]).sum() / bins["count"].sum())


def auroc(scores: NDArray[np.floating], high: Mask, low: Mask) -> float:
    """Chance that an image of `high` outscores one of `low`; scores and both masks are (n,).

    It is NaN where one of the two is empty, and .5 where all scores are the same.
    """
    if not high.any() or not low.any():
        return np.nan
    either = high | low
    return float(roc_auc_score(high[either], scores[either].astype(np.float64)))
