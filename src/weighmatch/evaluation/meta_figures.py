"""Figures of the meta-learning study: generalisation, forgetting, instability, efficiency."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from weighmatch.evaluation.figures import BLACK, BLUE, GREEN, ORANGE, PINK, RED, make_plain
from weighmatch.evaluation.meta_tables import CHANCE, means, pareto
from weighmatch.evaluation.study_figures import over_seeds, plot_method, share_legend
from weighmatch.studies.methods import HypergradientMethod, get_method, get_methods

# Numbers of outer images are told apart by colour, numbers of inner steps by line.
IMAGE_COLOURS = (RED, BLUE, GREEN, PINK, ORANGE)
STEP_STYLES = ("-", "--", ":")


def draw_generalisation(runs: pd.DataFrame) -> Figure:
    """Accuracy on outer and on test images by method; and on test images by damping."""
    rows = runs[runs["experiment"] == "generalisation"]
    height = 4.1 * (1 + runs.loc[runs["experiment"] == "map", "problem"].nunique())
    figure = Figure(figsize=(15, height), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.0, 1.25])[0]
    widest = rows[(rows["problem"] == rows["problem"].iloc[0]) & (rows["case"] == "online")]
    axes = left.subplots()
    make_plain(axes)
    _draw_gap(axes, widest)
    mapped = runs[runs["experiment"] == "map"]
    problems = list(dict.fromkeys(mapped["problem"]))
    grid = right.subplots(1 + len(problems), 1)
    for lower in grid:
        make_plain(lower)
    _draw_problems(grid[0], rows)
    for lower, problem in zip(grid[1:], problems, strict=True):
        _draw_map(lower, mapped[mapped["problem"] == problem])
    figure.suptitle(f"What the solution is worth on images that nobody optimised{over_seeds(rows)}")
    return figure


def _draw_gap(axes: Axes, rows: pd.DataFrame) -> None:
    test = means(rows, ["method"], "final").sort_values("mean")
    methods = [get_method(name) for name in test["method"]]
    places = {method.name: place for place, method in enumerate(methods)}
    for row in test.to_dict("records"):
        place = places[row["method"]]
        colour = methods[place].colour
        axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
    marks: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("final", "test images, at equal outer steps", {"marker": "o"}),
        # The exact hypergradient cannot afford one step of the others' cost.
        ("at_equal_cost", "test images, at equal cost", {"marker": "o", "mfc": "white"}),
        ("outer_accuracy", "outer images (optimised)", {"marker": "|", "ms": 12, "mew": 2}),
    )
    for column, label, style in marks:
        for number, row in enumerate(means(rows, ["method"], column).to_dict("records")):
            place = places[row["method"]]
            name = None if number else label
            axes.plot(row["mean"], place, color=methods[place].colour, label=name, **style)
    axes.set_yticks(range(len(methods)), [method.label for method in methods])
    axes.set_xlabel("accuracy at the end (mean and 95 % interval)")
    axes.set_title(f"{_problem_name(rows)}, online: the gap by method", loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3, frameon=False, fontsize=8)


def _draw_problems(axes: Axes, rows: pd.DataFrame) -> None:
    """The methods that are trained to convergence, and those that have no need of an inverse."""
    core = {"none", "unrolled", *rows.loc[rows["case"] == "converged", "method"]}
    methods = get_methods(name for name in rows["method"] if name in core)
    cells = [tuple(c) for c in rows[["problem", "case"]].drop_duplicates().to_numpy()]
    for number, method in enumerate(methods):
        shown = means(rows[rows["method"] == method.name], ["problem", "case"], "final")
        for row in shown.to_dict("records"):
            cell = cells.index((row["problem"], row["case"]))
            x = cell + 0.14 * (number - (len(methods) - 1) / 2)
            axes.plot([x, x], [row["low"], row["high"]], color=method.colour, linewidth=1.5)
            plot_method(axes, method, x, row["mean"], markersize=6, linestyle="none", label=None)
        plot_method(axes, method, [], [], linestyle="none")
    names = [f"{p.replace('_', chr(10))}\n{c}" for p, c in cells]
    # Beyond seven they would run into each other.
    axes.set_xticks(range(len(cells)), names, fontsize=8 if len(cells) <= 7 else 5.5)
    axes.set_ylabel("test accuracy")
    axes.set_title("every problem, core methods", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)


def _draw_map(axes: Axes, rows: pd.DataFrame) -> None:
    dampings = sorted(rows["damping"].unique())
    steps = list(dict.fromkeys(rows["inner_steps"]))
    for colour, images in zip(IMAGE_COLOURS, sorted(rows["outer_images"].unique()), strict=False):
        for style, count in zip(STEP_STYLES, steps, strict=False):
            mine = rows[(rows["outer_images"] == images) & (rows["inner_steps"] == count)]
            exact = means(mine[mine["method"] == "exact"], ["damping"], "final")
            for row in exact.to_dict("records"):
                axes.plot(-0.5, row["mean"], "*", color=colour, markersize=9, clip_on=False)
            mine = mine[mine["method"] != "exact"]
            line = means(mine, ["damping"], "final").sort_values("damping")
            x = [dampings.index(d) for d in line["damping"]]
            axes.errorbar(
                x,
                line["mean"],
                yerr=[line["mean"] - line["low"], line["high"] - line["mean"]],
                linestyle=style,
                marker="o",
                markersize=4,
                color=colour,
                capsize=2,
                label=f"{images} outer images, T = {count}",
            )
    axes.set_xticks([-0.5, *range(len(dampings))], ["exact", *(f"{d:g}" for d in dampings)])
    axes.set_xlabel("damping δ/λ_max")
    axes.set_ylabel("test accuracy")
    name = _problem_name(rows)
    axes.set_title(f"{name}, softmax regression: outer images × damping of CG × T", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)


def draw_forgetting(steps: pd.DataFrame) -> Figure:
    """Test accuracy, and the cosine with the exact hypergradient, over outer steps by case."""
    rows = steps[steps["experiment"] == "forgetting"]
    cases = list(dict.fromkeys(rows["case"]))
    figure = Figure(figsize=(3.3 * len(cases) + 1.6, 11.5), layout="constrained")
    heights = (1.5, 1.2, 0.7, 1.2)
    grid = figure.subplots(
        4, len(cases), squeeze=False, sharex="col", sharey="row", height_ratios=heights
    )
    for column, case in enumerate(cases):
        mine = rows[rows["case"] == case]
        last = int(mine["outer_step"].max())
        for method in get_methods(mine["method"]):
            chosen = mine[mine["method"] == method.name]
            columns = ("cosine", "low_share", "largest_eigenvalue")
            tables = [_ended_at_chance(chosen, last), *(_wide(chosen, c) for c in columns)]
            for axes, table in zip(grid[:, column], tables, strict=True):
                _draw_range(axes, table, method)
        grid[0, column].set_title(case, loc="left")
        grid[2, column].set_ylim(0, 1.05)
        grid[3, column].set_yscale("log")
        grid[3, column].set_xlabel("outer step")
        _stability_limit(grid[3, column], mine)
        for axes in grid[:, column]:
            make_plain(axes)
    grid[0, 0].set_ylabel("test accuracy\n(a diverged run: chance)")
    grid[1, 0].set_ylabel("cosine with the\nexact hypergradient")
    grid[2, 0].set_ylabel("share of ‖H⁻¹g‖²\nbelow λ_max/20")
    grid[3, 0].set_ylabel("largest eigenvalue\nof the inner Hessian")
    share_legend(figure, grid[0], loc="outside lower center", ncols=5, frameon=True, fontsize=10)
    figure.suptitle(
        f"A weight decay for every parameter: what is forgotten, and what of it the remedies "
        f"keep (median and range{over_seeds(rows)})"
    )
    return figure


def _draw_range(axes: Axes, table: pd.DataFrame, method: HypergradientMethod) -> None:
    """Median, and from the least to the most, of a table of outer steps × seeds."""
    axes.plot(table.index, table.median(axis=1), color=method.colour, label=method.label)
    low, high = table.min(axis=1), table.max(axis=1)
    axes.fill_between(table.index, low, high, color=method.colour, alpha=0.15, linewidth=0)


def _stability_limit(axes: Axes, rows: pd.DataFrame) -> None:
    """2/α where α stays: an eigenvalue beyond it grows in every step of gradient descent."""
    known = rows.dropna(subset=["step_sharpness"])
    rates = known["step_sharpness"] / known["largest_eigenvalue"]
    by_seed = rates.groupby(known["seed"])
    if len(known) and (by_seed.max() <= by_seed.min() * (1 + 1e-6)).all():
        axes.axhline(2 / rates.median(), color=BLACK, linestyle="--", linewidth=1)
        axes.annotate("2/α", (0, 2 / rates.median()), va="bottom", fontsize=9)


def _wide(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Outer steps × seeds, where the column was measured."""
    known = rows.dropna(subset=[column])
    wide: pd.DataFrame = known.pivot(index="outer_step", columns="seed", values=column)
    return wide


