"""What the figures of the arms plot: places of markers, ends of intervals, lines, names."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from weighmatch.arms import all_arms, get_arm
from weighmatch.data.ood import OOD_KINDS
from weighmatch.evaluation import figures
from weighmatch.evaluation.statistics import mean_interval
from weighmatch.evaluation.tables import arm_table, compare_arms

from .examples import ARMS, CELL, grid, scores

LEARNED = get_arm("learned").colour


def dots(axes):
    """The groups of markers of a panel: colour and places (n, 2), as they were drawn."""
    groups = [c for c in axes.collections if len(c.get_offsets()) and hasattr(c, "get_sizes")]
    return [
        (to_hex(group.get_facecolor()[0]).upper(), np.asarray(group.get_offsets()))
        for group in groups
    ]


def lines(axes, style="-"):
    """Colour and places (n, 2) of each line of a style that is drawn."""
    found = [line for line in axes.get_lines() if line.get_linestyle() == style]
    drawn = [
        line for line in found if np.isfinite(line.get_xydata()).all() and len(line.get_xydata())
    ]
    return [(line.get_color().upper(), line.get_xydata()) for line in drawn]


def rows_of(axes):
    return [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]


def legend(owner):
    found = owner.get_legend() if hasattr(owner, "get_legend") else owner.legends[0]
    return [text.get_text() for text in found.get_texts()]


def test_arms_have_names_and_colours_of_their_own():
    assert len({arm.colour for arm in all_arms()}) == len({arm.label for arm in all_arms()})
    assert len({kind.colour for kind in OOD_KINDS}) == len(OOD_KINDS)


def check_seeds(axes, row, colour, values):
    """A row shows each seed, their mean and its interval."""
    mine = [places for shown, places in dots(axes) if shown == colour]
    (seeds,) = [places for places in mine if len(places) == len(values)]
    (mean,) = [places for places in mine if len(places) == 1]
    assert seeds[:, 0] == pytest.approx(values)
    assert ((seeds[:, 1] > row) & (seeds[:, 1] < row + 0.5)).all()
    assert mean[0] == pytest.approx([np.mean(values), row])
    (interval,) = [places for shown, places in lines(axes) if shown == colour and len(places) == 2]
    assert interval[:, 0] == pytest.approx(mean_interval(np.array(values)))
    assert interval[:, 1].tolist() == [row, row]


def test_accuracy_shows_seeds_mean_and_interval_of_each_arm():
    learned, fixmatch = [85.0, 89.0, 84.0], [80.0, 85.0, 81.0]
    figure = figures.draw_accuracy(scores(learned=learned, fixmatch=fixmatch))
    (axes,) = figure.axes
    assert rows_of(axes) == ["learned weights", "FixMatch"]
    assert axes.get_yticks().tolist() == [0, 1]
    check_seeds(axes, 0, LEARNED, learned)
    check_seeds(axes, 1, get_arm("fixmatch").colour, fixmatch)
    assert axes.get_xlabel() == "accuracy on test images of seen classes (%)"
    assert axes.get_title(loc="left") == "Test accuracy: mean and 95 % interval over 3 seeds"
    wide = figures.draw_accuracy(scores(learned=[100.0, 10.0]))
    assert wide.axes[0].get_xlim() == (-1, 101)


def test_differences_are_those_to_fixmatch_on_the_same_seed():
    learned, fixmatch, oracle = [85.0, 89.0, 84.0], [80.0, 85.0, 82.0], [90.0, 91.0, 95.0]
    (axes,) = figures.draw_differences(
        scores(fixmatch=fixmatch, learned=learned, oracle=oracle)
    ).axes
    assert rows_of(axes) == ["oracle (OOD removed)", "learned weights"]
    check_seeds(axes, 0, get_arm("oracle").colour, [10, 6, 13])
    check_seeds(axes, 1, LEARNED, [5, 4, 2])
    assert figures.BLACK in [colour for colour, places in lines(axes) if (places[:, 0] == 0).all()]
    assert axes.get_xlabel() == "accuracy minus that of\nFixMatch (points)"


def test_differences_can_be_those_to_another_arm():
    runs = scores(fixmatch=[80.0, 85.0], learned=[85.0, 89.0], supervised=[60.0, 66.0])
    (axes,) = figures.draw_differences(runs, get_arm("supervised")).axes
    assert rows_of(axes) == ["learned weights", "FixMatch"]
    check_seeds(axes, 0, LEARNED, [25, 23])
    check_seeds(axes, 1, get_arm("fixmatch").colour, [20, 19])
    assert axes.get_xlabel() == "accuracy minus that of\nsupervised only (points)"
    (axes,) = figures.draw_differences(runs, get_arm("oracle")).axes
    assert not dots(axes)


def test_several_cells_have_a_panel_each():
    runs = grid(settings=("near",))
    for draw in (figures.draw_accuracy, figures.draw_differences, figures.draw_auroc):
        axes = draw(runs).axes
        titles = [panel.get_title(loc="left") for panel in axes]
        assert titles == ["near: 50 % of the pool OOD", "near: 75 % of the pool OOD"]
        assert rows_of(axes[0])[0] in ("oracle (OOD removed)", "learned weights, two stages")
        assert axes[0].get_shared_y_axes().joined(*axes)
    for panel, ratio in zip(figures.draw_accuracy(runs).axes, (0.5, 0.75), strict=True):
        mine = runs[(runs["ratio"] == ratio) & (runs["arm"] == "oracle")]["accuracy"].tolist()
        check_seeds(panel, 0, get_arm("oracle").colour, mine)
    three = figures.draw_accuracy(grid(ratios=(0.2, 0.5, 0.75), settings=("near",)))
    assert len(three.axes) == 3


def test_seeds_with_the_same_accuracy_do_not_hide_each_other():
    figure = figures.draw_accuracy(scores(learned=[97.0, 94.0, 97.0, 97.0]))
    places = dots(figure.axes[0])[0][1]
    assert len(places) == len({tuple(dot) for dot in places.tolist()}) == 4


@pytest.mark.parametrize("arms", [{"supervised": [60.0]}, {"learned": [85.0], "fixmatch": [80.0]}])
def test_single_seeds_and_missing_arms_can_be_drawn(arms):
    table = scores(**arms)
    for draw in (figures.draw_accuracy, figures.draw_differences, figures.draw_auroc):
        figure = draw(table)
        figure.canvas.draw()
        assert len(figure.axes) == 1
    places = [places for _, places in dots(figures.draw_accuracy(table).axes[0])]
    expected = [value for values in reversed(arms.values()) for value in values * 2]
    assert sorted(x for found in places for x, _ in found) == sorted(expected)


def test_runs_without_accuracies_and_truth_can_be_drawn():
    unknown = scores(learned=[np.nan, np.nan], fixmatch=[np.nan, np.nan])
    unknown[["auroc_weight", "auroc_confidence"]] = np.nan
    unknown["ratio"] = np.nan
    comparison = compare_arms(unknown)
    drawn = [
        getattr(figures, f"draw_{name}")(unknown)
        for name in ("accuracy", "differences", "auroc", "compute")
    ]
    empty = pd.DataFrame(
        columns=[*CELL, "arm", "schedule", "seed", "step", "kind", "weight", "count", "confidence"]
    )
    drawn += [
        figures.draw_gap(comparison),
        figures.draw_weights(empty),
        figures.draw_calibration(empty),
    ]
    for figure in drawn:
        figure.canvas.draw()
        assert not [places for axes in figure.axes for _, places in dots(axes)]
    assert arm_table(unknown)["accuracy"].isna().all()


def trace(spreads=(("fixmatch", 0.0), ("learned", 0.4), ("pu", 0.2)), steps=(50, 100)):
    return pd.DataFrame(
        [
            {**CELL, "arm": arm, "schedule": "online", "seed": seed, "step": step, "kind": kind}
            | {"weight": 1 + sign * spread * step / 100 * (1 + seed)}
            for arm, spread in spreads
            for seed in (0, 1)
            for step in steps
            for kind, sign in (("id", 1), ("unseen", -1))
        ]
    )


def test_weights_are_drawn_for_arms_whose_weights_vary():
    figure = figures.draw_weights(trace())
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "weights = labelled-vs-pool classifier",
        "learned weights",
    ]
    # One above the other, so that both can be read on a phone.
    above, axes = figure.axes
    assert above.get_position().y0 > axes.get_position().y1
    means = {colour: places for colour, places in lines(axes) if len(places) == 2}
    assert means[OOD_KINDS[0].colour] == pytest.approx(np.array([[50, 1.3], [100, 1.6]]))
    assert means[OOD_KINDS[1].colour] == pytest.approx(np.array([[50, 0.7], [100, 0.4]]))
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((1.2, 1.8))
    assert legend(figure.axes[0]) == ["in-distribution", "unseen classes (OOD)"]
    assert axes.get_ylim() == pytest.approx((0, 1.05 * 1.8))
    assert figure.axes[0].get_ylabel() == "mean weight (1: plain FixMatch)"
    assert axes.get_xlabel() == "training done (%)"
    figures.draw_weights(trace(spreads=(("fixmatch", 0.0),))).canvas.draw()


def test_one_snapshot_is_a_point_in_place_of_a_line():
    (axes,) = figures.draw_weights(trace((("learned", 0.4),), steps=(100,))).axes
    marked = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [line.get_ydata()[0] for line in marked] == pytest.approx([1.6, 0.4])


def test_weights_of_several_cells_have_a_row_each():
    both = pd.concat([trace(), trace((("learned", 0.1),)).assign(ratio=0.5)])
    figure = figures.draw_weights(both)
    assert len(figure.axes) == 4
    assert legend(figure.axes[0]) == ["in-distribution", "unseen classes (OOD)"]
    # The cell that comes first has both arms, the other one has learned weights alone.
    assert figure.axes[1].get_title(loc="left") == "learned weights\nunseen: 50 % of the pool OOD"
    highest = [max(places[:, 1].max() for _, places in lines(figure.axes[k], "-")) for k in (1, 3)]
    assert highest == pytest.approx([1.15, 1.6])


def test_auroc_shows_weights_and_confidence_of_each_arm():
    runs = scores(learned=[1.0, 2.0, 3.0], fixmatch=[1.0, 2.0, 3.0], supervised=[1.0], oracle=[1.0])
    weight, confidence = [0.9, 0.8, 0.85], [0.7, 0.6, 0.68]
    runs.loc[runs["arm"] == "learned", "auroc_weight"] = weight
    runs.loc[runs["arm"] == "fixmatch", "auroc_weight"] = 0.5
    runs["auroc_confidence"] = np.resize(confidence, len(runs))
    (axes,) = figures.draw_auroc(runs).axes
    assert rows_of(axes) == ["learned weights", "FixMatch"]
    found = dict(dots(axes))
    # FixMatch ranks nothing by its weights.
    assert found[figures.RED] == pytest.approx(np.array([[np.mean(weight), 0.16]]))
    mean = np.mean(confidence)
    assert found[figures.BLUE] == pytest.approx(np.array([[mean, -0.16], [mean, 0.84]]))
    intervals = [places for colour, places in lines(axes) if colour == figures.RED]
    ends = np.column_stack([mean_interval(np.array(weight)), [0.16, 0.16]])
    assert intervals == [pytest.approx(ends)]
    assert legend(axes) == ["weight", "classifier's confidence"]
    assert axes.get_xlim() == (0, 1)
    assert [places[0, 0] for _, places in lines(axes, ":")] == [0.5]


def test_calibration_shows_the_bins_of_each_arm():
    bins = {"confidence": [0.9, 0.5, 0.7], "accuracy": [0.8, 0.4, 0.6], "count": [50, 10, 9]}
    table = pd.DataFrame({**bins, "arm": "learned", "schedule": "online", **CELL})
    (axes,) = figures.draw_calibration(table).axes
    ((_, places),) = [line for line in lines(axes) if line[0] == LEARNED]
    assert places.tolist() == [[0.5, 0.4], [0.9, 0.8]]
    assert [places.tolist() for _, places in lines(axes, ":")] == [[[0, 0], [1, 1]]]
    assert legend(axes) == ["calibrated", "learned weights"]
    several = figures.draw_calibration(pd.concat([table, table.assign(ratio=0.5, accuracy=0.1)]))
    heights = [lines(axes)[0][1][:, 1].tolist() for axes in several.axes]
    assert heights == [[0.1, 0.1], [0.4, 0.8]]


def markers(axes):
    """By colour and hollowness, the places of the means of a compute or gap figure."""
    found = [line for line in axes.get_lines() if line.get_linestyle() == "None"]
    return {
        (line.get_color(), line.get_markerfacecolor() == "white"): line.get_xydata()
        for line in found
        if len(line.get_xydata())
    }


def test_compute_has_a_panel_a_cell_with_every_arm_at_its_cost_and_accuracy():
    runs = grid()
    figure = figures.draw_compute(runs)
    figure.canvas.draw()
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "near+far: 50 % of the pool OOD",
        "near+far: 75 % of the pool OOD",
        "shifted: inverted: 50 % of the pool OOD",
        "shifted: inverted: 75 % of the pool OOD",
    ]
    assert len(legend(figure)) == len(ARMS) + 3
    assert "learned weights, two stages" in legend(figure)
    # Panels share their axes: no point of any lies outside.
    for axes in figure.axes:
        places = np.concatenate([line.get_xydata() for line in axes.get_lines()])
        low, high = (np.array(ends) for ends in zip(axes.get_xlim(), axes.get_ylim(), strict=True))
        assert (places >= low).all()
        assert (places <= high).all()
    mine = runs[(runs["setting"] == "near+far") & (runs["ratio"] == 0.75)]
    for schedule, cost in (("online", 2.4), ("two_stages", 4.8)):
        values = mine[(mine["arm"] == "learned") & (mine["schedule"] == schedule)]["accuracy"]
        ((x, y),) = markers(figure.axes[1])[LEARNED, schedule != "online"]
        assert x == pytest.approx(cost, abs=0.5)
        assert y == pytest.approx(values.mean())
        ends = [p for c, p in lines(figure.axes[1]) if c == LEARNED and p[0, 0] == x]
        assert [places[:, 1].tolist() for places in ends] == [
            pytest.approx(mean_interval(values.to_numpy()))
        ]
    # The dotted line goes through the three FixMatches that differ in their steps alone.
    ((_, places),) = lines(figure.axes[1], ":")
    assert places[:, 0] == pytest.approx([2.0, 2.4, 4.8], abs=0.4)
    online = mine[mine["schedule"] == "online"].groupby("arm")["accuracy"].mean()
    longer = ["fixmatch", "fixmatch_matched", "fixmatch_converged"]
    assert places[:, 1] == pytest.approx(online[longer].to_numpy())


def test_panels_and_rows_tell_regimes_apart():
    one = grid(settings=("near+far",), ratios=(0.5,))
    both = pd.concat([one, one.assign(regime="added")])
    titles = [axes.get_title(loc="left") for axes in figures.draw_compute(both).axes]
    assert titles == [
        "near+far, fixed total: 50 % of the pool OOD",
        "near+far, added: 50 % of the pool OOD",
    ]
    (axes,) = figures.draw_gap(compare_arms(both)).axes
    assert rows_of(axes) == [title.replace(": ", " ") for title in titles]


def test_arms_of_the_same_cost_lie_side_by_side():
    axes = figures.draw_compute(grid(settings=("near",), ratios=(0.5,))).axes[0]
    places = sorted(place[0, 0] for place in markers(axes).values())
    assert len(places) == len(ARMS) + 3  # three have two schedules
    assert min(b - a for a, b in itertools.pairwise(places)) > 0.05


def test_the_gap_is_that_of_fixmatch_at_equal_compute():
    comparison = compare_arms(grid())
    figure = figures.draw_gap(comparison)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert rows_of(axes)[:2] == ["near+far 50 % of the pool OOD", "near+far 75 % of the pool OOD"]
    texts = {text.get_text(): text.get_position()[0] for text in axes.texts}
    assert texts == {"FixMatch, learned arm's compute": 0, "oracle (OOD removed)": 100}
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert legend(figure)[-1] == "learned weights, two stages"
    assert len(legend(figure)) == 7
    against = comparison[comparison["against"] == "fixmatch_matched"]
    mine = against[(against["arm"] == "learned") & (against["schedule"] == "online")]
    mine = mine.sort_values(["setting", "ratio"])
    shown = [line for line in axes.get_lines() if line.get_color() == LEARNED]
    solid = [line for line in shown if line.get_markerfacecolor() == LEARNED]
    means = [tuple(line.get_xydata()[0]) for line in solid if len(line.get_xydata()) == 1]
    assert [x for x, _ in means] == pytest.approx((100 * mine["gap_closed"]).tolist())
    assert [round(y) for _, y in means] == [0, 1, 2, 3]
    both = against[against["arm"] == "learned"].sort_values(["schedule", "setting", "ratio"])
    intervals = [places[:, 0] for colour, places in lines(axes) if colour == LEARNED]
    ends = 100 * both[["gap_closed_low", "gap_closed_high"]].to_numpy()
    assert np.array(intervals) == pytest.approx(ends)
    wild = comparison.assign(gap_closed_low=-50.0, gap_closed_high=50.0)
    assert figures.draw_gap(wild).axes[0].get_xlim() == (-200, 200)


@pytest.mark.parametrize("arms", [("fixmatch",), ("learned", "supervised"), ("pu", "fixmatch")])
def test_figures_of_a_few_arms_are_drawn(arms):
    runs = grid(seeds=1, arms={arm: ARMS[arm] for arm in arms})
    for figure in (figures.draw_compute(runs), figures.draw_gap(compare_arms(runs))):
        figure.canvas.draw()
        assert figure.axes[-1].get_xlabel()
    shown = markers(figures.draw_compute(runs).axes[0])
    assert {colour for colour, _ in shown} == {get_arm(arm).colour for arm in arms}
