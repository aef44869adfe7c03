"""The verdict on a pile: intervals of folds, what cannot be told, and what would help."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from weighmatch.evaluation.chosen import HeldOut, choose_run
from weighmatch.evaluation.judging import BELIEF
from weighmatch.evaluation.pile import Lists, fold_overlap, judge_pile
from weighmatch.evaluation.statistics import images_to_tell, mean_interval, paired_difference

from .examples import scores
from .pools import files


def manifest(folds=5, labelled=24, test=6, source="folder", same=False):
    cells = [
        {
            "key": f"folder-seed_{seed:04d}",
            "setting": "folder",
            "source": source,
            "labelled": labelled,
            "test": test,
            "fingerprints": {"test_images": "same" if same else str(seed)},
        }
        for seed in range(folds)
    ]
    everything = {"labelled": labelled + test, "test": 0, "setting": "all", "key": "folder-all"}
    return {"cells": [*cells, {**cells[0], **everything, "fingerprints": {}}]}


def lists(kept=30, total=50, check=0, rejected=0, copies=0, left=""):
    rows = files(total)
    rows.loc[: copies - 1, "duplicate_of"] = "a.png"
    mine = pd.concat([rows, files(6, "labelled", labels=["cat"] * 4 + ["dog"] * 2)])
    ranking = pd.DataFrame({"path": rows["path"], "kept": np.arange(total) < kept})
    ranking["near_duplicate_of"] = ""
    one = {"path": "labelled/000.png", "label": "cat", "suggested": "dog"}
    return Lists(
        ranking=ranking,
        to_check=pd.DataFrame([one] * check),
        to_label=rows[["path"]].head(20),
        files=mine,
        rejected=pd.DataFrame({"path": ["x"] * rejected, "reason": "it is empty"}),
        class_names=("cat", "dog"),
        held=None,
        temperature=None,
    )


def judged(described=None, given=None, belief=(0.6, np.nan, np.nan, 0.5), **accuracy):
    described = described or manifest()
    runs = scores(**accuracy).assign(setting="folder", source="folder", pool_kept=0.6)
    runs[list(BELIEF)] = belief
    runs = runs.assign(overlap=fold_overlap(described))
    found = judge_pile(runs, choose_run(runs), described, given or lists())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_the_variance_of_folds_is_that_of_nadeau_and_bengio():
    values = np.array([1.0, 3.0, 2.0, 6.0, 4.0])
    found = paired_difference(values, overlap=0.25)
    error = values.std(ddof=1) * np.sqrt(1 / 5 + 0.25)
    half = stats.t.ppf(0.975, 4) * error
    assert (found.low, found.high) == pytest.approx((3.2 - half, 3.2 + half))
    assert found.p_value == pytest.approx(2 * stats.t.sf(3.2 / error, 4))
    assert mean_interval(values, 0.25)[0] < mean_interval(values)[0]
    assert paired_difference(np.zeros(3), overlap=0.25).p_value == 1


def test_folds_that_overlap_reject_no_more_often_than_they_should():
    """Differences of folds with a correlation of n_test / n and a mean of 0."""
    rng = np.random.default_rng(0)
    wrong, naive, draws = 0, 0, 1000
    for _ in range(draws):
        values = np.sqrt(0.8) * rng.normal(size=5) + np.sqrt(0.2) * rng.normal()
        for overlap in (0.25, 0.0):
            low, high = mean_interval(values, overlap)
            if overlap:
                wrong += not low <= 0 <= high
            else:
                naive += not low <= 0 <= high
    assert 0.03 < wrong / draws < 0.07
    assert naive / draws > 0.1


def test_seeds_of_a_folder_are_folds_unless_they_share_a_test_set():
    assert fold_overlap(manifest()) == 0.25
    assert fold_overlap(manifest(same=True)) == 0
    assert fold_overlap(manifest(source="digits")) == 0
    assert fold_overlap(manifest(test=0)) == 0


def test_a_pile_that_helps_beyond_doubt():
    found = judged(supervised=[60, 61, 60, 62, 60], learned=[80, 81, 81, 82, 80], fixmatch=[79] * 5)
    assert found["verdict"] == (
        "The pile helped: learned weights classify 80.8 % of the test images right and the "
        "labelled images alone 60.6 %, a difference of +20.2 percentage points."
    )
    assert found["light"] == "green"
    assert found["primary"]["told"]
    assert found["primary"]["test"] == "corrected resampled t test"
    assert found["primary"]["against"] == "supervised"
    assert found["secondary"]["against"] == "fixmatch"
    assert found["secondary"]["mean"] == pytest.approx(1.8)
    assert found["test_images_needed"] is None
    harm = judged(supervised=[80, 81, 81, 82, 80], learned=[60, 61, 60, 62, 60])
    assert harm["verdict"].startswith("The pile did harm")
    assert harm["light"] == "red"
    assert harm["advice"][0].startswith("Use the labelled images alone")
    assert not any("alone" in advice for advice in found["advice"])
    assert harm["secondary"] is None


def test_what_30_labels_cannot_tell_is_said_with_the_test_folder_that_would():
    found = judged(supervised=[60, 80, 50, 70, 60], learned=[80, 70, 60, 60, 80])
    assert found["verdict"].startswith("Whether the pile helped cannot be told yet: ")
    needed = found["test_images_needed"]
    assert needed == images_to_tell(0.7, 0.64, 0.03)
    assert found["sure"] == (
        "Not yet. 30 labels cannot show it; a test folder of about 1,900 images can."
    )
    assert not any("in a test folder" in advice for advice in found["advice"])  # 6 are labelled
    many = replace(lists(), files=files(200, "labelled", labels=["cat"] * 200))
    found = judged(supervised=[60, 80, 50, 70, 60], learned=[80, 70, 60, 60, 80], given=many)
    assert "Put about 1,900 labelled images in a test folder." in found["advice"]
    assert not found["primary"]["told"]


def test_folds_without_any_spread_tell_nothing():
    found = judged(supervised=[50, 50], learned=[100, 100], described=manifest(folds=2))
    assert "cannot be told" in found["verdict"]
    assert found["light"] == "amber"


def test_a_test_set_is_judged_over_seeds():
    described = manifest(source="digits", same=True)
    found = judged(described, supervised=[60, 61, 60], learned=[80, 81, 81])
    assert found["sure"] == "Not yet. Three seeds cannot show it; six can."
    assert found["primary"]["p_value"] == 0.25  # sign flips
    assert found["test_images_needed"] is None


def test_without_the_arms_or_a_test_set_nothing_is_claimed():
    for missing in (
        judged(learned=[80, 81]),
        judged(learned=[np.nan] * 2, supervised=[np.nan] * 2),
    ):
        assert missing["verdict"].startswith("There is no verdict")
        assert (missing["light"], missing["primary"]) == ("none", None)


def test_without_an_arm_that_ranks_nothing_is_said_of_the_pile():
    found = judged(supervised=[80, 81], given=lists(kept=50))
    assert found["verdict"].startswith("There is no verdict, as the arms learned and supervised")
    assert found["useful"]["sentence"].startswith(
        "No arm that ranks was trained, so that all 50 images of the pile are kept"
    )


def test_half_of_the_width_is_reached_by_the_images_that_are_asked_for():
    count = images_to_tell(0.7, 0.6, 0.05)
    half = 1.96 * np.sqrt((0.7 * 0.3 + 0.6 * 0.4) / count)
    assert half == pytest.approx(0.05, rel=1e-2)


def test_how_much_is_useful_comes_with_its_range():
    found = judged(learned=[80, 81], supervised=[60, 61])
    assert found["useful"]["sentence"] == (
        "60 % of the pile looks useful (30 of 50 images); the share is 60 % in each of 2 runs."
    )
    clean = judged(given=lists(kept=50), learned=[80], supervised=[60])
    assert (
        "Nothing speaks against any part of the pile: all 50 images" in clean["useful"]["sentence"]
    )


@pytest.mark.parametrize(("chance", "how"), [(0.04, "strong"), (0.15, "weak")])
def test_the_posterior_of_the_useful_share_is_a_sentence(chance, how):
    accuracy = {"learned": [80, 81], "supervised": [60, 61]}
    found = judged(belief=(0.33, 0.26, 0.41, chance), **accuracy)["useful"]["sentence"]
    assert found.endswith(f"Between 26 and 41 % are worth training on; the evidence is {how}.")
    whole = judged(given=lists(kept=50), belief=(0.33, 0.26, 0.41, 1 - chance), **accuracy)
    assert whole["useful"]["sentence"].endswith(f"The evidence that all of it helps is {how}.")


def test_advice_is_three_things_the_most_helpful_first():
    given = lists(check=2, rejected=1, copies=3)
    advice = judged(given=given, learned=[80, 81], supervised=[60, 61])["advice"]
    assert len(advice) == 3
    assert advice[0].startswith(
        "Check 2 labels (labels_to_check.csv): labelled/000.png is labelled"
    )
    assert advice[1] == "Label more images of class dog: it has 2, the fewest."
    more = judged(given=lists(), learned=[80, 99], supervised=[60, 61])["advice"]
    assert any("label_next.csv" in text for text in more)


def test_the_class_that_is_recognised_least_is_named():
    given = lists()
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.1, 0.9]])
    held = HeldOut(("a", "b", "c", "d"), labels, probabilities)
    given = Lists(**{**vars(given), "held": held})
    advice = judged(given=given, learned=[80, 99], supervised=[60, 61])["advice"]
    assert advice[0].startswith("Label more images of class cat: 50 % of those held out")
