"""Runs held against the truth, by hand."""

import math
import weakref

import numpy as np
import pandas as pd
import pytest

from weighmatch.evaluation.judging import (
    RUN,
    SCORES,
    calibration_table,
    collect_influences,
    judge_runs,
    require_same_data,
    trace_weights,
)

from .examples import CELL

RUNS = pd.DataFrame(
    [
        {
            "run": "learned-a",
            "key": "a",
            **CELL,
            "arm": "learned",
            "schedule": "online",
            "seed": 3,
            "mask_rate": 0.4,
            "pool": "f",
        }
    ]
)
TRUTH = {
    "heldout_sources": np.array([0, 0, 1, 1, 2, 3]),
    "heldout_classes": np.array([0, 1, -1, -1, -1, -1]),
    "pool_sources": np.array([0, 0, 0, 0, 1]),
    "pool_classes": np.array([0, 0, 1, 1, -1]),
    "pool_shifted": np.array([True, False, False, False, True]),
}
LABELS = {"labels": np.array([0, 1, 1, 0]), "shifted": np.array([True, True, False, False])}
FOUND = {
    "test_probabilities": np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]),
    "heldout_probabilities": np.array(
        [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3], [0.95, 0.05], [0.5, 0.5]]
    ),
    "heldout_scores": np.array([0.9, 0.3, 0.5, 0.1, 0.2, 0.2]),
    "heldout_weights": np.array([2.0, 1.0, 0.5, 0.5, 0.1, 0.1]),
}
POOL = {
    "pool_weights": np.array([2.0, 0.1, 0.1, 0.1, 0.2]),
    "pool_labels": np.zeros(5, int),
    "history_step": np.array([10, 20]),
    "history_weights": np.array([[1.0] * 5, [2.0, 0.1, 0.1, 0.1, 0.2]], np.float32),
    "history_confidence": np.array([[0.5] * 5, [0.99, 0.95, 0.2, 0.2, 1.0]], np.float32),
}


def judge(truth=TRUTH, labels=LABELS, **more):
    by_key = ({} if part is None else {"a": part} for part in (truth, labels))
    (row,) = judge_runs(RUNS, {"learned-a": lambda: {**FOUND, **more}}, *by_key).to_dict("records")
    return row


def test_a_run_is_judged_on_test_held_out_and_pool_images():
    row = judge(**POOL)
    assert (row["arm"], row["seed"], row["run"], row["mask_rate"]) == (
        "learned",
        3,
        "learned-a",
        0.4,
    )
    assert not {"key", "pool"} & set(row)
    assert row["accuracy"] == 75
    assert row["accuracy_shifted"] == 50
    assert row["nll"] == pytest.approx(-np.log([0.9, 0.1, 0.8, 0.7]).mean())
    assert row["ece"] == pytest.approx((2 * 0.4 + 0.2 + 0.3) / 4)
    assert row["heldout_accuracy"] == 50
    assert row["auroc_weight"] == 7 / 8
    assert row["auroc_near"] == 3 / 4
    assert row["auroc_far"] == 1
    assert row["auroc_confidence"] == 6 / 8
    assert (row["weight_id"], row["weight_ood"]) == pytest.approx((1.5, 0.3))
    assert (row["pool_weight_id"], row["pool_weight_ood"]) == pytest.approx((0.575, 0.2))
    assert row["pool_weight_shifted"] == 2
    assert row["worst_class_kept"] == 0


def test_wrong_pseudo_labels_of_useful_images_are_told_apart():
    row = judge(
        pool_weights=np.array([2.0, 0.2, 0.4, 0.3, 5.0]), pool_labels=np.array([0, 1, 0, 1, 1])
    )
    assert row["right_labels"] == 0.5
    assert row["pool_weight_right"] == pytest.approx(1.15)
    assert row["pool_weight_wrong"] == pytest.approx(0.3)


def test_influences_are_judged_where_they_were_measured():
    row = judge(
        pool_labels=np.array([1, 0, 1, 1, 0]),
        pool_influence=np.array([0.5, np.nan, -1.0, 0.2, 0.1], np.float32),
    )
    # Against the OOD image's .1: above, below, above.
    assert row["auroc_influence"] == row["auroc_influence_near"] == pytest.approx(2 / 3)
    # The first one's pseudo-label is wrong, and its influence above both of those that are right.
    assert row["auroc_influence_labels"] == 0


def test_what_is_not_known_is_not_made_up():
    pool = [name for name in SCORES if name.startswith(("pool", "auroc_infl", "right", "worst"))]
    row = judge()
    assert all(math.isnan(row[name]) for name in pool)
    assert row["accuracy"] == 75
    on_test = ["accuracy", "accuracy_shifted", "nll", "ece"]
    untold = judge(truth=None, **POOL)
    assert [name for name in SCORES if not math.isnan(untold[name])] == on_test
    unlabelled = judge(labels=None, **POOL)
    assert all(math.isnan(unlabelled[name]) for name in on_test)
    assert unlabelled["auroc_weight"] == 7 / 8
    parts = ("pool_sources", "pool_classes")
    pool_alone = judge({name: TRUTH[name] for name in parts}, {"labels": LABELS["labels"]}, **POOL)
    known = {name for name in SCORES if not math.isnan(pool_alone[name])}
    assert {"accuracy", "pool_weight_id", "worst_class_kept"} <= known
    assert not {"accuracy_shifted", "pool_weight_shifted", "auroc_weight"} & known
    unseen = {name: POOL[name] for name in POOL if name != "pool_labels"}
    row = judge(**unseen, pool_influence=np.array([0.5, 0.4, 0.3, 0.2, 0.1]))
    assert (row["pool_weight_ood"], row["auroc_influence"]) == (0.2, 1)
    assert math.isnan(row["right_labels"])
    nothing = judge(truth=None, labels=None)
    assert all(math.isnan(nothing[name]) for name in SCORES)


