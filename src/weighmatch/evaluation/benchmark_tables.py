"""Tables of the benchmark: a row a run, and paired differences between arms."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weighmatch.evaluation.scores import (
    auroc,
    expected_calibration_error,
    negative_log_likelihood,
)
from weighmatch.evaluation.statistics import gap_closed, holm, paired_difference
from weighmatch.evaluation.tables import BASELINE, CEILING

Arrays = Mapping[str, NDArray[Any]]

CELL = ("source", "regime", "setting", "labels_per_class", "ratio")
# Each arm is compared with those of these that come before it, or with all if it is none of them;
# learned weights, what all of this is about, with every other arm.
AGAINST = (
    BASELINE,
    "fixmatch_matched",
    "fixmatch_converged",
    "fixmatch_realigned",
    "fixmatch_rounds",
    "pu",
)
# Of these, those that have stages.
STAGED = AGAINST[-2:]
LEARNED = "learned"
NEAR = "unseen"


def judge_runs(
    runs: pd.DataFrame,
    predictions: Mapping[str, Callable[[], Arrays]],
    truth: Mapping[str, Arrays],
    test_labels: Mapping[str, Arrays],
    source_names: list[str],
) -> pd.DataFrame:
    """One row a run.

    Args:
        runs: `run` (name), `key` (of the splits) and what defines a run.
        predictions: by name, what loads the arrays of `weighmatch.studies.benchmark.predict`.
        truth: by key, `pool_…` and `heldout_…`: `sources` (codes into `source_names`),
            `classes` (−1 for OOD), `shifted`.
        test_labels: by key, `labels` and `shifted`.
        source_names: what the codes mean; the first is in-distribution.

    Returns:
        `runs` without its names, and, NaN where not defined: on the test images `accuracy`,
        `accuracy_shifted` (of those of the shifted domain), `nll` (nats) and `ece`;
        `validation_accuracy` on the held-out in-distribution images; on all held-out images
        `auroc_heldout` of the arm's scores, in-distribution against OOD, `auroc_near` (against
        unseen classes), `auroc_far` (against the rest of OOD) and `auroc_confidence` of the
        classifier's; of the pool at the end `mask_rate`, the mean weights `weight_id`,
        `weight_ood` and `weight_shifted` (in-distribution, shifted), `worst_class_kept`: of the
        seen class of which least is kept, the share with at least half of the largest weight;
        of its in-distribution images `right_labels`, the share whose last pseudo-label is right,
        and the mean weights of those and of the others, `weight_right` and `weight_wrong`;
        `auroc_influence` and `auroc_influence_near` of the measured influences alone, against all
        OOD and against unseen classes, and `auroc_influence_labels` of in-distribution images with
        a right pseudo-label against those with a wrong one; `seconds` of training and
        `update_seconds` of one update of the weights. Shares are fractions.
    """
    near = source_names.index(NEAR)
    rows = []
    records: list[dict[str, Any]] = runs.to_dict("records")  # type: ignore[assignment]
    for run in records:
        name, key = run.pop("run"), run.pop("key")
        found = predictions[name]()
        scored = _on_test(found, test_labels[key]) | _on_heldout(found, truth[key], near)
        times = {column: float(found[column]) for column in ("seconds", "update_seconds")}
        pool = _on_pool(found, truth[key]) | _on_labels(found, truth[key])
        pool |= _influence(found, truth[key], near)
        rows.append({**run, **scored, **pool, **times})
    return pd.DataFrame(rows)


def _on_test(found: Arrays, truth: Arrays) -> dict[str, float]:
    probabilities = found["test_probabilities"].astype(np.float64)
    labels, shifted = truth["labels"], truth["shifted"]
    right = probabilities.argmax(axis=1) == labels
    return {
        "accuracy": float(right.mean()),
        "accuracy_shifted": _mean(right[shifted]),
        "nll": negative_log_likelihood(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels),
    }


def _on_heldout(found: Arrays, truth: Arrays, near: int) -> dict[str, float]:
    sources, classes = truth["heldout_sources"], truth["heldout_classes"]
    probabilities = found["heldout_probabilities"].astype(np.float64)
    is_id = sources == 0
    row = {
        "validation_accuracy": float((probabilities.argmax(axis=1) == classes)[is_id].mean()),
        "auroc_confidence": _auroc(probabilities.max(axis=1), is_id, ~is_id),
    }
    kinds = {
        "auroc_heldout": ~is_id,
        "auroc_near": sources == near,
        "auroc_far": ~is_id & (sources != near),
    }
    scores = found.get("heldout_scores")
    return row | {
        column: np.nan if scores is None else _auroc(scores, is_id, intruders)
        for column, intruders in kinds.items()
    }


def _auroc(scores: NDArray[Any], is_id: NDArray[np.bool_], intruders: NDArray[np.bool_]) -> float:
    either = is_id | intruders
    found = auroc(scores[either].astype(np.float64), is_id[either])
    return np.nan if found is None else found


def _on_pool(found: Arrays, truth: Arrays) -> dict[str, float]:
    row = dict.fromkeys(("weight_id", "weight_ood", "weight_shifted", "worst_class_kept"), np.nan)
    if "pool_weights" in found:
        weights, classes = found["pool_weights"].astype(np.float64), truth["pool_classes"]
        is_id = truth["pool_sources"] == 0
        kept = weights >= weights.max() / 2
        row = {
            "weight_id": _mean(weights[is_id]),
            "weight_ood": _mean(weights[~is_id]),
            "weight_shifted": _mean(weights[is_id & truth["pool_shifted"]]),
            "worst_class_kept": min(_mean(kept[classes == c]) for c in np.unique(classes[is_id])),
        }
    return {"mask_rate": float(found.get("mask_rate", np.nan)), **row}


def _on_labels(found: Arrays, truth: Arrays) -> dict[str, float]:
    if "pool_labels" not in found:
        return dict.fromkeys(("right_labels", "weight_right", "weight_wrong"), np.nan)
    is_id = truth["pool_sources"] == 0
    right = (found["pool_labels"] == truth["pool_classes"])[is_id]
    weights = found["pool_weights"][is_id].astype(np.float64)
    return {
        "right_labels": _mean(right),
        "weight_right": _mean(weights[right]),
        "weight_wrong": _mean(weights[~right]),
    }


def _influence(found: Arrays, truth: Arrays, near: int) -> dict[str, float]:
    names = ("auroc_influence", "auroc_influence_near", "auroc_influence_labels")
    if "pool_influence" not in found:
        return dict.fromkeys(names, np.nan)
    influence, sources = found["pool_influence"], truth["pool_sources"]
    measured = ~np.isnan(influence)
    values = influence[measured]
    is_id, is_near = sources[measured] == 0, sources[measured] == near
    right = (found["pool_labels"] == truth["pool_classes"])[measured]
    pairs = ((is_id, ~is_id), (is_id, is_near), (is_id & right, is_id & ~right))
    return {name: _auroc(values, *pair) for name, pair in zip(names, pairs, strict=True)}


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else np.nan


def compare_arms(benchmark: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of accuracy within each setting and ratio.

    Every arm against each FixMatch and `pu`, learned weights against all others. An arm with
    stages is compared with `pu` and `fixmatch_rounds` of as many stages, and with others of as
    many or else of one.

    Args:
        benchmark: of `judge_runs`.

    Returns:
        `source`, `regime`, `setting`, `labels_per_class`, `ratio`, `arm`, `stages`, `against`;
        `difference` (points of accuracy) with its 95 % t interval `difference_low`,
        `difference_high`; `p_value` (sign-flip) and `p_holm` (over the ratios of one setting and
        comparison); `gap_closed`, the share of the way from `against`, a FixMatch, to the oracle,
        with its bootstrap interval `gap_closed_low`, `gap_closed_high`; `seeds`. NaN where not
        defined.
    """
    rows = []
    for values, cell in benchmark.groupby(list(CELL), sort=False):
        arms: dict[tuple[str, int], pd.Series[float]] = {
            (str(arm), int(stages)): 100 * mine.set_index("seed")["accuracy"]  # type: ignore[call-overload]
            for (arm, stages), mine in cell.groupby(["arm", "stages"], sort=False)
        }
        for (arm, stages), accuracy in arms.items():
            for against in _rivals(arm, dict.fromkeys(name for name, _ in arms)):
                alone = None if against in STAGED else arms.get((against, 1))
                baseline = arms.get((against, stages), alone)
                if baseline is None:
                    continue
                numbers = _compare(accuracy, baseline, arms.get((CEILING, 1)), arm, against)
                if numbers:
                    names = {"arm": arm, "stages": stages, "against": against}
                    rows.append({**dict(zip(CELL, values, strict=True)), **names, **numbers})
    table = pd.DataFrame(rows, columns=[*CELL, "arm", "stages", "against", *NUMBERS])
    families = [*CELL[:-1], "arm", "stages", "against"]
    for _, family in table.groupby(families, sort=False):
        table.loc[family.index, "p_holm"] = holm(family["p_value"].tolist())
    return table.astype(dict.fromkeys(NUMBERS[:-1], float))


