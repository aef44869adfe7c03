"""The ranking of a pool as a table: a row a file, with what speaks against the low ones in words.

A pool is held by the arrays of `weighmatch.semisup.ranked_pool.describe_pool`.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from weighmatch.evaluation.chosen import HeldOut
from weighmatch.evaluation.judging import Arrays
from weighmatch.evaluation.scores import negative_log_likelihood

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

COLUMNS = (
    *("path", "score", "weight", "kept", "predicted_class", "probability", "confidence"),
    *("near_duplicate_of", "why_low"),
)
# Temperatures that are looked at, and the spread of log T before any label is seen: a few images
# that are all right would make any classifier look too unsure.
TEMPERATURES, PRIOR_SPREAD = (0.1, 10.0), 0.3
# An image is told to be low in something if this share of the images kept is higher.
LOW = 0.95
# A classifier that is as sure as that is not called unsure.
SURE = 0.9


def fit_temperature(held: HeldOut | None) -> float | None:
    """The temperature that suits held-out labels best (Guo et al., 2017); None: none known.

    Probabilities become softmax(log p / T). log T has a normal prior around 0, which a few labels
    do not outweigh.
    """
    if held is None or not len(held.labels):
        return None

    def loss(log_temperature: float) -> float:
        calibrated = calibrate(held.probabilities, float(np.exp(log_temperature)))
        loss = len(held.labels) * negative_log_likelihood(calibrated, held.labels)
        return loss + 0.5 * (log_temperature / PRIOR_SPREAD) ** 2

    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded")
    return float(np.exp(found.x))


def calibrate(probabilities: Floats, temperature: float) -> Floats:
    """softmax(log p / T) of probabilities (n, classes)."""
    logits = np.log(np.clip(probabilities, 1e-12, None)) / temperature
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    calibrated: Floats = raised / raised.sum(axis=1, keepdims=True)
    return calibrated


def ranking_table(pool: Arrays, files: pd.DataFrame, temperature: float | None) -> pd.DataFrame:
    """The files of a pool from the most to the least useful.

    Args:
        pool: from `describe_pool`.
        files: the rows of `image_files` of this pool, copies among them.
        temperature: from `fit_temperature`.

    Returns:
        The columns `COLUMNS`: `path` (relative to the folder); `score` (what ranks: higher is
        more useful), `weight` (mean 1) and `kept` of the last ranking; `predicted_class` (a name);
        `probability` of that class, calibrated on labelled images that were held out (NaN where
        none was); `confidence`, the same as the classifier says it; `near_duplicate_of` (a path or
        ""); and `why_low` ("" for images that are kept).

        A copy is not kept and has weight 0, as training does not use it. It has its original's
        score; NaN where that is no image of the pool.
    """
    probabilities = pool["probabilities"].astype(np.float64)
    likely = np.full(len(probabilities), np.nan)
    if temperature is not None:
        likely = calibrate(probabilities, temperature).max(axis=1)
    by_image = pd.DataFrame(
        {
            "score": pool["scores"].astype(np.float64),
            "weight": pool["weights"].astype(np.float64),
            "kept": pool["kept"].astype(bool),
            "predicted_class": name_classes(pool)[probabilities.argmax(axis=1)],
            "probability": likely,
            "confidence": probabilities.max(axis=1),
            "why_low": explain(pool),
        }
    )
    table = by_image.reindex(files["index"].to_numpy()).reset_index(drop=True)
    table["path"] = [str(path) for path in files["path"]]
    table["near_duplicate_of"] = copies_of(files)
    copy = table["near_duplicate_of"] != ""
    table["kept"] = (table["kept"] == True) & ~copy  # noqa: E712 (it may be missing)
    table.loc[copy, "weight"] = 0.0
    table.loc[copy, "why_low"] = "a copy of another file"
    table["predicted_class"] = table["predicted_class"].fillna("")
    order = np.lexsort((-table["confidence"], -table["score"], ~table["kept"]))
    return table.iloc[order][list(COLUMNS)].reset_index(drop=True)


def copies_of(files: pd.DataFrame) -> list[str]:
    """The file that each is a copy of, or nearly; "" if of none."""
    exact, near = (files[name].fillna("") for name in ("duplicate_of", "near_duplicate_of"))
    return [str(path) for path in exact.where(exact != "", near)]


def name_classes(pool: Arrays) -> NDArray[np.str_]:
    """The name of each class, or its number where it has none, (classes,)."""
    return np.array([str(name) or str(k) for k, name in enumerate(pool["class_names"])])


def explain(pool: Arrays) -> list[str]:
    """In words why each image ranks low; "" for those that are kept.

    Likeness to the labelled images and confidence are called low below 95 % of the images kept.
    """
    kept = pool["kept"].astype(bool)
    if kept.all() or not kept.any():
        return [""] * len(kept)
    likeness, confidence = pool["likeness"], pool["probabilities"].max(axis=1)
    influence = pool["influence"]
    harmful = np.zeros(len(kept), bool)
    harmful[~np.isnan(influence)] = influence[~np.isnan(influence)] < 0
    full = pool["scores"] > np.quantile(pool["scores"][kept], 1 - LOW)
    unsure = min(SURE, float(np.quantile(confidence[kept], 1 - LOW)))
    reasons = (
        ("unlike the labelled images", likeness < np.quantile(likeness[kept], 1 - LOW)),
        ("the classifier is unsure", confidence < unsure),
        ("training on it would raise the loss on labelled images", harmful),
        ("enough images of its class rank higher", full),
    )
    words = []
    for k, keep in enumerate(kept):
        found = [] if keep else [reason for reason, holds in reasons if holds[k]]
        words.append("" if keep else "; ".join(found) or "more like the pool than like the labels")
    return words
