"""The numbers that DVC compares."""

import pandas as pd

from weighmatch.arms import all_arms
from weighmatch.evaluation.key_numbers import key_numbers

ROW = {"accuracy": 90.0, "ece": 0.0123456789, "auroc_weight": 0.75, "auroc_confidence": None}
DIFFERENCE = {"mean": 1.5, "low": -0.5, "high": 3.5, "p_value": 0.03, "seeds": 6}
SUMMARY = {
    "arms": {arm.name: ROW for arm in all_arms()},
    "learned_minus": {arm.name: DIFFERENCE for arm in all_arms()},
    "pile": {"useful": {"share": 0.25}},
}
LOG = pd.DataFrame(
    [
        ("learned-rounds-a", 3.0),
        ("learned-rounds-a", 1.0),
        ("learned-rounds-b", 2.0),
        ("pu-b", 9.0),
    ],
    columns=["run", "loss"],
)
INFLUENCES = pd.DataFrame({"mean": [-1.0, 2.0, -3.0, 0.0]})


def test_all_arms_at_once_give_no_more_than_twenty_numbers():
    found = key_numbers(SUMMARY, INFLUENCES, LOG)
    assert sum(map(len, found.values())) <= 20
    first = ["supervised", "fixmatch", "fixmatch_matched", "learned", "oracle"]
    assert list(found["accuracy_percent"])[:5] == first
    assert found["learned_minus_fixmatch_matched_points"] == {"mean": 1.5, "low": -0.5, "high": 3.5}
    assert found["auroc_of_seen_against_foreign"] == {"learned_weight": 0.75}
    assert found["last_training_loss"] == {"learned": 1.5}
    assert found["calibration_error_percent"] == {"learned": 1.23457}
    assert found["pool_percent"] == {"useful": 25.0, "harmful": 50.0}


def test_what_is_not_known_is_left_out():
    summary = {"arms": {"fixmatch": {**ROW, "accuracy": None}}, "learned_minus": {}, "pile": None}
    assert key_numbers(summary, INFLUENCES.head(0), LOG.tail(1)) == {}
