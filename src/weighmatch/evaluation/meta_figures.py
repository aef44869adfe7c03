"""Figures of the meta-learning study: generalisation, forgetting, instability, efficiency."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from weighmatch.evaluation.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    make_plain,
)
from weighmatch.evaluation.meta_tables import CHANCE, means, pareto

# Name, colour and marker.
METHODS = {
    "none": ("no outer learning", GREY, "x"),
    "identity": ("identity (no curvature)", ORANGE, "s"),
    "darts": ("DARTS (finite difference)", BLACK, "s"),
    "sama": ("SAMA-like", RED, "s"),
    "diagonal": ("diagonal (Hutchinson)", GREY, "o"),
    "woodbury_fisher": ("empirical Fisher (Woodbury)", ORANGE, "D"),
    "kfac": ("K-FAC", GREEN, "D"),
    "neumann": ("Neumann series", PINK, "o"),
    "chebyshev": ("Chebyshev", GREEN, "o"),
    "nystrom": ("Nyström", SKY, "o"),
    "nystrom_cg": ("CG, Nyström preconditioner", BLACK, "o"),
    "minres": ("MINRES", SKY, "^"),
    "conjugate_gradient": ("conjugate gradients", BLUE, "o"),
    "unrolled": ("unrolled differentiation", GREEN, "^"),
    "exact": ("exact", RED, "*"),
}
PROBLEM_NAMES = {
    "example_weights": "example weights",
    "weight_decay": "weight decay",
    "weighing_network": "weighing network",
    "distillation": "distillation",
    "contaminated_pool": "contaminated pool",
}


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
    figure.suptitle(f"What the solution is worth on images that nobody optimised{_over(rows)}")
    return figure


def _draw_gap(axes: Axes, rows: pd.DataFrame) -> None:
    test = means(rows, ["method"], "final").sort_values("mean")
    outer = means(rows, ["method"], "outer_accuracy").set_index("method")
    # The exact hypergradient cannot afford one step of the others' cost.
    equal = means(rows, ["method"], "at_equal_cost").set_index("method")
    for place, row in enumerate(test.to_dict("records")):
        colour = METHODS[row["method"]][1]
        axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
        label = "test images, at equal outer steps" if not place else None
        axes.plot(row["mean"], place, "o", color=colour, label=label)
        if row["method"] in equal.index:
            axes.plot(
                equal.loc[row["method"], "mean"],
                place,
                "o",
                color=colour,
                markerfacecolor="white",
                label="test images, at equal cost" if not place else None,
            )
        if row["method"] in outer.index:
            axes.plot(
                outer.loc[row["method"], "mean"],
                place,
                "|",
                markersize=12,
                markeredgewidth=2,
                color=colour,
                label="outer images (optimised)" if not place else None,
            )
    axes.set_yticks(range(len(test)), [METHODS[m][0] for m in test["method"]])
    axes.set_xlabel("accuracy at the end (mean and 95 % interval)")
    axes.set_title(
        f"{PROBLEM_NAMES.get(rows['problem'].iloc[0], '')}, online: the gap by method", loc="left"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3, frameon=False, fontsize=8)


def _draw_problems(axes: Axes, rows: pd.DataFrame) -> None:
    core = [m for m in METHODS if m in set(rows.loc[rows["case"] == "converged", "method"])]
    core = ["none", *[m for m in METHODS if m in core or m == "unrolled"]]
    core = [m for m in dict.fromkeys(core) if m in set(rows["method"])]
    cells = [tuple(c) for c in rows[["problem", "case"]].drop_duplicates().to_numpy()]
    for number, method in enumerate(core):
        name, colour, marker = METHODS[method]
        shown = means(rows[rows["method"] == method], ["problem", "case"], "final")
        for row in shown.to_dict("records"):
            cell = cells.index((row["problem"], row["case"]))
            x = cell + 0.14 * (number - (len(core) - 1) / 2)
            axes.plot([x, x], [row["low"], row["high"]], color=colour, linewidth=1.5)
            axes.plot(x, row["mean"], marker, color=colour, markersize=6)
        axes.plot([], [], marker, color=colour, label=name)
    names = [f"{PROBLEM_NAMES.get(p, p).replace(' ', chr(10))}\n{c}" for p, c in cells]
    # Beyond seven they would run into each other.
    axes.set_xticks(range(len(cells)), names, fontsize=8 if len(cells) <= 7 else 5.5)
    axes.set_ylabel("test accuracy")
    axes.set_title("every problem, core methods", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)


def _draw_map(axes: Axes, rows: pd.DataFrame) -> None:
    colours = (RED, BLUE, GREEN, PINK, ORANGE)
    dampings = sorted(rows["damping"].unique())
    steps = list(dict.fromkeys(rows["inner_steps"]))
    for colour, images in zip(colours, sorted(rows["outer_images"].unique()), strict=False):
        for style, count in zip(("-", "--", ":"), steps, strict=False):
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
    name = PROBLEM_NAMES.get(rows["problem"].iloc[0], "")
    axes.set_title(f"{name}, softmax regression: outer images × damping of CG × T", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)


def draw_forgetting(steps: pd.DataFrame) -> Figure:
    """Test accuracy, and the cosine with the exact hypergradient, over outer steps by case."""
    rows = steps[steps["experiment"] == "forgetting"]
    cases = list(dict.fromkeys(rows["case"]))
    figure = Figure(figsize=(3.3 * len(cases) + 1.6, 11.5), layout="constrained")
    grid = figure.subplots(
        4,
        len(cases),
        squeeze=False,
        sharex="col",
        sharey="row",
        height_ratios=(1.5, 1.2, 0.7, 1.2),
    )
    for column, case in enumerate(cases):
        mine = rows[rows["case"] == case]
        last = int(mine["outer_step"].max())
        for method in [m for m in METHODS if m in set(mine["method"])]:
            name, colour, _ = METHODS[method]
            chosen = mine[mine["method"] == method]
            accuracy = _ended_at_chance(chosen, last)
            for axes, table in (
                (grid[0, column], accuracy),
                (grid[1, column], _wide(chosen, "cosine")),
                (grid[2, column], _wide(chosen, "low_share")),
                (grid[3, column], _wide(chosen, "largest_eigenvalue")),
            ):
                axes.plot(table.index, table.median(axis=1), color=colour, label=name)
                axes.fill_between(
                    table.index,
                    table.min(axis=1),
                    table.max(axis=1),
                    color=colour,
                    alpha=0.15,
                    linewidth=0,
                )
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
    figure.legend(**_shared_legend(grid[0]), loc="outside lower center", ncols=5)
    figure.suptitle(
        f"A weight decay for every parameter: what is forgotten, and what of it the remedies "
        f"keep (median and range{_over(rows)})"
    )
    return figure


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
        f" (a diverged run ends at chance){_over(rows)} a cell"
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
                name, colour, marker = METHODS[row["method"]]
                at = (row[measure], row["final"])
                axes.plot(*at, marker, color=colour, markersize=8, label=name)
                if row["method"] in ("neumann", "conjugate_gradient", "nystrom", "unrolled"):
                    # Less of a budget is written above, so that points that coincide can be read.
                    above = row["budget"] == known["budget"][known["method"] == row["method"]].min()
                    axes.annotate(
                        f"{row['budget']}",
                        at,
                        xytext=(5, 4 if above else -9),
                        textcoords="offset points",
                        fontsize=7,
                    )
            front = pareto(known[measure].tolist(), known["final"].tolist())
            axes.step(
                known[measure].iloc[front],
                known["final"].iloc[front],
                where="post",
                color=BLACK,
                linewidth=0.8,
                linestyle=":",
            )
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
    figure.legend(**_shared_legend(grid[0]), loc="outside right center", frameon=False)
    figure.suptitle(
        "What accuracy costs at equal outer steps (numbers: products or unrolled steps; dotted: "
        "Pareto front)"
    )
    return figure


def _shared_legend(panels: Iterable[Axes]) -> dict[str, Any]:
    """One entry a label, whichever panel it is in."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    return {"handles": list(found.values()), "labels": list(found)}


def _over(rows: pd.DataFrame) -> str:
    count = rows["seed"].nunique()
    return f", {count} seeds" if count > 1 else ", 1 seed"