def _ended_at_chance(rows: pd.DataFrame, last: int) -> pd.DataFrame:
    wide = rows.pivot(index="outer_step", columns="seed", values="test_accuracy")
    full: pd.DataFrame = wide.reindex(range(last + 1)).fillna(CHANCE)
    return full


def draw_instability(runs: pd.DataFrame) -> Figure:
    """By source and step: diverged runs, and accuracy lost; without, with, and by one remedy."""
    rows = runs[runs["experiment"] == "instability"].copy()
    parts = rows["case"].str.split(" | ", regex=False, expand=True)
    rows["source"], rows["remedy"] = parts[0], parts[1]
    sources = list(dict.fromkeys(rows["source"]))
    remedies = [r for r in dict.fromkeys(rows["remedy"]) if r not in ("without", "all")]
    # "All but" one says what that one is good for: at the step of those that come alone.
    middle = rows.loc[rows["remedy"] == remedies[0], "step"].iloc[0]
    figure = Figure(figsize=(15, 10.5), layout="constrained")
    grid = figure.subplots(2, 3, width_ratios=[1, 1, 2.4], sharey=True, sharex="col")
    for panels, column, name, highest in (
        (grid[0], "diverged", "share of runs that diverge", 1.0),
        (grid[1], "drop", "accuracy lost (best − final)", 0.8),
    ):
        for axes, remedy, title in (
            (panels[0], "without", "without remedies"),
            (panels[1], "all", "with all remedies"),
        ):
            table = rows[rows["remedy"] == remedy].pivot_table(
                index="source", columns="step", values=column, aggfunc="mean"
            )
            _heat(axes, table.loc[sources], highest)
            axes.set_title(f"{title}:\n{name}", loc="left", fontsize=10)
            axes.set_xticks(range(table.shape[1]), [f"{s:g}" for s in table.columns])
        chosen = rows[rows["remedy"].isin(remedies) & (rows["step"] == middle)]
        alone = chosen.pivot_table(index="source", columns="remedy", values=column, aggfunc="mean")
        _heat(panels[2], alone.loc[sources, remedies], highest)
        panels[2].set_title(
            f"one remedy at a time, α·λ_max = {middle:g} at the start:\n{name}",
            loc="left",
            fontsize=10,
        )
        panels[2].set_xticks(range(len(remedies)), remedies, rotation=30, ha="right")
        panels[0].set_yticks(range(len(sources)), sources)
        panels[0].set_ylabel("source of instability")
    for axes in grid[1, :2]:
        axes.set_xlabel("step α·λ_max at the start")
    figure.suptitle(
        f"What makes implicit meta-learning diverge, and which remedy keeps it"
        f" (a diverged run ends at chance){over_seeds(rows)} a cell"
    )
    return figure


