"""Tables and figures of the meta-learning study, from a table made by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from weighmatch.evaluation import meta_figures as figures
from weighmatch.evaluation.meta_tables import (
    CHANCE,
    compare_to,
    means,
    pareto,
    summarise_runs,
)
from weighmatch.studies.methods import get_method

BASE = {
    "experiment": "generalisation",
    "case": "online",
    "problem": "example_weights",
    "parameters": 610,
    "outer_images": 100,
    "method": "identity",
    "budget": 20,
    "damping": 0.1,
    "inner_steps": 20,
    "step": 1.0,
    "memory": math.nan,
}


def run(accuracies, diverged=False, seed=0, **settings):
    rows = []
    for number, accuracy in enumerate(accuracies):
        ended = diverged and number == len(accuracies) - 1
        rows.append(
            {
                **BASE,
                **settings,
                "seed": seed,
                "outer_step": number,
                "cost": 10.0 * number,
                "outer_loss": math.nan if ended else 1.0 - accuracy,
                "outer_accuracy": math.nan if ended else accuracy + 0.1,
                "test_accuracy": math.nan if ended else accuracy,
                "retrained_accuracy": accuracy if number in (0, 1) else math.nan,
                "residual": 0.1 * number,
                "batch_cosine": 0.3 if number in (0, 1) else math.nan,
                "unguarded_residual": 2.0**number if number in (0, 1) else math.nan,
                "rejected": number == 2,
                "cosine": 0.5 if number in (0, 1) else math.nan,
                "low_share": 0.2,
                "largest_eigenvalue": 3.0,
                "step_sharpness": 1.0 + number,
                "status": "diverged" if number == 0 else "budget",
                "diverged": ended,
            }
        )
    return rows


def study():
    rows = []
    methods = ("none", "identity", "conjugate_gradient")
    for seed, method in itertools.product((0, 1, 2), methods):
        shared = {"seed": seed, "method": method}
        level = 0.5 + 0.1 * methods.index(method) + 0.01 * seed
        rows += run([level, level + 0.1], **shared)
        rows += run([level, level + 0.1], **shared, problem="weight_decay", case="converged")
        for images, damping in itertools.product((25, 100), (0.0, 0.1)):
            setting = {"experiment": "map", "case": "T = 20", "outer_images": images}
            rows += run([level], **shared, **setting, damping=damping)
        for case in ("as usual", "stable step"):
            diverged = case == "as usual" and method == "identity"
            rows += run([level] * 4, diverged, **shared, experiment="forgetting", case=case)
        for remedy, step in (
            ("without", 0.5),
            ("without", 2.5),
            ("damping", 0.5),
            ("all but backtracking", 0.5),
            ("all but backtracking", 2.5),
            ("all", 0.5),
        ):
            diverged = remedy == "without" and step == 2.5 and seed > 0
            case = f"none | {remedy}"
            setting = {"experiment": "instability", "case": case, "step": step}
            if method == "identity":
                rows += run([level] * 3, diverged, **shared, **setting)
        setting = {"experiment": "efficiency", "memory": 8.0 * 610 * 4}
        rows += run([level, level + 0.2], **shared, **setting)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def steps():
    return study()


@pytest.fixture(scope="module")
def runs(steps):
    return summarise_runs(steps)


def test_a_run_that_diverged_ends_at_chance():
    runs = summarise_runs(pd.DataFrame(run([0.5, 0.8, 0.7]) + run([0.5, 0.9, 0.3], True, seed=1)))
    kept, lost = runs.to_dict("records")
    assert (kept["final"], kept["best"]) == (0.7, 0.8)
    assert kept["drop"] == pytest.approx(0.1)
    assert kept["gap"] == pytest.approx(0.1)
    assert kept["retrained_drop"] == 0.0
    assert kept["sharpness"] == 3.0
    assert kept["residual_growth"] == pytest.approx(1 / 3)
    assert kept["worst_residual"] == pytest.approx(0.2)
    assert kept["rejected"] == pytest.approx(1 / 3)
    assert kept["batch_cosine"] == pytest.approx(0.3)
    assert kept["unguarded_residual"] == 2.0
    assert (lost["final"], lost["best"], lost["diverged"]) == (CHANCE, 0.9, True)
    assert math.isnan(lost["gap"])


def test_chance_is_one_class_of_those_that_there_are():
    runs = summarise_runs(pd.DataFrame(run([0.5, 0.8, 0.7], True, problem="contaminated_pool")))
    assert runs["final"].tolist() == [pytest.approx(1 / 6)]


def test_equal_cost_is_that_of_the_cheapest_run_that_learns():
    cheap = run([0.5, 0.6], method="identity")
    dear = run([0.5, 0.7, 0.9], method="conjugate_gradient")
    idle = run([0.4], method="none")
    for row in dear:
        row["cost"] *= 2
    found = summarise_runs(pd.DataFrame(cheap + dear + idle)).set_index("method")
    assert set(found["equal_cost"]) == {10.0}
    assert found["at_equal_cost"].to_dict() == {
        "identity": 0.6,
        "conjugate_gradient": 0.5,
        "none": 0.4,
    }


def test_methods_are_compared_seed_by_seed():
    rows = []
    for seed, level in enumerate((0.3, 0.6)):
        rows += run([level], seed=seed, method="conjugate_gradient", damping=0.0)
        rows += run([level + 0.2], seed=seed, method="conjugate_gradient", damping=1.0)
        rows += run([level + 0.1], seed=seed, method="identity")
    found = compare_to(summarise_runs(pd.DataFrame(rows))).set_index(["method", "damping"])
    assert set(found.index) == {("conjugate_gradient", 1.0), ("identity", 0.1)}
    row = found.loc[("identity", 0.1)]
    assert (row["final"], row["seeds"]) == (pytest.approx(0.1), 2)
    # The seeds differ by .3, the pairs not at all.
    assert row["final_high"] - row["final_low"] < 1e-9


def test_means_over_seeds_have_an_interval_and_one_seed_none():
    table = pd.DataFrame({"group": ["a", "a", "b"], "x": [1.0, 3.0, 5.0]})
    two, one = means(table, ["group"], "x").to_dict("records")
    assert (two["mean"], two["count"]) == (2.0, 2)
    assert two["low"] < 2 < two["high"]
    assert (one["low"], one["mean"], one["high"]) == (5.0, 5.0, 5.0)


def test_the_pareto_front_has_what_nothing_beats():
    cost, value = [3.0, 1.0, 2.0, 4.0, 2.0], [0.7, 0.5, 0.4, 0.7, 0.6]
    assert pareto(cost, value) == [1, 4, 0]


LABELS = {
    "none": "no outer learning",
    "identity": "identity (no curvature)",
    "conjugate_gradient": "conjugate gradients",
}


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}


def points_of(axes, marker, **style):
    """Points (x, y) with a marker, in the order in which they were drawn."""
    return [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.get_lines()
        if line.get_marker() == marker
        and len(line.get_xdata()) == 1
        and all(getattr(line, f"get_{name}")() == value for name, value in style.items())
    ]


def level_of(method):
    """Mean over the seeds 0, 1 and 2 of where a run of `study` starts."""
    return 0.51 + 0.1 * list(LABELS).index(method)


def test_generalisation_shows_the_gap_of_every_method(runs):
    figure = figures.draw_generalisation(runs)
    figure.canvas.draw()
    axes = figure.subfigs[0].axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == list(LABELS.values())
    assert axes.get_title(loc="left") == "example weights, online: the gap by method"
    assert "3 seeds" in figure.get_suptitle()
    ends = [(pytest.approx(level_of(m) + 0.1), place) for place, m in enumerate(LABELS)]
    # At equal outer steps and, as all cost the same here, at equal cost.
    assert points_of(axes, "o") == [*ends, *ends]
    assert len(points_of(axes, "o", markerfacecolor="white")) == 3
    outer = [(pytest.approx(level_of(m) + 0.2), place) for place, m in enumerate(LABELS)]
    assert points_of(axes, "|") == outer
    # The 95 % t interval of three seeds that lie .01 apart.
    half = 4.302653 * 0.01 / math.sqrt(3)
    intervals = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
    for place, (line, method) in enumerate(zip(intervals, LABELS, strict=True)):
        middle = level_of(method) + 0.1
        assert list(line.get_xdata()) == pytest.approx([middle - half, middle + half])
        assert list(line.get_ydata()) == [place, place]
        assert line.get_color() == get_method(method).colour


def test_generalisation_shows_every_problem_and_the_map(runs):
    figure = figures.draw_generalisation(runs)
    figure.canvas.draw()
    upper, lower = figure.subfigs[1].axes
    names = [t.get_text().replace("\n", " ") for t in upper.get_xticklabels()]
    assert names == ["example weights online", "weight decay converged"]
    assert list(lines_of(upper)) == list(LABELS.values())
    for number, method in enumerate(LABELS):
        marker, colour = get_method(method).marker, get_method(method).colour
        found = points_of(upper, marker, color=colour)
        x = 0.14 * (number - 1)
        y = pytest.approx(level_of(method) + 0.1)
        assert found == [(pytest.approx(cell + x), y) for cell in (0, 1)]
    assert [t.get_text() for t in lower.get_xticklabels()] == ["exact", "0", "0.1"]
    assert lower.get_title(loc="left").startswith("example weights, softmax regression")


def test_the_map_has_a_line_a_number_of_images_and_stars_for_the_exact_hypergradient():
    rows = []
    for images, damping, seed in itertools.product((25, 100), (0.0, 0.1, 1.0), (0, 1)):
        setting = {"experiment": "map", "case": "T = 20", "outer_images": images, "seed": seed}
        level = 0.3 + images / 1000 + damping / 10 + seed / 50
        rows += run([level], method="conjugate_gradient", damping=damping, **setting)
        rows += run([0.9 - images / 1000], method="exact", damping=0.0, **setting)
    rows += run([0.5], method="none")  # the panels beside it need a run
    figure = figures.draw_generalisation(summarise_runs(pd.DataFrame(rows).drop_duplicates()))
    figure.canvas.draw()
    axes = figure.subfigs[1].axes[1]
    drawn = {c.get_label(): c for c in axes.containers}
    assert list(drawn) == ["25 outer images, T = 20", "100 outer images, T = 20"]
    half = 12.7062 * 0.02 / 2
    for container, images in zip(drawn.values(), (25, 100), strict=True):
        line, _, (bars,) = container.lines
        middle = [0.31 + images / 1000 + damping / 10 for damping in (0.0, 0.1, 1.0)]
        assert list(line.get_xdata()) == [0, 1, 2]
        assert list(line.get_ydata()) == pytest.approx(middle)
        ends = [segment[:, 1] for segment in bars.get_segments()]
        assert np.array(ends) == pytest.approx(np.array([[m - half, m + half] for m in middle]))
    assert points_of(axes, "*") == [(-0.5, pytest.approx(0.875)), (-0.5, pytest.approx(0.8))]


def test_forgetting_shows_median_and_range_and_falls_to_chance(steps):
    figure = figures.draw_forgetting(steps)
    figure.canvas.draw()
    usual, stable = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in (usual, stable)] == ["as usual", "stable step"]
    ends = {label: line.get_ydata()[-1] for label, line in lines_of(usual).items()}
    assert ends["identity (no curvature)"] == CHANCE
    for axes, diverges in ((usual, True), (stable, False)):
        lines = lines_of(axes)
        assert list(lines) == list(LABELS.values())
        for method, area in zip(LABELS, axes.collections, strict=True):
            kept = 3 if diverges and method == "identity" else 4
            expected = [level_of(method)] * kept + [CHANCE] * (4 - kept)
            assert list(lines[LABELS[method]].get_xdata()) == [0, 1, 2, 3]
            assert list(lines[LABELS[method]].get_ydata()) == pytest.approx(expected)
            assert lines[LABELS[method]].get_color() == get_method(method).colour
            heights = area.get_paths()[0].vertices[:, 1]
            assert heights.max() == pytest.approx(level_of(method) + 0.01)
            assert heights.min() == pytest.approx(min(level_of(method) - 0.01, expected[-1]))
    columns = {2: [0.5, 0.5], 4: [0.2] * 4, 6: [3.0] * 4}  # cosine, low share, λ_max
    for number, values in columns.items():
        for line in lines_of(figure.axes[number]).values():
            assert list(line.get_ydata()) == values
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(LABELS.values())


def test_the_stability_limit_is_drawn_where_the_step_stays():
    rows = run([0.5] * 3, experiment="forgetting", case="as usual")
    for row in rows:
        row["step_sharpness"] = 0.25 * row["largest_eigenvalue"]
    dashed = [
        line.get_ydata()[0]
        for line in figures.draw_forgetting(pd.DataFrame(rows)).axes[3].get_lines()
        if line.get_linestyle() == "--"
    ]
    assert dashed == [pytest.approx(8)]
    for row in rows:
        row["step_sharpness"] = 1 + row["outer_step"]
    moving = figures.draw_forgetting(pd.DataFrame(rows)).axes[3].get_lines()
    assert all(line.get_linestyle() == "-" for line in moving)


def test_instability_has_a_share_a_cell(runs):
    figure = figures.draw_instability(runs)
    figure.canvas.draw()
    # Chance instead of .61 and .62 in two of three.
    drops = [[0, (0.51 + 0.52) / 3], [0], [0, 0]]
    for axes, expected in zip(figure.axes, [[0, 2 / 3], [0], [0, 0], *drops], strict=True):
        (image,) = axes.images
        assert list(image.get_array().ravel()) == pytest.approx(expected, abs=1e-9)
    shown = [[t.get_text() for t in axes.texts] for axes in figure.axes]
    assert shown == [["0", "0.67"], ["0"], ["0", "0"], ["0", "0.34"], ["0"], ["0", "0"]]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["none"]
    assert [t.get_text() for t in figure.axes[3].get_xticklabels()] == ["0.5", "2.5"]
    assert [t.get_text() for t in figure.axes[5].get_xticklabels()] == [
        "damping",
        "all but backtracking",
    ]


def test_efficiency_shows_accuracy_cost_and_memory_of_every_budget():
    rows = []
    for number, (method, budget) in enumerate(
        (("identity", 4), ("conjugate_gradient", 5), ("conjugate_gradient", 20))
    ):
        for seed, count in itertools.product((0, 1), (610, 10_000)):
            setting = {"experiment": "efficiency", "parameters": count, "seed": seed}
            memory = (3.0 + number) * 4 * count if seed == 0 else math.nan
            level = 0.5 + 0.1 * number + 0.02 * seed
            cost = [{"cost": 10.0 * (number + 1)}] * 2
            made = run([level, level + 0.2], method=method, budget=budget, memory=memory, **setting)
            rows += [{**row, **c} for row, c in zip(made, cost, strict=True)]
    figure = figures.draw_efficiency(summarise_runs(pd.DataFrame(rows)))
    figure.canvas.draw()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["P = 610", "P = 10,000", "", ""]
    accuracy = [pytest.approx(a) for a in (0.71, 0.81, 0.91)]
    for axes, at in zip(
        figure.axes, ([10, 20, 30], [10, 20, 30], [3, 4, 5], [3, 4, 5]), strict=True
    ):
        square, round_ = points_of(axes, "s"), points_of(axes, "o")
        assert square + round_ == list(zip(at, accuracy, strict=True))
        assert [text.get_text() for text in axes.texts] == ["5", "20"]
        # All three are on the front: each is better, and dearer, than the one before.
        front = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert [list(line.get_xdata()) for line in front] == [at]
        assert list(front[0].get_ydata()) == accuracy
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["identity (no curvature)", "conjugate gradients"]
