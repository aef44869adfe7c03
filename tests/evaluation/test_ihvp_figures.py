"""What the figures of the IHVP study plot, from tables made by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from weighmatch.evaluation import ihvp_figures as figures
from weighmatch.evaluation.study_figures import spread
from weighmatch.studies.methods import ADDED_COLOURS, all_methods, get_method, get_methods

BUDGETS = {
    "identity": (1,),
    "neumann": (5, 10, 20),
    "conjugate_gradient": (5, 10, 20),
    "minres": (5, 10, 20),
    "gone": (1,),  # a method whose class is no more
    "exact": (310,),
}
METHODS = list(BUDGETS)
STAGES = ("0.5", "1.0", "indefinite")
LABELS = {"gone": "gone"} | {
    "identity": "identity (no curvature)",
    "neumann": "Neumann series",
    "conjugate_gradient": "conjugate gradients",
    "minres": "MINRES",
}


def error_of(network, stage, method, budget, seed=0):
    """A number that no other cell has."""
    if method == "exact":
        return 0.0
    place = 100 * METHODS.index(method) + 10 * (network == "mlp-4") + STAGES.index(stage)
    return (1 + place) / (1000 * budget) * (1 + 0.1 * seed**2)


def rows_of(network, stage, seed=0, **settings):
    for method, budgets in BUDGETS.items():
        for budget in budgets:
            error = error_of(network, stage, method, budget, seed)
            yield {
                "network": network,
                "parameters": 1210 if network == "mlp-4" else 650,
                "seed": seed,
                "curvature": "hessian",
                "stage": stage,
                "progress": 1.0 if stage == "1.0" else 0.25,
                "l2": 0.1,
                "damping_ratio": 0.01,
                "dtype": "float64",
                "batch": -1,
                "method": method,
                "max_products": budget,
                "hypergradient_error": error,
                "hypergradient_cosine": 1 - error,
                "error_bound": np.nan,
                "true_error": np.nan,
                "products": np.nan if method == "gone" else budget + 1.0,
                **settings,
            }


@pytest.fixture(scope="module")
def study():
    rows = []
    for network, stage, seed in itertools.product(("mlp-4", "softmax"), STAGES, (0, 1, 2)):
        rows += rows_of(network, stage, seed)
    # Other cells, which cost and progress must not show.
    rows += rows_of("softmax", "1.0", damping_ratio=0.5, hypergradient_error=77.0)
    rows += rows_of("softmax", "1.0", l2=0.5, hypergradient_error=78.0)
    for row in rows_of("softmax", "1.0", dtype="float32"):
        if row["method"] != "exact":
            rows.append({**row, "hypergradient_error": 3 * row["hypergradient_error"]})
    for batch, row in itertools.product(range(3), rows_of("softmax", "1.0")):
        if row["method"] in ("identity", "minres"):
            cosine = 0.5 + 0.1 * batch + 0.01 * METHODS.index(row["method"])
            rows.append({**row, "batch": batch, "hypergradient_cosine": cosine})
    table = pd.DataFrame(rows)
    known = (table["method"] == "minres") & (table["stage"] == "0.5") & (table["batch"] == -1)
    table.loc[known, "true_error"] = 0.01 * table.loc[known, "max_products"]
    table.loc[known, "error_bound"] = 0.02 * table.loc[known, "max_products"]
    return table


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def labels_at_the_lines(axes):
    """Each label beside a panel, with the place that it leads to."""
    return {text.get_text(): text.xy for text in axes.texts}


def test_cost_shows_the_median_error_of_every_method_by_counted_products(study):
    figure = figures.draw_cost(study)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["softmax, P = 650, Hessian", "mlp-4, P = 1,210, Hessian"]
    for axes, network in zip(figure.axes, ("softmax", "mlp-4"), strict=True):
        lines = lines_of(axes)
        assert set(lines) == set(LABELS.values())
        for name, label in LABELS.items():
            budgets = np.array(BUDGETS[name])
            expected = [error_of(network, "1.0", name, b, seed=1) for b in budgets]
            assert lines[label].get_ydata() == pytest.approx(expected)
            # A method that counts no products stands at its budget.
            counted = budgets + (0 if name == "gone" else 1)
            assert lines[label].get_xdata() == pytest.approx(counted)
            assert lines[label].get_color() == get_methods([name])[0].colour
            assert labels_at_the_lines(axes)[label] == pytest.approx((counted[-1], expected[-1]))
    assert figure.axes[-1].get_xlabel() == "products with the curvature"
    # No label lies on another one, or outside of the figure.
    for axes in figure.axes:
        for text in axes.texts:
            text.update_positions(canvas.get_renderer())
        boxes = sorted((Text.get_window_extent(t) for t in axes.texts), key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
        assert all(axes.bbox.x1 < box.x0 < box.x1 <= figure.bbox.width for box in boxes)


def test_the_summary_has_the_main_methods_on_the_largest_network(study):
    (axes,) = figures.draw_summary(study).axes
    assert axes.get_title(loc="left") == "mlp-4, P = 1,210, Hessian"
    main = {"identity", "neumann", "conjugate_gradient"}
    assert set(lines_of(axes)) == {LABELS[name] for name in main} == set(labels_at_the_lines(axes))


def test_lines_that_lie_on_one_another_are_all_seen(study):
    keys = ["network", "seed", "stage", "max_products", "dtype", "batch", "l2", "damping_ratio"]
    rows = study[study["method"] != "minres"]
    twin = rows[rows["method"] == "conjugate_gradient"].assign(method="minres")
    assert not twin.duplicated(keys).any()
    lines = lines_of(figures.draw_cost(pd.concat([rows, twin])).axes[0])
    below, above = lines[LABELS["conjugate_gradient"]], lines[LABELS["minres"]]
    assert below.get_ydata() == pytest.approx(above.get_ydata())
    assert below.get_linewidth() > above.get_linewidth()
    assert below.get_markersize() > above.get_markersize()
    assert (below.get_linestyle(), above.get_linestyle()) == ("-", "--")
    alone = lines_of(figures.draw_cost(study).axes[0])
    looks = {(line.get_linestyle(), line.get_markersize()) for line in alone.values()}
    assert looks == {("-", above.get_markersize())}


def test_labels_are_spread_as_little_as_needed():
    assert spread([0.5, 0.1, 0.9], 0.1) == pytest.approx([0.5, 0.1, 0.9])
    assert spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    assert spread([0.99, 1.0, 0.2], 0.1) == pytest.approx([0.9, 1.0, 0.2])


def test_errors_that_are_too_small_are_drawn_at_the_edge(study):
    tiny = study.assign(hypergradient_error=1e-12)
    for line in lines_of(figures.draw_cost(tiny).axes[0]).values():
        assert set(line.get_ydata()) == {1e-8}


def test_progress_shows_the_middle_budget_at_every_stage_but_the_indefinite_one(study):
    figure = figures.draw_progress(study)
    figure.canvas.draw()
    assert "10 products" in figure.get_suptitle()
    softmax, mlp = (lines_of(axes) for axes in figure.axes)
    # MINRES is one of those that there is no room for.
    assert set(softmax) == set(mlp) == set(LABELS.values()) - {"MINRES"}
    for name, budget in (("identity", 1), ("neumann", 10), ("conjugate_gradient", 10)):
        line = mlp[LABELS[name]]
        assert list(line.get_xdata()) == [25, 100]
        expected = [error_of("mlp-4", stage, name, budget, 1) for stage in ("0.5", "1.0")]
        assert line.get_ydata() == pytest.approx(expected)


def test_stability_shows_cosines_precision_and_bounds(study):
    figure = figures.draw_stability(study)
    figure.canvas.draw()
    batches, precision, bounds = figure.axes
    assert [t.get_text() for t in batches.get_yticklabels()] == [
        "MINRES",
        "identity (no curvature)",
    ]
    dots, median = batches.get_lines()[2:]
    assert sorted(dots.get_xdata()) == pytest.approx([0.5, 0.6, 0.7])
    assert (median.get_xdata()[0], median.get_ydata()[0]) == (pytest.approx(0.6), 1)
    assert dots.get_color() == get_method("identity").colour
    lines = lines_of(precision)
    assert set(lines) == set(LABELS.values())
    for name, label in LABELS.items():
        pairs = zip(lines[label].get_xdata(), lines[label].get_ydata(), strict=True)
        expected = [error_of("softmax", "1.0", name, budget) for budget in BUDGETS[name]]
        for (double, single), error in zip(pairs, expected, strict=True):
            assert (double, single) == (pytest.approx(error), pytest.approx(3 * error))
    (name,) = lines_of(bounds)
    line = lines_of(bounds)[name]
    assert name == "MINRES"
    assert set(line.get_xdata()) == {0.05, 0.1, 0.2}
    assert line.get_ydata() == pytest.approx(2 * line.get_xdata())
    for axes in (precision, bounds):
        diagonal = axes.get_lines()[-1]
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())


def test_spectra_are_sorted_and_negative_ones_apart():
    values = [0.5, 4.0, -2.0, 1e-20]
    rows = [
        {"network": "mlp-4", "seed": seed, "stage": stage, "eigenvalue": scale * value}
        for seed, stage, scale in ((0, "0.5", 1), (0, "1.0", 2), (1, "0.5", 100))
        for value in values
    ]
    figure = figures.draw_spectra(pd.DataFrame(rows))
    figure.canvas.draw()
    found = [
        (line.get_linestyle(), line.get_color(), list(line.get_xdata()), list(line.get_ydata()))
        for line in figure.axes[0].get_lines()
    ]
    half, end = figures.STAGES["0.5"][1], figures.STAGES["1.0"][1]
    assert found == [
        ("-", half, [1, 2], [4.0, 0.5]),
        (":", half, [1], [2.0]),
        ("-", end, [1, 2], [8.0, 1.0]),
        (":", end, [1], [4.0]),
    ]
    assert legend_of(figure) == ["half-way", "end of training"]


def test_memory_is_a_line_a_method_over_the_number_of_parameters():
    rows = [
        {"method": method, "parameters": count, "vectors": level + count / 1000}
        for level, method in enumerate(("minres", "nystrom, rank 10", "nystrom, rank 40"))
        for count in (1000, 2000)
    ]
    figure = figures.draw_memory(pd.DataFrame(rows))
    figure.canvas.draw()
    lines = lines_of(figure.axes[0])
    assert list(lines) == ["MINRES", "Nyström, rank 10", "Nyström, rank 40"]
    assert list(labels_at_the_lines(figure.axes[0])) == list(lines)
    for level, line in enumerate(lines.values()):
        assert list(line.get_xdata()) == [1000, 2000]
        assert list(line.get_ydata()) == [level + 1, level + 2]
    assert lines["MINRES"].get_color() == get_method("minres").colour
    assert lines["Nyström, rank 10"].get_marker() != lines["Nyström, rank 40"].get_marker()


def test_each_method_has_a_colour_and_a_label_of_its_own():
    colours = [row.colour for row in all_methods()]
    assert len({*colours, *ADDED_COLOURS}) == len(colours) + len(ADDED_COLOURS)
    assert len({row.label for row in all_methods()}) == len(colours)
