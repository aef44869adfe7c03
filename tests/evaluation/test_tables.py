"""Arms beside each other, from runs made by hand."""

import numpy as np
import pandas as pd
import pytest

from weighmatch.arms import Arm, get_arm, register, unregister
from weighmatch.evaluation.statistics import gap_closed, holm, mean_interval, paired_difference
from weighmatch.evaluation.tables import MEANS, arm_table, by_cell, compare_arms, label_series

from .examples import ARMS, grid, scores


def test_arms_are_compared_with_fixmatch_seed_by_seed():
    runs = scores(fixmatch=[80.0, 90.0], learned=[82.0, 94.0], oracle=[90.0, 96.0])
    table = arm_table(runs).set_index("arm")
    learned = table.loc["learned"]
    assert (learned["accuracy"], learned["seeds"]) == (88, 2)
    interval = mean_interval(np.array([82.0, 94.0]))
    assert (learned["accuracy_low"], learned["accuracy_high"]) == pytest.approx(interval)
    assert learned["difference"] == 3
    assert learned["gap_closed"] == pytest.approx(3 / 8)
    assert learned["p_value"] == 0.5
    assert learned["p_holm"] == 1.0
    assert np.isnan(table.loc["fixmatch", "difference"])
    assert np.isnan(table.loc["oracle", "gap_closed"])
    assert (table[list(MEANS)] == 1).all(axis=None)


def test_arms_can_be_compared_with_another_one():
    runs = scores(fixmatch=[80.0, 90.0], learned=[82.0, 94.0], supervised=[70.0, 71.0])
    table = arm_table(runs, get_arm("supervised")).set_index("arm")
    assert table["difference"].dropna().to_dict() == {"fixmatch": 14.5, "learned": 17.5}
    assert arm_table(runs, get_arm("oracle"))["difference"].isna().all()


def test_a_cell_does_not_see_another():
    table = arm_table(grid())
    alone = arm_table(grid()[lambda runs: (runs["ratio"] == 0.5) & (runs["setting"] == "near+far")])
    mine = table[(table["ratio"] == 0.5) & (table["setting"] == "near+far")]
    pd.testing.assert_frame_equal(mine.reset_index(drop=True), alone)
    assert len(table) == 4 * (len(ARMS) + 3)


@pytest.mark.parametrize("arms", [{"learned": [1.0]}, {"fixmatch": [1.0]}, {"supervised": [2.0]}])
def test_missing_arms_and_a_single_seed_are_no_error(arms):
    table = arm_table(scores(**arms))
    assert table["accuracy_low"].isna().all()
    assert compare_arms(scores(**arms)).empty


def test_runs_without_an_accuracy_are_compared_as_far_as_they_can():
    runs = scores(fixmatch=[np.nan, np.nan], learned=[np.nan, np.nan])
    table = arm_table(runs)
    assert table["accuracy"].isna().all()
    assert (table["auroc_weight"] == 1).all()
    assert compare_arms(runs).empty


def test_comparisons_are_paired_within_a_setting_and_ratio():
    runs = grid()
    found = compare_arms(runs)
    mine = found[
        (found["setting"] == "near+far")
        & (found["arm"] == "learned")
        & (found["schedule"] == "two_stages")
        & (found["against"] == "fixmatch_matched")
    ].set_index("ratio")
    assert set(mine.index) == {0.5, 0.75}
    wide = runs[(runs["setting"] == "near+far") & (runs["ratio"] == 0.75)].pivot(
        index="seed", columns=["arm", "schedule"], values="accuracy"
    )
    series = (("learned", "two_stages"), ("fixmatch_matched", "online"), ("oracle", "online"))
    learned, matched, oracle = (wide[pair].to_numpy() for pair in series)
    test, closed = paired_difference(learned - matched), gap_closed(learned, matched, oracle)
    row = mine.loc[0.75]
    names = ("difference", "difference_low", "difference_high", "p_value")
    assert row[list(names)].tolist() == pytest.approx(
        [test.mean, test.low, test.high, test.p_value]
    )
    names = ("gap_closed", "gap_closed_low", "gap_closed_high")
    assert row[list(names)].tolist() == pytest.approx([closed.share, closed.low, closed.high])
    assert row["seeds"] == 5
    assert mine["p_holm"].tolist() == pytest.approx(holm(mine["p_value"].tolist()))


