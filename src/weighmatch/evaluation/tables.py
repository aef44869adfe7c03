"""From predictions and the truth to one row a run, and from runs to comparisons of arms."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weighmatch.data.config import seed_key
from weighmatch.evaluation.scores import (
    auroc,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)
from weighmatch.evaluation.statistics import (
    PairedDifference,
    gap_closed,
    holm,
    mean_interval,
    paired_difference,
)

Truth = Mapping[str, Mapping[str, Any]]
BASELINE, CEILING, LEARNED = "fixmatch", "oracle", "learned"


def class_probabilities(rows: pd.DataFrame) -> NDArray[np.float64]:
    """The columns p_0, p_1, … as an array (n, classes)."""
    columns = [str(name) for name in rows.columns if str(name).startswith("p_")]
    columns.sort(key=lambda name: int(name.removeprefix("p_")))
    return rows[columns].to_numpy(np.float64)


def join_truth(
    predictions: pd.DataFrame, truth: Truth, test_labels: Truth, source_names: list[str]
) -> pd.DataFrame:
    """Predictions with what the images really are: the one place where the two meet.

    Args:
        predictions: columns `arm`, `seed`, `split` ("test", "heldout"), `index`, `score`,
            `weight`, `p_0`, …; one row an image and run.
        truth: by seed's key, `heldout_sources` (codes into `source_names`) and `heldout_classes`.
        test_labels: by seed's key, `labels`.
        source_names: what the codes mean; the first is in-distribution.

    Returns:
        `predictions` with `source` and `label` (index of the seen class, −1 for OOD).
    """
    parts = []
    for _, rows in predictions.groupby(["seed", "split"], sort=False):
        key, index = seed_key(int(rows["seed"].iloc[0])), rows["index"].to_numpy()
        if rows["split"].iloc[0] == "test":
            part = rows.assign(source=source_names[0], label=test_labels[key]["labels"][index])
        else:
            sources = np.array(source_names)[truth[key]["heldout_sources"][index]]
            part = rows.assign(source=sources, label=truth[key]["heldout_classes"][index])
        parts.append(part)
    return pd.concat(parts).sort_index()


def score_runs(runs: pd.DataFrame, judgements: pd.DataFrame) -> pd.DataFrame:
    """One row a run.

    Args:
        runs: columns `arm`, `seed`, `steps`, `seconds`, `update_seconds`, `mask_rate`.
        judgements: from `join_truth`.

    Returns:
        `runs` with `accuracy` (%), `nll` (nats) and `ece` on the test images, `heldout_accuracy`
        (%) on the held-out in-distribution images, and on all held-out images `auroc_weight`,
        `auroc_confidence`, `weight_id` and `weight_ood` (NaN where not defined).
    """
    rows = []
    by_run = dict(list(judgements.groupby(["arm", "seed"])))
    records: list[dict[str, Any]] = runs.to_dict("records")  # type: ignore[assignment]
    for run in records:
        mine = by_run[(run["arm"], run["seed"])]
        test, heldout = mine[mine["split"] == "test"], mine[mine["split"] == "heldout"]
        is_id = (heldout["label"] >= 0).to_numpy()
        confidence = class_probabilities(heldout).max(axis=1)
        weights = heldout["weight"].to_numpy(np.float64)
        rows.append(
            {
                **run,
                "accuracy": _accuracy(test),
                "nll": negative_log_likelihood(class_probabilities(test), _labels(test)),
                "ece": expected_calibration_error(class_probabilities(test), _labels(test)),
                "heldout_accuracy": _accuracy(heldout[is_id]),
                "auroc_weight": auroc(heldout["score"].to_numpy(np.float64), is_id),
                "auroc_confidence": auroc(confidence, is_id),
                "weight_id": float(weights[is_id].mean()),
                "weight_ood": float(weights[~is_id].mean()),
            }
        )
    return pd.DataFrame(rows)


def _labels(rows: pd.DataFrame) -> NDArray[np.int64]:
    return rows["label"].to_numpy(np.int64)


def _accuracy(rows: pd.DataFrame) -> float:
    """Share of images classified rightly, in per cent."""
    return 100 * float((class_probabilities(rows).argmax(axis=1) == _labels(rows)).mean())


def calibration_table(judgements: pd.DataFrame) -> pd.DataFrame:
    """Reliability bins of each arm, all its seeds' test images together."""
    tables = []
    for arm, rows in judgements[judgements["split"] == "test"].groupby("arm", sort=False):
        tables.append(reliability(class_probabilities(rows), _labels(rows)).assign(arm=arm))
    return pd.concat(tables, ignore_index=True)


