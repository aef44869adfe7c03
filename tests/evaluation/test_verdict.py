"""The verdict: at most three numbers, and how sure it is in plain words."""

import re

import numpy as np
import pytest

from weighmatch.arms import POOL_HELPS, WEIGHTS_PAY, declare, get_comparison
from weighmatch.evaluation.statistics import LEVEL, paired_difference, seeds_to_show, sign_flip_test
from weighmatch.evaluation.verdict import in_digits, judge, judge_nothing


def judged(differences, comparison=WEIGHTS_PAY, overlap=0.0, **more):
    differences = np.array(differences, float)
    mean = float(differences.mean())
    return judge(comparison, (80 + mean, 80.0), paired_difference(differences, overlap), **more)


def numbers(text):
    return re.findall(r"[+−]?\d[\d.,]*", text)


def test_a_loss_has_a_minus_sign_and_no_hyphen():
    text = judged([-1, -0.6]).verdict
    assert text.endswith("a difference of −0.8 percentage points.")
    assert "-" not in text
    assert (in_digits(-0.04, sign=True), in_digits(-0.04)) == ("+0.0", "0.0")
    assert (in_digits(1234.5, 0), in_digits(-12.345, 2)) == ("1234", "−12.35")


def test_six_seeds_are_the_fewest_that_can_show_a_difference():
    assert seeds_to_show() == 6
    assert sign_flip_test(np.ones(5)) > LEVEL >= sign_flip_test(np.ones(6)) == 2 / 64


def test_six_seeds_of_one_sign_are_sure():
    found = judged([1, 2, 3, 4, 5, 3])
    assert found.verdict == (
        "Weighing the unlabelled images pays: learned weights classify 83.0 % of the test images "
        "right and FixMatch with the same compute 80.0 %, a difference of +3.0 percentage points."
    )
    assert numbers(found.verdict) == ["83.0", "80.0", "+3.0"]
    assert found.light == "green"
    assert found.sure == (
        "Yes. If both were equally good, a difference as large would turn up in about one of 32 "
        "such experiments."
    )
    harm = judged([-1, -2, -3, -4, -5, -3])
    assert harm.verdict.startswith("Weighing the unlabelled images does harm: ")
    assert (harm.light, harm.sure) == ("red", found.sure)


@pytest.mark.parametrize(
    ("seeds", "words"),
    [(1, "Not yet. One seed cannot show it; six can."), (5, "Not yet. Five seeds cannot")],
)
def test_few_seeds_cannot_show_it_however_large_it_is(seeds, words):
    found = judged([30] * seeds)
    assert found.light == "amber"
    assert found.sure.startswith(words)
    assert found.verdict.startswith("Weighing the unlabelled images is not shown to pay: ")


def test_seeds_that_disagree_show_nothing():
    found = judged([5, 5, 5, 5, 5, -9])
    assert found.light == "red"
    assert found.sure.startswith("No. If both were equally good, a difference as large would")
    assert "about one of four such" in judged([5, 4, 3, 2, -2, -2]).sure
    assert "in most such" in judged([5, -5, 5, -5, 5, -5]).sure
    assert "not shown" in found.verdict
    assert judged([5, 5, 5, 5, 5, -9], test_images=240).sure.endswith(
        "A test folder of about 240 images would tell."
    )


def test_folds_are_too_few_labels_and_not_too_few_seeds():
    told = judged([10, 11, 10, 12], POOL_HELPS, overlap=0.25, labels=20)
    assert (told.light, told.verdict[:15]) == ("green", "The pile helped")
    found = judged([10, -9, 20, 1], POOL_HELPS, overlap=0.25, labels=20, test_images=1200)
    assert found.light == "amber"
    assert found.sure == (
        "Not yet. 20 labels cannot show it; a test folder of about 1,200 images can."
    )
    assert found.verdict.startswith("Whether the pile helped cannot be told yet: learned weights")
    assert "the labelled images alone 80.0 %" in found.verdict
    without = judged([10, -9, 20, 1], POOL_HELPS, overlap=0.25, labels=20)
    assert without.sure == "Not yet. 20 labels cannot show it."


def test_a_difference_beyond_doubt_has_odds_that_are_not_endless():
    found = judged(np.linspace(9.9, 10.1, 16))
    assert "fewer than one of 1,000" in found.sure


def test_without_the_comparison_there_is_no_verdict():
    found = judge_nothing(WEIGHTS_PAY, {"supervised": 60.0, "learned": 85.04})
    assert (found.light, numbers(found.verdict)) == ("none", ["85.0"])
    assert "the arms learned and fixmatch_matched were not both run" in found.verdict
    assert "runs.arms" in found.sure
    assert "no accuracy is known" in judge_nothing(WEIGHTS_PAY, {}).verdict


def test_comparisons_are_declared_by_name():
    for comparison in (WEIGHTS_PAY, POOL_HELPS):
        names = comparison.names()
        assert names["arm"] == "learned"
        assert get_comparison(names["against"]) is comparison
    assert declare(contaminated=True) is WEIGHTS_PAY
    assert declare(contaminated=False) is POOL_HELPS
    with pytest.raises(ValueError, match="choose from fixmatch_matched, supervised"):
        get_comparison("fixmatch")