def test_every_arm_is_compared_once_with_each_rival():
    found = compare_arms(grid(settings=("near",), ratios=(0.5,)))
    pairs = [tuple(p) for p in found[["arm", "schedule", "against"]].to_numpy()]
    assert len(pairs) == len(set(pairs))
    longer = ("fixmatch", "fixmatch_matched", "fixmatch_converged", "fixmatch_realigned")
    for schedule in ("online", "two_stages"):
        mine = [a for arm, s, a in pairs if (arm, s) == ("learned", schedule)]
        assert mine[:6] == [*longer, "fixmatch_rounds", "pu"]
        assert set(mine[6:]) == set(ARMS) - {*mine[:6], "learned"}
    assert [a for arm, _, a in pairs if arm == "fixmatch_converged"] == list(longer[:2])
    assert not any(arm == "fixmatch" for arm, _, _ in pairs)
    # A share of the gap belongs to a FixMatch that is left behind, and not to the oracle.
    closed = found[found["gap_closed"].notna()]
    assert set(closed["against"]) == {*longer, "fixmatch_rounds"}
    assert set(closed["arm"]) == set(ARMS) - {"fixmatch", "oracle"}


def test_learned_weights_are_compared_in_the_same_schedule_or_else_with_the_other_online():
    rng = np.random.default_rng(1)
    runs = [scores(**{arm: rng.random(5)}) for arm in ("energy", "oracle")]
    for schedule in ("online", "two_stages"):
        runs += [scores(schedule, **{arm: rng.random(5)}) for arm in ("learned", "max_prob")]
    runs = pd.concat([*runs, scores(pu=rng.random(5))], ignore_index=True)
    found = compare_arms(runs).set_index(["arm", "schedule", "against"])["difference"]
    mean = runs.groupby(["arm", "schedule"])["accuracy"].mean()
    for schedule in ("online", "two_stages"):
        mine = mean["learned", schedule]
        for other, taken in (("max_prob", schedule), ("energy", "online"), ("oracle", "online")):
            assert found["learned", schedule, other] == pytest.approx(mine - mean[other, taken])
    # `pu` could have been trained in two stages; its online runs do not stand in for that.
    assert ("learned", "online", "pu") in found.index
    assert ("learned", "two_stages", "pu") not in found.index


def test_an_arm_that_is_registered_later_is_compared_and_named():
    register(Arm("mine", "my own weights", "#123456", weighting="energy"))
    try:
        runs = pd.concat([scores(fixmatch=[80.0], mine=[83.0], learned=[84.0])])
        found = compare_arms(runs).set_index(["arm", "against"])["difference"]
        assert found.to_dict() == {
            ("mine", "fixmatch"): 3,
            ("learned", "fixmatch"): 4,
            ("learned", "mine"): 1,
        }
        assert label_series(runs)["mine", "online"] == "my own weights"
    finally:
        unregister("mine")


def test_labels_name_the_schedule_where_an_arm_has_several():
    runs = pd.concat(
        [
            scores("two_stages", learned=[1.0], pu=[1.0]),
            scores(fixmatch=[1.0], learned=[1.0], oracle=[1.0]),
        ]
    )
    assert list(label_series(runs).items()) == [
        (("fixmatch", "online"), "FixMatch"),
        (("pu", "two_stages"), "weights = labelled-vs-pool classifier"),
        (("learned", "online"), "learned weights, online"),
        (("learned", "two_stages"), "learned weights, two stages"),
        (("oracle", "online"), "oracle (OOD removed)"),
    ]


def test_titles_of_cells_tell_what_differs():
    one = scores(learned=[1.0, 2.0])
    assert [title for title, _ in by_cell(one)] == ["unseen: 75 % of the pool OOD"]
    both = pd.concat([one, one.assign(ratio=0.5), one.assign(regime="added", labels_per_class=2)])
    assert [(title, len(rows)) for title, rows in by_cell(both)] == [
        ("unseen, fixed total, 4 labels a class: 50 % of the pool OOD", 2),
        ("unseen, fixed total, 4 labels a class: 75 % of the pool OOD", 2),
        ("unseen, added, 2 labels a class: 75 % of the pool OOD", 2),
    ]
    unknown = one.assign(setting="photographs", ratio=np.nan)
    assert [title for title, _ in by_cell(unknown)] == ["photographs"]