def test_one_run_is_in_memory_at_a_time():
    alive, most = [], []

    class Arrays(dict):
        pass

    def load():
        most.append(sum(found() is not None for found in alive))
        found = Arrays(FOUND | POOL | {"pool_influence": np.ones(5)})
        alive.append(weakref.ref(found))
        return found

    runs = pd.concat([RUNS.assign(run=name) for name in "xyz"])
    predictions = dict.fromkeys("xyz", load)
    judge_runs(runs, predictions, {"a": TRUTH}, {"a": LABELS})
    calibration_table(runs, predictions, {"a": LABELS})
    trace_weights(runs, predictions, {"a": TRUTH}, 0.95)
    collect_influences(runs, predictions)
    assert most == [0] * 12


def test_runs_of_other_data_are_refused():
    cells = [{"key": "a", "fingerprints": {"unlabelled_images": "f"}}]
    require_same_data(RUNS, {"cells": cells})
    require_same_data(RUNS.assign(pool=""), {"cells": cells})
    for runs in (RUNS.assign(pool="g"), RUNS.assign(key="b")):
        with pytest.raises(ValueError, match="learned, seed 3, was trained on other data"):
            require_same_data(runs, {"cells": cells})


def test_calibration_joins_the_seeds_of_an_arm_in_a_cell():
    runs = pd.concat([RUNS, RUNS.assign(run="second", seed=4), RUNS.assign(run="other", ratio=0.5)])
    wrong = {**FOUND, "test_probabilities": FOUND["test_probabilities"][:, ::-1]}
    predictions = {"learned-a": lambda: FOUND, "second": lambda: wrong, "other": lambda: FOUND}
    table = calibration_table(runs, predictions, {"a": LABELS})
    assert (table["arm"] == "learned").all()
    mine = table[table["ratio"] == 0.75].set_index("bin")
    assert mine["count"].to_dict() == {7: 2, 8: 2, 9: 4}
    assert mine["accuracy"].to_dict() == {7: 0.5, 8: 0.5, 9: 0.5}
    assert mine["confidence"].to_dict() == pytest.approx({7: 0.7, 8: 0.8, 9: 0.9})
    other = table[table["ratio"] == 0.5].set_index("bin")
    assert other["accuracy"].to_dict() == {7: 1, 8: 1, 9: 0.5}
    assert calibration_table(runs, predictions, {}).empty


def test_trace_gives_each_image_its_own_kind():
    runs = pd.concat([RUNS, RUNS.assign(run="second", key="b", seed=4)])
    found = {**FOUND, **POOL}
    truth = {"a": TRUTH, "b": {"pool_sources": np.array([3, 0, 0, 0, 0])}}
    predictions = {"learned-a": lambda: found, "second": lambda: found}
    trace = trace_weights(runs, predictions, truth, threshold=0.95)
    by = trace.set_index(["seed", "step", "kind"])
    assert len(by) == 8
    assert by.loc[(3, 20, "id"), "weight"] == pytest.approx(0.575)
    assert by.loc[(3, 20, "unseen"), "weight"] == pytest.approx(0.2)
    assert by.loc[(4, 20, "noise"), "weight"] == 2
    assert by.loc[(3, 20, "id"), "mask_rate"] == 0.5
    assert by.loc[(3, 10, "id"), ["weight", "mask_rate", "images"]].tolist() == [1, 0, 4]
    assert list(trace[list(RUN)].iloc[0]) == [*CELL.values(), "learned", "online", 3]
    assert trace_weights(runs, predictions, {}, 0.95).empty
    no_history = trace_weights(RUNS, {"learned-a": lambda: FOUND}, truth, 0.95)
    assert no_history.empty
    assert list(no_history.columns) == list(trace.columns)


def test_influences_have_a_row_where_they_were_measured():
    found = {
        "pool_influence": np.array([0.5, np.nan, -1.0], np.float32),
        "pool_influence_variance": np.array([0.1, np.nan, 0.2], np.float32),
        "pool_evidence": np.array([0.3, 0.0, 0.4], np.float32),
    }
    table = collect_influences(RUNS, {"learned-a": lambda: found})
    rows = table[["index", "mean", "variance", "evidence"]].to_numpy()
    assert rows == pytest.approx(np.array([[0, 0.5, 0.1, 0.3], [2, -1, 0.2, 0.4]]))
    assert (table["seed"] == 3).all()
    none = collect_influences(RUNS, {"learned-a": lambda: FOUND})
    assert none.empty
    assert list(none.columns) == list(table.columns)
