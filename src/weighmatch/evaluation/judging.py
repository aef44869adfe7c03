"""Predictions held against the truth, one run in memory at a time.

A run is a row of the table `runs`: its name `run`, the `key` of its splits, the columns of `RUN`.
`predictions` holds by the name of a run what loads its arrays, those that there are of
`test_probabilities`, `heldout_probabilities` (n, classes), `heldout_scores` and `heldout_weights`
(n,); of the pool `pool_weights`, `pool_kept`, `pool_labels`, `pool_influence`,
`pool_influence_variance` and `pool_evidence` (N,); and `history_step` (S,), `history_weights`,
`history_confidence` (S, N).
`truth` holds by key `pool_…` and `heldout_…`: `sources` (codes of `OOD_KINDS`), `classes` (−1: OOD)
and `shifted`. `test_labels` holds by key `labels` and `shifted`. What would need more than there is
becomes NaN, or has no row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weighmatch.data.ood import KIND_NAMES
from weighmatch.evaluation.scores import (
    auroc,
    confidence_and_correct,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)

Arrays = Mapping[str, NDArray[Any]]
Predictions = Mapping[str, Callable[[], Arrays]]

# The columns that say what a run was trained on, and which run it is.
CELL = ("source", "setting", "regime", "ratio", "labels_per_class")
SERIES = (*CELL, "arm", "schedule")
RUN = (*SERIES, "seed")

# The columns that `judge_runs` adds: on test images, on held-out images, on the pool.
SCORES = (
    *("accuracy", "accuracy_shifted", "nll", "ece"),
    *("heldout_accuracy", "auroc_weight", "auroc_near", "auroc_far", "auroc_confidence"),
    *("weight_id", "weight_ood", "pool_weight_id", "pool_weight_ood", "pool_weight_shifted"),
    *("worst_class_kept", "pool_weight_right", "pool_weight_wrong", "right_labels"),
    *("auroc_influence", "auroc_influence_near", "auroc_influence_labels", "pool_kept"),
    *("useful_share", "useful_low", "useful_high", "clean_chance"),
)
BELIEF = SCORES[-4:]
# The code of the OOD images that are nearest to in-distribution ones.
NEAR_CODE = KIND_NAMES.index("unseen")


def require_same_data(runs: pd.DataFrame, manifest: Mapping[str, Any]) -> None:
    """Refuse runs of other data than the manifest describes, by the fingerprint of their pool.

    Args:
        runs: with a column `pool`, the fingerprint, or "" for a cleaned pool.
        manifest: `cells`, a list with `key` and `fingerprints` of each set of splits.

    Raises:
        ValueError: if a run was trained on another pool.
    """
    pools = {cell["key"]: cell["fingerprints"]["unlabelled_images"] for cell in manifest["cells"]}
    for run in runs.to_dict("records"):
        if run["pool"] not in ("", pools.get(run["key"])):
            raise ValueError(
                f"the checkpoint of {run['arm']}, seed {run['seed']}, was trained on other data "
                "than lie in the data folder; run the pipelines training and scoring"
            )


def judge_runs(
    runs: pd.DataFrame,
    predictions: Predictions,
    truth: Mapping[str, Arrays],
    test_labels: Mapping[str, Arrays],
) -> pd.DataFrame:
    """One row a run, with what it is worth.

    Returns:
        `runs` without `key` and `pool`, and these columns. Accuracies are percentages, all other
        shares fractions.

        On test images: `accuracy`, `accuracy_shifted` (on the shifted domain), `nll` (nats),
        `ece`. On held-out images: `heldout_accuracy` (in-distribution images), `auroc_weight` of
        the arm's scores, in-distribution against OOD, `auroc_near` against unseen classes alone,
        `auroc_far` against the other OOD, `auroc_confidence` of the classifier's confidence, and
        the mean weights `weight_id` and `weight_ood`.

        On the pool at the end of training: the mean weights `pool_weight_id`, `pool_weight_ood`,
        `pool_weight_shifted` (in-distribution images of the shifted domain), `pool_weight_right`
        and `pool_weight_wrong` (in-distribution images whose pseudo-label is right or wrong);
        `right_labels`, the share of right pseudo-labels; `worst_class_kept`, the share that has at
        least half of the largest weight, in the class where it is smallest; and of the measured
        influences `auroc_influence` (against OOD), `auroc_influence_near` (against unseen
        classes) and `auroc_influence_labels` (right pseudo-labels against wrong ones). Of its last
        ranking `pool_kept`, the share that it keeps, and what that rests on: `useful_share` with
        the interval from `useful_low` to `useful_high`, should the pool be contaminated, and
        `clean_chance`, the chance that it is clean or the p of a test of that.
    """
    rows: list[dict[Any, Any]] = []
    for run in runs.to_dict("records"):
        known, labels = (part.get(run["key"], {}) for part in (truth, test_labels))
        rows.append({**run, **_judge(predictions[run["run"]](), known, labels)})
    columns = [name for name in runs.columns if name not in ("key", "pool")]
    return pd.DataFrame(rows, columns=[*columns, *SCORES]).astype(dict.fromkeys(SCORES, float))


def _judge(found: Arrays, truth: Arrays, labels: Arrays) -> dict[str, float]:
    scores: dict[str, float] = {}
    if "labels" in labels and "test_probabilities" in found:
        scores |= _on_test(found["test_probabilities"].astype(np.float64), labels)
    if "heldout_sources" in truth and "heldout_probabilities" in found:
        scores |= _on_heldout(found, truth)
    if "pool_sources" in truth and "pool_weights" in found:
        scores |= _on_pool(found, truth)
    if "pool_sources" in truth and "pool_influence" in found:
        scores |= _on_influence(found, truth)
    if "pool_kept" in found:
        scores["pool_kept"] = _mean(found["pool_kept"])
    if "pool_belief" in found:
        scores |= dict(zip(BELIEF, found["pool_belief"].tolist(), strict=True))
    return scores


def _on_test(probabilities: NDArray[np.float64], truth: Arrays) -> dict[str, float]:
    labels = truth["labels"]
    correct = probabilities.argmax(axis=1) == labels
    return {
        "accuracy": 100 * _mean(correct),
        "accuracy_shifted": 100 * _mean(correct[truth.get("shifted", [])]),
        "nll": negative_log_likelihood(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels),
    }


def _on_heldout(found: Arrays, truth: Arrays) -> dict[str, float]:
    probabilities, sources = found["heldout_probabilities"], truth["heldout_sources"]
    is_id, is_near = sources == 0, sources == NEAR_CODE
    confidence, correct = confidence_and_correct(probabilities, truth["heldout_classes"])
    scores, weights = found["heldout_scores"], found["heldout_weights"].astype(np.float64)
    return {
        "heldout_accuracy": 100 * _mean(correct[is_id]),
        "auroc_weight": auroc(scores, is_id, ~is_id),
        "auroc_near": auroc(scores, is_id, is_near),
        "auroc_far": auroc(scores, is_id, ~is_id & ~is_near),
        "auroc_confidence": auroc(confidence, is_id, ~is_id),
        "weight_id": _mean(weights[is_id]),
        "weight_ood": _mean(weights[~is_id]),
    }


def _on_pool(found: Arrays, truth: Arrays) -> dict[str, float]:
    weights, classes = found["pool_weights"].astype(np.float64), truth["pool_classes"]
    is_id = truth["pool_sources"] == 0
    kept = weights >= weights.max() / 2
    kept_of_class = [_mean(kept[classes == c]) for c in np.unique(classes[is_id])]
    scores = {
        "pool_weight_id": _mean(weights[is_id]),
        "pool_weight_ood": _mean(weights[~is_id]),
        "worst_class_kept": min(kept_of_class, default=np.nan),
    }
    if "pool_shifted" in truth:
        scores["pool_weight_shifted"] = _mean(weights[is_id & truth["pool_shifted"]])
    if "pool_labels" in found:
        right = found["pool_labels"] == classes
        scores["right_labels"] = _mean(right[is_id])
        scores["pool_weight_right"] = _mean(weights[is_id & right])
        scores["pool_weight_wrong"] = _mean(weights[is_id & ~right])
    return scores


def _on_influence(found: Arrays, truth: Arrays) -> dict[str, float]:
    influence, sources = found["pool_influence"], truth["pool_sources"]
    measured = ~np.isnan(influence)
    is_id = measured & (sources == 0)
    scores = {
        "auroc_influence": auroc(influence, is_id, measured & ~is_id),
        "auroc_influence_near": auroc(influence, is_id, measured & (sources == NEAR_CODE)),
    }
    if "pool_labels" in found:
        right = found["pool_labels"] == truth["pool_classes"]
        scores["auroc_influence_labels"] = auroc(influence, is_id & right, is_id & ~right)
    return scores


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else np.nan


def calibration_table(
    runs: pd.DataFrame, predictions: Predictions, test_labels: Mapping[str, Arrays]
) -> pd.DataFrame:
    """Reliability bins of each arm and schedule in each cell, over the test images of all seeds.

    Returns:
        The columns of `SERIES`, and `bin`, `confidence`, `accuracy` (fractions) and `count`.
    """
    tables = []
    tested = runs[runs["key"].isin(list(test_labels))]
    for _, group in tested.groupby(list(SERIES), sort=False, dropna=False):
        parts = [
            confidence_and_correct(
                predictions[run]()["test_probabilities"], test_labels[key]["labels"]
            )
            for run, key in zip(group["run"], group["key"], strict=True)
        ]
        confidence, correct = (np.concatenate(part) for part in zip(*parts, strict=True))
        names = {name: group[name].iloc[0] for name in SERIES}
        tables.append(reliability(confidence, correct).assign(**names))
    return _stack(tables, (*SERIES, "bin", "confidence", "accuracy", "count"))


def trace_weights(
    runs: pd.DataFrame,
    predictions: Predictions,
    truth: Mapping[str, Arrays],
    threshold: float,
) -> pd.DataFrame:
    """Mean weight and mask rate of each kind of pool images, through training.

    Returns:
        The columns of `RUN`, and `step`, `kind`, `weight`, `mask_rate`, the share of images with a
        confidence of at least `threshold`, and `images`, how many there are.
    """
    tables = [
        _trace(predictions[run["run"]](), truth[run["key"]]["pool_sources"], threshold).assign(
            **{name: run[name] for name in RUN}
        )
        for run in runs.to_dict("records")
        if "pool_sources" in truth.get(run["key"], ())
    ]
    return _stack(tables, (*RUN, "step", "kind", "weight", "mask_rate", "images"))


def _trace(found: Arrays, codes: NDArray[np.int64], threshold: float) -> pd.DataFrame:
    steps = found.get("history_step", np.zeros(0, int))
    tables = [pd.DataFrame({"step": []})]
    for code in np.unique(codes) if len(steps) else ():
        mine = codes == code
        table = pd.DataFrame({"step": steps, "kind": KIND_NAMES[code]})
        table["weight"] = found["history_weights"][:, mine].mean(axis=1, dtype=np.float64)
        table["mask_rate"] = (found["history_confidence"][:, mine] >= threshold).mean(axis=1)
        tables.append(table.assign(images=int(mine.sum())))
    return pd.concat(tables[1:] or tables)


def collect_influences(runs: pd.DataFrame, predictions: Predictions) -> pd.DataFrame:
    """Each pool image's measured influence, a row an image and run.

    Returns:
        The columns of `RUN`, and `index` (of the image in the pool), `mean` and `variance` in
        units of the spread of a batch's influences, and `evidence`, the weight of the
        measurements behind them (0 to 1, NaN where the run does not tell). Images that were never
        measured have no row.
    """
    tables = [
        _influences(predictions[run["run"]]()).assign(**{name: run[name] for name in RUN})
        for run in runs.to_dict("records")
    ]
    return _stack(tables, (*RUN, "index", "mean", "variance", "evidence"))


def _influences(found: Arrays) -> pd.DataFrame:
    mean = found.get("pool_influence", np.zeros(0))
    measured = np.flatnonzero(~np.isnan(mean))
    unknown = np.full(len(mean), np.nan)
    return pd.DataFrame(
        {
            "index": measured,
            "mean": mean[measured],
            "variance": found.get("pool_influence_variance", unknown)[measured],
            "evidence": found.get("pool_evidence", unknown)[measured],
        }
    )


def _stack(tables: Iterable[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    full = [table for table in tables if len(table)]
    stacked = pd.concat(full, ignore_index=True) if full else pd.DataFrame()
    return stacked.reindex(columns=list(columns))