def trace_weights(
    pool_weights: pd.DataFrame, truth: Truth, source_names: list[str], threshold: float
) -> pd.DataFrame:
    """Mean weight and mask rate of each source of pool images, through training.

    Args:
        pool_weights: columns `arm`, `seed`, `step`, `index`, `weight`, `confidence`.
        truth: by seed's key, `pool_sources` codes into `source_names`.
        source_names: what the codes mean.
        threshold: τ.

    Returns:
        Columns `arm`, `seed`, `step`, `source`, `weight`, `mask_rate`, `images`.
    """
    parts = []
    for _, rows in pool_weights.groupby("seed", sort=False):
        codes = truth[seed_key(int(rows["seed"].iloc[0]))]["pool_sources"]
        names = np.array(source_names)[codes[rows["index"].to_numpy()]]
        parts.append(rows.assign(source=names, passed=rows["confidence"] >= threshold))
    if not parts:
        columns = ["arm", "seed", "step", "source", "weight", "mask_rate", "images"]
        return pd.DataFrame(columns=columns)
    ordered = pd.concat(parts)
    grouped = ordered.groupby(["arm", "seed", "step", "source"], sort=False)
    table = grouped.agg(
        weight=("weight", "mean"), mask_rate=("passed", "mean"), images=("weight", "size")
    )
    return table.reset_index()


def compare_arms(scores: pd.DataFrame) -> pd.DataFrame:
    """One row an arm: accuracy with its interval, and against FixMatch over paired seeds.

    Returns:
        Columns `arm`, `seeds`, `accuracy`, `accuracy_low`, `accuracy_high` (%), `steps`,
        `seconds`, `update_seconds` (one update of the weights), `ece`, `nll`, `auroc_weight`,
        `auroc_confidence`, `weight_id`, `weight_ood`, `mask_rate`; against FixMatch
        `difference`, `difference_low`, `difference_high` (points),
        `p_value`, `p_holm` (over the arms) and, where the oracle was run, `gap_closed`,
        `gap_closed_low`, `gap_closed_high`. NaN where not defined.
    """
    accuracy = scores.pivot(index="seed", columns="arm", values="accuracy")
    rows: list[dict[str, Any]] = []
    for arm in scores["arm"].unique():
        mine = scores[scores["arm"] == arm]
        low, high = mean_interval(mine["accuracy"].to_numpy(np.float64))
        row = {
            "arm": arm,
            "seeds": len(mine),
            "accuracy": float(mine["accuracy"].mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            **{
                name: float(mine[name].mean())
                for name in (
                    "steps",
                    "seconds",
                    "update_seconds",
                    "ece",
                    "nll",
                    "auroc_weight",
                    "auroc_confidence",
                    "weight_id",
                    "weight_ood",
                    "mask_rate",
                )
            },
        }
        rows.append({**row, **_against_baseline(arm, accuracy)})
    table = pd.DataFrame(rows)
    if "p_value" in table:
        tested = table["p_value"].notna()
        table.loc[tested, "p_holm"] = holm(table.loc[tested, "p_value"].tolist())
    return table.astype({c: float for c in table.columns if c not in ("arm", "seeds")})


def learned_against(scores: pd.DataFrame) -> dict[str, PairedDifference]:
    """The learned arm's accuracy minus that of each other arm it shares seeds with, in points."""
    accuracy = scores.pivot(index="seed", columns="arm", values="accuracy")
    if LEARNED not in accuracy:
        return {}
    others = [str(arm) for arm in accuracy.columns if arm != LEARNED]
    pairs = {arm: (accuracy[LEARNED] - accuracy[arm]).dropna() for arm in others}
    return {
        arm: paired_difference(differences.to_numpy(np.float64))
        for arm, differences in pairs.items()
        if len(differences)
    }


def _against_baseline(arm: str, accuracy: pd.DataFrame) -> dict[str, Any]:
    if arm == BASELINE or BASELINE not in accuracy:
        return {}
    pairs = accuracy[[arm, BASELINE]].dropna()
    if pairs.empty:
        return {}
    test = paired_difference((pairs[arm] - pairs[BASELINE]).to_numpy(np.float64))
    row: dict[str, Any] = {
        "difference": test.mean,
        "difference_low": test.low,
        "difference_high": test.high,
        "p_value": test.p_value,
    }
    if CEILING in accuracy and arm != CEILING:
        triples = accuracy[[arm, BASELINE, CEILING]].dropna().to_numpy(np.float64)
        closed = gap_closed(*triples.T)
        row |= {
            "gap_closed": closed.share,
            "gap_closed_low": closed.low,
            "gap_closed_high": closed.high,
        }
    return row
