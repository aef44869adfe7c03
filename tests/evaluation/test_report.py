import json

import pytest

from weighmatch.evaluation.report import _update_in_steps, summarise, verdict
from weighmatch.evaluation.tables import compare_arms, learned_against

from .test_tables import scores

SETTING = {
    "ratio": 0.75,
    "regime": "fixed_total",
    "ood_source": "unseen",
    "labels_per_class": 4,
    "seeds": [1, 2, 3],
}


def metrics(**accuracy):
    table = scores(**accuracy)
    return summarise(compare_arms(table), learned_against(table), SETTING)


def sentence(**accuracy):
    return metrics(**accuracy)["verdict"]


def test_the_verdict_follows_the_interval():
    base = [80.0, 85.0, 90.0]
    win = sentence(fixmatch=base, learned=[85.0, 90.1, 94.9])
    assert "+5.0 points, 95 % interval +4.8 to +5.2" in win
    assert "Learned weights beat FixMatch at equal steps." in win
    assert "Learned weights fall behind FixMatch" in sentence(
        fixmatch=base, learned=[75.0, 80.1, 84.9]
    )
    assert "Neither is shown to be better." in sentence(fixmatch=base, learned=[85.0, 80.0, 91.0])


def test_the_verdict_names_controls_and_oracle():
    text = sentence(
        fixmatch=[80.0, 85.0],
        learned=[85.0, 89.0],
        fixmatch_matched=[81.0, 86.0],
        pu=[85.0, 89.0],
        oracle=[90.0, 95.0],
    )
    assert "total compute (83.5 %) the difference is +3.5 points" in text
    assert "no hypergradient (87.0 %) the difference is +0.0 points" in text
    assert "close 45 % of that gap" in text
    flat = sentence(fixmatch=[80.0, 85.0], learned=[85.0, 89.0], oracle=[70.0, 85.0])
    assert "no gap to close" in flat


def test_one_seed_has_no_interval_and_missing_arms_no_verdict():
    assert "one seed: no interval" in sentence(fixmatch=[80.0], learned=[85.0])
    assert "no verdict between them" in sentence(supervised=[60.0], learned=[85.0])


def test_metrics_are_json_without_nan():
    found = metrics(fixmatch=[80.0], learned=[85.0])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["arms"]["learned"]["difference_low"] is None
    assert found["arms"]["learned"]["accuracy"] == 85
    assert found["learned_minus"]["fixmatch"]["mean"] == 5


@pytest.mark.parametrize("source", ["unseen", "patches", "noise", "mix"])
def test_every_source_has_words(source):
    arms = {"learned": {"accuracy": 90.0}}
    assert "%" in verdict(arms, {}, {**SETTING, "ood_source": source})


def test_an_update_is_told_in_steps_of_fixmatch():
    fixmatch = {"seconds": 6.0, "steps": 1000, "update_seconds": None}
    learned = {"seconds": 8.0, "steps": 1000, "update_seconds": 0.06}
    assert _update_in_steps({"fixmatch": fixmatch, "learned": learned}) == pytest.approx(10)
    assert _update_in_steps({"learned": learned}) is None
    assert _update_in_steps({"fixmatch": fixmatch, "learned": fixmatch}) is None
