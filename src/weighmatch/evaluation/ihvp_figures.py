"""Figures of the IHVP study: cost, progress of training, stability, spectra, memory."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from weighmatch.evaluation.figures import BLACK, BLUE, GREEN, GREY, ORANGE, RED, make_axes
from weighmatch.evaluation.study_figures import plot_method, share_legend
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


def draw_cost(study: pd.DataFrame) -> Figure:
    """Error of the hypergradient against the time of a solve, a panel a network."""
    rows = base_cells(study)
    rows = _without_exact(rows[rows["stage"] == "1.0"] if "1.0" in set(rows["stage"]) else rows)
    networks = _networks(rows)
    figure, panels = make_axes(4.4 * len(networks) + 2.6, 5.0, len(networks))
    for axes, network in zip(panels, networks, strict=True):
        mine = rows[rows["network"] == network]
        for method in get_methods(mine["method"]):
            budgets = mine[mine["method"] == method.name].groupby("max_products")
            middle = budgets[["gradients", "hypergradient_error"]].median()
            errors = middle["hypergradient_error"].clip(lower=LOWEST_ERROR)
            plot_method(axes, method, middle["gradients"], errors, markersize=5, linewidth=1.3)
        _make_logarithmic(axes)
        axes.set_ylim(3e-9, 30)
        axes.set_title(_title(mine, network), loc="left", fontsize=10)
        axes.set_xlabel("time of the hypergradient, in gradients")
    panels[0].set_ylabel("relative error of the hypergradient (below 1e-8: at 1e-8)")
    share_legend(figure, panels)
    figure.suptitle(
        "What time buys: distance to the exact hypergradient at the end of training", x=0.4
    )
    return figure


def draw_progress(study: pd.DataFrame) -> Figure:
    """Error of the hypergradient at the middle budget against the progress of training."""
    rows = _without_exact(base_cells(study))
    rows = rows[rows["stage"] != "indefinite"]
    methods = [method for method in get_methods(rows["method"]) if not method.minor]
    budgets = sorted(rows.loc[rows["method"] == "neumann", "max_products"].unique())
    budget = budgets[len(budgets) // 2]
    networks = _networks(rows)
    figure, panels = make_axes(3.9 * len(networks) + 2.6, 4.4, len(networks))
    for axes, network in zip(panels, networks, strict=True):
        mine = rows[(rows["network"] == network) & rows["max_products"].isin([1, budget])]
        for method in methods:
            line = mine[mine["method"] == method.name].groupby("progress")
            middle = line["hypergradient_error"].median().clip(lower=LOWEST_ERROR)
            if len(middle):
                plot_method(axes, method, 100 * middle.index.to_numpy(), middle, markersize=5)
        axes.set_yscale("log")
        axes.set_title(_title(mine, network), loc="left", fontsize=10)
        axes.set_xlabel("progress of training (%)")
    panels[0].set_ylabel("relative error of the hypergradient")
    share_legend(figure, panels)
    figure.suptitle(f"How the error moves as training goes on, {budget} products", x=0.4)
    return figure


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
    figure, (axes,) = make_axes(8, 4.4)
    for key, rows in memory.groupby("method", sort=False):
        # Nyström's method is measured at two ranks, such as "nystrom, rank 40".
        name, _, rank = str(key).partition(", ")
        method = get_method(name)
        style = {"label": f"{method.label}, {rank}"} if rank else {}
        if rank == "rank 40":
            style["marker"] = "^"
        plot_method(axes, method, rows["parameters"], rows["vectors"], **style)
    _make_logarithmic(axes)
    axes.set_xlabel("number of parameters P")
    axes.set_ylabel("peak memory beyond the graph,\nin vectors of P numbers")
    axes.set_title("Memory of one solve: flat lines grow as P", loc="left")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
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
