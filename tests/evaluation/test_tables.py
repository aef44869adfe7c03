import numpy as np
import pandas as pd
import pytest

from weighmatch.evaluation.tables import (
    calibration_table,
    class_probabilities,
    compare_arms,
    join_truth,
    score_runs,
    trace_weights,
)


def test_class_probabilities_are_in_numeric_order():
    frame = pd.DataFrame({f"p_{k}": [float(k)] for k in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)})
    assert class_probabilities(frame).tolist() == [[float(k) for k in range(11)]]


def predictions(shuffle=False):
    """Two test and four held-out images of one run; the first two held-out ones are ID."""
    rows = pd.DataFrame(
        {
            "arm": "learned",
            "seed": 7,
            "split": ["test"] * 2 + ["heldout"] * 4,
            "index": [0, 1, 0, 1, 2, 3],
            "score": [1, 1, 0.9, 0.4, 0.6, 0.1],
            "weight": [1, 1, 2.0, 0.5, 1.0, 0.5],
            "p_0": [0.9, 0.2, 0.8, 0.4, 0.6, 0.5],
            "p_1": [0.1, 0.8, 0.2, 0.6, 0.4, 0.5],
        }
    )
    return rows.sample(frac=1, random_state=0) if shuffle else rows


TRUTH = {
    "seed_0007": {
        "heldout_sources": np.array([0, 0, 1, 2]),
        "heldout_classes": np.array([0, 0, -1, -1]),
    }
}
LABELS = {"seed_0007": {"labels": np.array([0, 0])}}


@pytest.mark.parametrize("shuffle", [False, True])
def test_truth_is_joined_by_image(shuffle):
    given = predictions(shuffle)
    joined = join_truth(given, TRUTH, LABELS, ["id", "unseen", "noise"])
    assert len(joined) == len(given)
    heldout = joined[joined["split"] == "heldout"].sort_values("index")
    assert heldout["source"].tolist() == ["id", "id", "unseen", "noise"]
    assert heldout["label"].tolist() == [0, 0, -1, -1]
    assert joined[joined["split"] == "test"]["label"].tolist() == [0, 0]


@pytest.mark.parametrize("shuffle", [False, True])
def test_scores_of_a_run_by_hand(shuffle):
    runs = pd.DataFrame(
        [{"arm": "learned", "seed": 7, "steps": 5, "seconds": 1.0, "update_seconds": 0.5}]
    )
    judgements = join_truth(predictions(shuffle), TRUTH, LABELS, ["id", "unseen", "noise"])
    (row,) = score_runs(runs, judgements).to_dict("records")
    assert row["accuracy"] == 50
    assert row["heldout_accuracy"] == 50
    assert row["auroc_weight"] == 0.75
    assert row["auroc_confidence"] == 0.875
    assert (row["weight_id"], row["weight_ood"]) == (1.25, 0.75)
    assert row["steps"] == 5
    assert calibration_table(judgements)["count"].sum() == 2


def test_trace_gives_each_image_its_own_source():
    rows = [
        {"arm": arm, "seed": seed, "step": step, "index": k, "weight": w, "confidence": c}
        for arm in ("pu", "learned")
        for seed in (1, 2)
        for step in (10, 20)
        for k, (w, c) in enumerate([(1.5, 0.99), (0.5, 0.2)])
    ]
    truth = {
        "seed_0001": {"pool_sources": np.array([0, 1])},
        "seed_0002": {"pool_sources": np.array([1, 0])},
    }
    trace = trace_weights(pd.DataFrame(rows), truth, ["id", "unseen"], threshold=0.95)
    assert len(trace) == 16
    by = trace.set_index(["arm", "seed", "step", "source"])
    assert by.loc[("learned", 1, 20, "id"), "weight"] == 1.5
    assert by.loc[("learned", 2, 20, "id"), "weight"] == 0.5
    assert by.loc[("pu", 2, 10, "unseen"), "mask_rate"] == 1.0
    assert trace_weights(pd.DataFrame(rows)[:0], truth, ["id"], 0.95).empty


def scores(**accuracy):
    extra = ("steps", "seconds", "update_seconds", "ece", "nll", "auroc_weight", "auroc_confidence")
    extra += ("weight_id", "weight_ood", "mask_rate")
    return pd.DataFrame(
        [
            {"arm": arm, "seed": seed, "accuracy": value, **dict.fromkeys(extra, 1.0)}
            for arm, values in accuracy.items()
            for seed, value in enumerate(values)
        ]
    )


def test_arms_are_compared_seed_by_seed():
    table = compare_arms(
        scores(fixmatch=[80.0, 90.0], learned=[82.0, 94.0], oracle=[90.0, 96.0])
    ).set_index("arm")
    assert table.loc["learned", "difference"] == 3
    assert table.loc["learned", "gap_closed"] == pytest.approx(3 / 8)
    assert table.loc["learned", "p_value"] == 0.5
    assert table.loc["learned", "p_holm"] == 1.0
    assert np.isnan(table.loc["fixmatch", "difference"])
    assert np.isnan(table.loc["oracle", "gap_closed"])


@pytest.mark.parametrize("arms", [{"learned": [1.0]}, {"fixmatch": [1.0]}, {"supervised": [2.0]}])
def test_missing_arms_and_a_single_seed_are_no_error(arms):
    table = compare_arms(scores(**arms))
    assert table["accuracy_low"].isna().all()
