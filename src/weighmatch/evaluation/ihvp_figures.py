"""Figures of the IHVP study: cost, progress of training, stability, spectra, memory."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from weighmatch.evaluation.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    make_axes,
    make_grid,
)
from weighmatch.evaluation.study_figures import Line, plot_lines, plot_method, share_legend
from weighmatch.studies.methods import get_method, get_methods

# Errors below these are drawn there: of hypergradients, and of solutions and their bounds.
LOWEST_ERROR, LOWEST_BOUND = 1e-8, 1e-10
STAGES = {
    "0.0": ("initialisation", GREY),
    "0.1": ("10 % of training", ORANGE),
    "0.5": ("half-way", GREEN),
    "1.0": ("end of training", BLUE),
    "indefinite": ("most indefinite", RED),
}


def base_cells(study: pd.DataFrame) -> pd.DataFrame:
    """Double precision, all images, the first L2 and the first damping: every stage."""
    chosen = (study["dtype"] == "float64") & (study["batch"] == -1)
    for column in ("l2", "damping_ratio"):
        chosen &= study[column] == study[column].to_list()[0]
    rows: pd.DataFrame = study.loc[chosen]
    return rows


def at_the_end(study: pd.DataFrame) -> pd.DataFrame:
    """The base cells at the end of training, or at all stages where that is none of them."""
    rows = base_cells(study)
    return rows[rows["stage"] == "1.0"] if "1.0" in set(rows["stage"]) else rows


def largest_network(study: pd.DataFrame) -> str:
    """The network of the most parameters."""
    return str(study.sort_values("parameters")["network"].iloc[-1])


def draw_cost(study: pd.DataFrame) -> Figure:
    """Error of the hypergradient against the products that it costs, a panel a network.

    A method that takes no product with the curvature stands at its budget: a step of unrolled
    differentiation counts as one product, and so does a finite difference of two gradients.
    """
    rows = _without_exact(at_the_end(study))
    rows = rows.assign(cost=rows["products"].fillna(rows["max_products"]).astype(float))
    networks = _networks(rows)
    figure = Figure(figsize=(6.4, 0.6 + 3.6 * len(networks)), layout="constrained")
    panels = make_grid(figure, len(networks), 1, sharex=True)
    for axes, network in zip(panels, networks, strict=True):
        mine = rows[rows["network"] == network]
        lines = []
        for method in get_methods(mine["method"]):
            budgets = mine[mine["method"] == method.name].groupby("max_products")
            middle = budgets[["cost", "hypergradient_error"]].median().to_numpy(np.float64)
            lines.append(Line(method, middle[:, 0], middle[:, 1].clip(min=LOWEST_ERROR)))
        _make_logarithmic(axes)
        axes.set_xlim(0.8, 1.25 * rows["cost"].max())
        _fit_errors(axes, lines)
        plot_lines(axes, lines)
        axes.set_title(_title(mine, network), loc="left", fontsize=10)
        axes.set_ylabel("relative error of\nthe hypergradient")
    panels[-1].set_xlabel("products with the curvature")
    figure.suptitle("Distance to the exact hypergradient, end of training", fontsize=11)
    return figure


def draw_summary(study: pd.DataFrame) -> Figure:
    """The figure of costs for the main methods on the largest network."""
    main = [method.name for method in get_methods(study["method"]) if method.is_main]
    shown = study["method"].isin(main) & (study["network"] == largest_network(study))
    return draw_cost(study[shown])


def draw_progress(study: pd.DataFrame) -> Figure:
    """Error of the hypergradient at the middle budget against the progress of training."""
    rows = _without_exact(base_cells(study))
    rows = rows[rows["stage"] != "indefinite"]
    methods = [method for method in get_methods(rows["method"]) if not method.minor]
    budgets = sorted(rows.loc[rows["method"] == "neumann", "max_products"].unique())
    budget = budgets[len(budgets) // 2]
    networks = _networks(rows)
    figure = Figure(figsize=(6.4, 0.6 + 3.0 * len(networks)), layout="constrained")
    panels = make_grid(figure, len(networks), 1, sharex=True)
    for axes, network in zip(panels, networks, strict=True):
        mine = rows[(rows["network"] == network) & rows["max_products"].isin([1, budget])]
        lines = []
        for method in methods:
            line = mine[mine["method"] == method.name].groupby("progress")
            middle = line["hypergradient_error"].median().clip(lower=LOWEST_ERROR)
            if len(middle):
                x, y = 100 * middle.index.to_numpy(np.float64), middle.to_numpy(np.float64)
                lines.append(Line(method, x, y))
        axes.set_xlim(-3, 103)
        axes.set_yscale("log")
        _fit_errors(axes, lines)
        plot_lines(axes, lines)
        axes.set_title(_title(mine, network), loc="left", fontsize=10)
        axes.set_ylabel("relative error of\nthe hypergradient")
    panels[-1].set_xlabel("progress of training (%)")
    figure.suptitle(f"How the error moves as training goes on, {budget} products", fontsize=11)
    return figure


def _fit_errors(axes: Axes, lines: Sequence[Line]) -> None:
    """Limits around all lines, at least a decade apart, with room for labels above."""
    errors = np.concatenate([line.y for line in lines])
    low, high = errors.min() / 2, errors.max() * 4
    axes.set_ylim(min(low, high / 10), high)


def draw_stability(study: pd.DataFrame) -> Figure:
    """Cosine over mini-batches; single against double precision; bounds against errors."""
    study = _without_exact(study)
    figure, (batches, precision, bounds) = make_axes(15.5, 5.0, 3)
    _draw_batches(batches, study[study["batch"] >= 0])
    _draw_precision(precision, study)
    _draw_bounds(bounds, study.dropna(subset=["error_bound", "true_error"]))
    share_legend(figure, [precision])
    return figure


def _draw_batches(axes: Axes, rows: pd.DataFrame) -> None:
    methods = get_methods(rows["method"])[::-1]
    for place, method in enumerate(methods):
        chosen = rows["method"] == method.name
        values = rows.loc[chosen, "hypergradient_cosine"].to_numpy(np.float64)
        axes.plot(values, np.full(len(values), place), ".", color=method.colour, alpha=0.6)
        axes.plot(np.median(values), place, "|", color=BLACK, markersize=14)
    axes.set_yticks(range(len(methods)), [method.label for method in methods])
    axes.set_xlim(right=1.02)
    axes.set_xlabel("cosine with the exact hypergradient of all images")
    axes.set_title("Curvature from mini-batches: bar = median", loc="left", fontsize=10)


def _draw_precision(axes: Axes, study: pd.DataFrame) -> None:
    keys = ["network", "seed", "method", "max_products"]
    base = base_cells(study)
    double = base[base["stage"] == "1.0"].set_index(keys)["hypergradient_error"]
    single = study[study["dtype"] == "float32"].set_index(keys)["hypergradient_error"]
    both = pd.concat([double.rename("double"), single.rename("single")], axis=1, join="inner")
    both = both.clip(lower=LOWEST_ERROR)
    for key, rows in both.groupby("method"):
        plot_method(axes, get_method(str(key)), rows["double"], rows["single"], linestyle="none")
    _draw_diagonal(axes)
    axes.set_xlabel("error of the hypergradient in double precision")
    axes.set_ylabel("… in single precision")
    axes.set_title("Above the line: precision is lost", loc="left", fontsize=10)


def _draw_bounds(axes: Axes, known: pd.DataFrame) -> None:
    for key, rows in known[known["true_error"] > 0].groupby("method"):
        both = rows[["true_error", "error_bound"]].clip(lower=LOWEST_BOUND)
        style = {"linestyle": "none", "markersize": 3, "alpha": 0.6}
        plot_method(axes, get_method(str(key)), both["true_error"], both["error_bound"], **style)
    _draw_diagonal(axes)
    axes.set_xlabel("‖v − v*‖ / ‖g‖, measured")
    axes.set_ylabel("error bound, ‖r‖ / λ")
    axes.set_title("Certificates: on or above the line they hold", loc="left", fontsize=10)


def draw_spectra(spectra: pd.DataFrame) -> Figure:
    """Sorted absolute eigenvalues at each stage, those of negative ones dotted."""
    networks = _networks(spectra)
    figure, panels = make_axes(4.2 * len(networks) + 1.6, 4.4, len(networks))
    first = spectra["seed"].iloc[0]
    for axes, network in zip(panels, networks, strict=True):
        mine = spectra[(spectra["network"] == network) & (spectra["seed"] == first)]
        for stage, (name, colour) in STAGES.items():
            values = mine.loc[mine["stage"] == stage, "eigenvalue"].to_numpy(np.float64)
            if len(values) == 0:
                continue
            largest = np.abs(values).max()
            for sign, style, label in ((1, "-", name), (-1, ":", None)):
                part = np.sort(sign * values[sign * values > 1e-12 * largest])[::-1]
                if len(part):
                    axes.plot(np.arange(1, len(part) + 1), part, style, color=colour, label=label)
        _make_logarithmic(axes)
        axes.set_ylim(bottom=1e-9)
        axes.set_title(network, loc="left", fontsize=10)
        axes.set_xlabel("rank of the eigenvalue")
    panels[0].set_ylabel("eigenvalue of the curvature (dotted: −λ of negative ones)")
    share_legend(figure, panels)
    figure.suptitle("A few large eigenvalues, a long tail: the tail is what truncation misses")
    return figure


def draw_memory(memory: pd.DataFrame) -> Figure:
    """Peak memory of a solve in parameter vectors against P: flat lines are O(P)."""
    figure, (axes,) = make_axes(7.5, 4.4)
    lines = []
    for key, rows in memory.groupby("method", sort=False):
        # Nyström's method is measured at two ranks, such as "nystrom, rank 40".
        name, _, rank = str(key).partition(", ")
        method = get_method(name)
        look = {"label": f"{method.label}, {rank}"} if rank else {}
        if rank == "rank 40":
            look["marker"] = "^"
        places = rows[["parameters", "vectors"]].to_numpy(np.float64).T
        lines.append(Line(method, places[0], places[1], look))
    _make_logarithmic(axes)
    for name, column in (("x", "parameters"), ("y", "vectors")):
        ends = memory[column].min() / 1.5, memory[column].max() * 1.5
        axes.set(**{f"{name}lim": ends})
    plot_lines(axes, lines)
    axes.set_xlabel("number of parameters P")
    axes.set_ylabel("peak memory beyond the graph,\nin vectors of P numbers")
    axes.set_title("Memory of one solve: flat lines grow as P", loc="left", fontsize=11)
    return figure


def _without_exact(rows: pd.DataFrame) -> pd.DataFrame:
    """What is compared with the exact solve."""
    return rows[rows["method"] != "exact"]


def _networks(rows: pd.DataFrame) -> Sequence[str]:
    """Softmax regression, then MLPs, then CNNs."""
    return sorted(rows["network"].unique(), key=lambda name: ("smc".find(name[0]), name))


def _title(rows: pd.DataFrame, network: str) -> str:
    curvature = "Hessian" if rows["curvature"].iloc[0] == "hessian" else "Gauss-Newton"
    return f"{network}, P = {rows['parameters'].iloc[0]:,}, {curvature}"


def _make_logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_diagonal(axes: Axes) -> None:
    _make_logarithmic(axes)
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color=BLACK, linewidth=1)
