"""Tables and figures of the benchmark, from runs made by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from weighmatch.evaluation import benchmark_figures as figures
from weighmatch.evaluation.benchmark_tables import compare_arms, judge_runs
from weighmatch.evaluation.statistics import gap_closed, holm, paired_difference

# Cost in steps, accuracy.
ARMS = {
    "supervised": (300, 0.6),
    "fixmatch": (2000, 0.8),
    "fixmatch_matched": (2400, 0.82),
    "fixmatch_converged": (4800, 0.86),
    "fixmatch_realigned": (2400, 0.83),
    "fixmatch_rounds": (2400, 0.84),
    "pu": (2200, 0.87),
    "learned": (2400, 0.89),
    "oracle": (2000, 0.93),
}


def table(
    seeds=5, settings=("near+far", "shifted: inverted"), ratios=(0.75, 0.5), arms=ARMS, spread=0.02
):
    rng = np.random.default_rng(0)
    rows = []
    for setting, ratio, seed in itertools.product(settings, ratios, range(seeds)):
        for arm, (cost, accuracy) in arms.items():
            stages = (1, 2) if arm in ("fixmatch_rounds", "pu", "learned") else (1,)
            for stage in stages:
                rows.append(
                    {
                        "source": "glyphs",
                        "regime": "fixed_total",
                        "setting": setting,
                        "labels_per_class": 8,
                        "ratio": ratio,
                        "arm": arm,
                        "stages": stage,
                        "seed": seed,
                        "cost": float(cost * stage),
                        "accuracy": accuracy
                        + 0.01 * stage
                        - 0.1 * (ratio - 0.5)
                        + spread * rng.normal(),
                    }
                )
    return pd.DataFrame(rows)


# --- a row a run -----------------------------------------------------------------------------

RUN = {"run": "learned-a", "key": "a", "arm": "learned", "stages": 1, "steps": 10, "seed": 3}
TRUTH = {
    "heldout_sources": np.array([0, 0, 1, 1, 2, 3]),
    "heldout_classes": np.array([0, 1, -1, -1, -1, -1]),
    "pool_sources": np.array([0, 0, 0, 0, 1]),
    "pool_classes": np.array([0, 0, 1, 1, -1]),
    "pool_shifted": np.array([True, False, False, False, True]),
}
LABELS = {"labels": np.array([0, 1, 1, 0]), "shifted": np.array([True, True, False, False])}


def predictions(**more):
    return {
        "test_probabilities": np.array(
            [[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], np.float32
        ),
        "heldout_probabilities": np.array(
            [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3], [0.95, 0.05], [0.5, 0.5]], np.float32
        ),
        "seconds": np.array(1.5),
        "update_seconds": np.array(0.1),
        **more,
    }


def judge(**more):
    found = predictions(**more)
    names = ["id", "unseen", "patches", "noise"]
    table = judge_runs(
        pd.DataFrame([RUN]), {"learned-a": lambda: found}, {"a": TRUTH}, {"a": LABELS}, names
    )
    (row,) = table.to_dict("records")
    return row


def test_influences_are_judged_where_they_were_measured():
    row = judge(
        pool_weights=np.ones(5),
        pool_labels=np.array([1, 0, 1, 1, 0]),
        pool_influence=np.array([0.5, np.nan, -1.0, 0.2, 0.1], np.float32),
    )
    # Against the intruder's .1: above, below, above.
    assert row["auroc_influence"] == row["auroc_influence_near"] == pytest.approx(2 / 3)
    # The first one's pseudo-label is wrong, and its influence above both of those that are right.
    assert row["auroc_influence_labels"] == 0.0
    assert math.isnan(judge()["auroc_influence"])


def test_wrong_pseudo_labels_of_useful_images_are_told_apart():
    row = judge(
        pool_weights=np.array([2.0, 0.2, 0.4, 0.3, 5.0]), pool_labels=np.array([0, 1, 0, 1, 1])
    )
    assert row["right_labels"] == 0.5
    assert row["weight_right"] == pytest.approx(1.15)
    assert row["weight_wrong"] == pytest.approx(0.3)


def test_a_run_is_judged_on_test_held_out_and_pool_images():
    row = judge(
        heldout_scores=np.array([0.9, 0.3, 0.5, 0.1, 0.2, 0.2]),
        pool_weights=np.array([2.0, 0.1, 0.1, 0.1, 0.2]),
        pool_labels=np.zeros(5, int),
        mask_rate=np.array(0.4),
    )
    assert "run" not in row
    assert "key" not in row
    assert (row["arm"], row["seed"], row["seconds"]) == ("learned", 3, 1.5)
    assert row["accuracy"] == 0.75
    assert row["accuracy_shifted"] == 0.5
    assert row["nll"] == pytest.approx(-np.log([0.9, 0.1, 0.8, 0.7]).mean(), rel=1e-6)
    assert row["validation_accuracy"] == 0.5
    assert row["auroc_heldout"] == 7 / 8
    assert row["auroc_near"] == 3 / 4
    assert row["auroc_far"] == 1.0
    assert row["auroc_confidence"] == 6 / 8
    assert row["weight_id"] == pytest.approx(0.575)
    assert row["weight_ood"] == 0.2
    assert row["weight_shifted"] == 2.0
    assert row["worst_class_kept"] == 0.0
    assert row["mask_rate"] == 0.4


def test_what_an_arm_does_not_have_is_not_made_up():
    row = judge()
    for name in ("auroc_heldout", "auroc_near", "auroc_far", "mask_rate", "weight_id"):
        assert math.isnan(row[name])
    assert row["accuracy"] == 0.75


# --- comparisons -----------------------------------------------------------------------------


def test_comparisons_are_paired_within_a_setting_and_ratio():
    runs = table()
    found = compare_arms(runs)
    mine = found[
        (found["setting"] == "near+far")
        & (found["arm"] == "learned")
        & (found["stages"] == 2)
        & (found["against"] == "fixmatch_matched")
    ].set_index("ratio")
    assert set(mine.index) == {0.5, 0.75}
    wide = runs[(runs["setting"] == "near+far") & (runs["ratio"] == 0.75)].pivot(
        index="seed", columns=["arm", "stages"], values="accuracy"
    )
    learned, matched, oracle = (
        100 * wide[pair].to_numpy()
        for pair in (("learned", 2), ("fixmatch_matched", 1), ("oracle", 1))
    )
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


def test_every_arm_is_compared_once_with_each_baseline():
    found = compare_arms(table(settings=("near",), ratios=(0.5,)))
    pairs = [tuple(p) for p in found[["arm", "stages", "against"]].to_numpy()]
    assert len(pairs) == len(set(pairs))
    longer = ("fixmatch", "fixmatch_matched", "fixmatch_converged", "fixmatch_realigned")
    for stages in (1, 2):
        mine = [a for arm, s, a in pairs if (arm, s) == ("learned", stages)]
        assert mine[:6] == [*longer, "fixmatch_rounds", "pu"]
        assert set(mine[6:]) == set(ARMS) - {*mine[:6], "learned"}
    assert [a for arm, _, a in pairs if arm == "fixmatch_converged"] == list(longer[:2])
    assert not any(arm == "fixmatch" for arm, _, _ in pairs)
    # A share of the gap belongs to a FixMatch that is left behind, and not to the oracle.
    closed = found[found["gap_closed"].notna()]
    assert set(closed["against"]) == {*longer, "fixmatch_rounds"}
    assert set(closed["arm"]) == set(ARMS) - {"fixmatch", "oracle"}


def test_learned_weights_are_compared_with_other_ways_to_weigh_in_as_many_stages_or_in_one():
    runs = table(
        settings=("near",),
        ratios=(0.5,),
        arms=dict.fromkeys(("pu", "energy", "oracle"), (2000, 0.8)),
    )
    runs = pd.concat(
        [runs.assign(arm=runs["arm"].replace("pu", name)) for name in ("learned", "max_prob")]
    )
    runs = runs.drop_duplicates(["arm", "stages", "seed"]).reset_index(drop=True)
    runs["accuracy"] = np.random.default_rng(1).random(len(runs))
    found = compare_arms(runs).set_index(["arm", "stages", "against"])["difference"]
    mean = 100 * runs.groupby(["arm", "stages"])["accuracy"].mean()
    for stages in (1, 2):
        mine = mean["learned", stages]
        assert found["learned", stages, "max_prob"] == pytest.approx(
            mine - mean["max_prob", stages]
        )
        assert found["learned", stages, "energy"] == pytest.approx(mine - mean["energy", 1])
        assert found["learned", stages, "oracle"] == pytest.approx(mine - mean["oracle", 1])
    assert set(found.index.get_level_values("arm")) == {"learned"}


def test_one_seed_or_one_arm_compares_as_far_as_it_can():
    one = compare_arms(table(seeds=1))
    assert one["difference"].notna().all()
    assert one["difference_low"].isna().all()
    alone = compare_arms(table(arms={"learned": ARMS["learned"]}))
    assert alone.empty
    assert list(alone.columns) == list(one.columns)


# --- figures ---------------------------------------------------------------------------------


def test_compute_has_a_panel_a_setting_and_ratio_with_every_arm():
    figure = figures.draw_compute(table())
    figure.canvas.draw()
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "near+far: 50 % of the pool OOD",
        "near+far: 75 % of the pool OOD",
        "shifted: inverted: 50 % of the pool OOD",
        "shifted: inverted: 75 % of the pool OOD",
    ]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(ARMS) + 3
    assert "learned weights, 2 stages" in labels
    # Panels share their axes: no point of any lies outside.
    for axes in figure.axes:
        places = np.concatenate([line.get_xydata() for line in axes.get_lines()])
        low, high = (np.array(ends) for ends in zip(axes.get_xlim(), axes.get_ylim(), strict=True))
        assert (places >= low).all()
        assert (places <= high).all()
    # The dotted line goes through the three FixMatches.
    line = next(line for line in figure.axes[0].get_lines() if line.get_linestyle() == ":")
    assert line.get_xdata() == pytest.approx([2.0, 2.4, 4.8], abs=0.15)


def test_panels_and_rows_tell_regimes_apart():
    one = table(settings=("near+far",), ratios=(0.5,))
    both = pd.concat([one, one.assign(regime="added")])
    titles = [axes.get_title(loc="left") for axes in figures.draw_compute(both).axes]
    assert titles == [
        "near+far, fixed total: 50 % of the pool OOD",
        "near+far, added: 50 % of the pool OOD",
    ]
    (axes,) = figures.draw_gap(compare_arms(both)).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["near+far, fixed total\n50 % OOD", "near+far, added\n50 % OOD"]


def test_arms_of_the_same_cost_lie_side_by_side():
    axes = figures.draw_compute(table(settings=("near",), ratios=(0.5,))).axes[0]
    places = sorted(line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "None")
    assert len(places) == len(ARMS) + 3  # three have two stages
    assert min(b - a for a, b in itertools.pairwise(places)) > 0.05


def test_the_gap_is_that_of_fixmatch_at_equal_compute():
    comparison = compare_arms(table())
    figure = figures.draw_gap(comparison)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert len(axes.get_yticks()) == 4
    assert "FixMatch, learned arm's compute" in [text.get_text() for text in axes.texts]
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[-1] == "learned weights, 2 stages"
    assert len(labels) == 7
    wild = comparison.assign(gap_closed_low=-50.0, gap_closed_high=50.0)
    low, high = figures.draw_gap(wild).axes[0].get_xlim()
    assert (low, high) == (-200, 200)


@pytest.mark.parametrize("arms", [("fixmatch",), ("learned", "supervised"), ("pu", "fixmatch")])
def test_figures_of_a_few_arms_are_drawn(arms):
    runs = table(seeds=1, arms={arm: ARMS[arm] for arm in arms})
    for figure in (figures.draw_compute(runs), figures.draw_gap(compare_arms(runs))):
        figure.canvas.draw()
        assert figure.axes[-1].get_xlabel()