NUMBERS = (
    "difference",
    "difference_low",
    "difference_high",
    "p_value",
    "p_holm",
    "gap_closed",
    "gap_closed_low",
    "gap_closed_high",
    "seeds",
)


def _rivals(arm: str, there: Iterable[str]) -> tuple[str, ...]:
    """What an arm is compared with; `there` are the names of the arms that were run."""
    if arm == LEARNED:
        return (*AGAINST, *(name for name in there if name not in (*AGAINST, LEARNED)))
    return AGAINST[: AGAINST.index(arm)] if arm in AGAINST else AGAINST


def _compare(
    accuracy: "pd.Series[float]",
    baseline: "pd.Series[float]",
    ceiling: "pd.Series[float] | None",
    arm: str,
    against: str,
) -> dict[str, Any]:
    """The numbers of one comparison over the seeds that both have; none without such a seed."""
    pairs = pd.concat([accuracy, baseline], axis=1, join="inner").to_numpy(np.float64)
    if not len(pairs):
        return {}
    test = paired_difference(pairs[:, 0] - pairs[:, 1])
    row: dict[str, Any] = {
        "difference": test.mean,
        "difference_low": test.low,
        "difference_high": test.high,
        "p_value": test.p_value,
        "seeds": test.seeds,
    }
    if ceiling is None or arm == CEILING or not against.startswith(BASELINE):
        return row
    triples = pd.concat([accuracy, baseline, ceiling], axis=1, join="inner").to_numpy(np.float64)
    if len(triples):
        closed = gap_closed(*triples.T)
        row["gap_closed"] = closed.share
        row["gap_closed_low"], row["gap_closed_high"] = closed.low, closed.high
    return row