def _heat(axes: Axes, table: pd.DataFrame, highest: float) -> None:
    axes.imshow(table, vmin=0, vmax=highest, cmap="cividis", aspect="auto")
    for (row, column), share in np.ndenumerate(table.to_numpy()):
        colour = "black" if share > highest / 2 else "white"
        axes.text(
            column, row, f"{round(share, 2):g}", ha="center", va="center", color=colour, fontsize=9
        )


def draw_efficiency(runs: pd.DataFrame) -> Figure:
    """Test accuracy against cost, and against memory, with the Pareto front, a column a P."""
    rows = runs[runs["experiment"] == "efficiency"]
    sizes = sorted(rows["parameters"].unique())
    figure = Figure(figsize=(3.8 * len(sizes) + 2.4, 7.2), layout="constrained")
    grid = figure.subplots(2, len(sizes), squeeze=False, sharey="col")
    for column, size in enumerate(sizes):
        mine = rows[rows["parameters"] == size]
        groups = mine.groupby(["method", "budget"], sort=False)
        table = groups[["final", "cost", "memory"]].mean().reset_index()
        table["vectors"] = table["memory"] / (4 * size)
        for axes, measure in ((grid[0, column], "cost"), (grid[1, column], "vectors")):
            known = table.dropna(subset=[measure])
            for row in known.to_dict("records"):
                method = get_method(row["method"])
                at = (row[measure], row["final"])
                plot_method(axes, method, *at, markersize=8, linestyle="none")
                if method.budgeted:
                    # Less of a budget is written above, so that points that coincide can be read.
                    above = row["budget"] == known["budget"][known["method"] == row["method"]].min()
                    place = {"xytext": (5, 4 if above else -9), "textcoords": "offset points"}
                    axes.annotate(f"{row['budget']}", at, **place, fontsize=7)
            front = pareto(known[measure].tolist(), known["final"].tolist())
            steps = known[[measure, "final"]].iloc[front].to_numpy().T
            axes.step(*steps, where="post", color=BLACK, linewidth=0.8, linestyle=":")
            axes.set_xscale("log")
            # A decade and its 2 and 5 where there are few: more would run into each other.
            narrow = known[measure].max() < 50 * known[measure].min()
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            make_plain(axes)
        grid[0, column].set_title(f"P = {size:,}", loc="left")
        grid[0, column].set_xlabel("cost, in inner gradients")
        grid[1, column].set_xlabel("peak memory of a hypergradient,\nin parameter vectors")
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy at the end")
    share_legend(figure, grid[0], fontsize=10)
    figure.suptitle(
        "What accuracy costs at equal outer steps (numbers: products or unrolled steps; dotted: "
        "Pareto front)"
    )
    return figure


def _problem_name(rows: pd.DataFrame) -> str:
    return str(rows["problem"].iloc[0]).replace("_", " ")
