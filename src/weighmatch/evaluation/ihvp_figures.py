"""Figures of the IHVP study: cost, progress of training, stability, spectra, memory."""

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from weighmatch.evaluation.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    make_axes,
)

# Name, colour and marker; the order is that of the legends.
METHODS = {
    "identity": ("identity (no curvature)", GREY, "s"),
    "neumann": ("Neumann series", ORANGE, "o"),
    "neumann_extrapolated": ("Neumann, extrapolated", RED, "o"),
    "chebyshev": ("Chebyshev", GREEN, "o"),
    "minres": ("MINRES", SKY, "o"),
    "conjugate_gradient": ("conjugate gradients", BLUE, "o"),
    "gauss_newton_cg": ("CG on the Gauss-Newton matrix", SKY, "^"),
    "nystrom_cg": ("CG, Nyström preconditioner", BLACK, "o"),
    "nystrom": ("Nyström", PINK, "o"),
    "nystrom_plain": ("Nyström, 1/δ outside", PINK, "^"),
    "diagonal": ("diagonal (Hutchinson)", GREY, "o"),
    "unrolled": ("unrolled differentiation", GREEN, "^"),
    "woodbury_fisher": ("empirical Fisher (Woodbury)", ORANGE, "D"),
    "kfac": ("K-FAC", GREEN, "D"),
    "ekfac": ("EK-FAC", BLUE, "D"),
    "darts": ("DARTS (finite difference)", BLACK, "s"),
    "sama": ("SAMA-like", RED, "s"),
}
PROGRESS = (
    "identity",
    "neumann",
    "neumann_extrapolated",
    "chebyshev",
    "conjugate_gradient",
    "gauss_newton_cg",
    "nystrom",
    "diagonal",
    "unrolled",
)
STAGES = {
    "0.0": ("initialisation", GREY),
    "0.1": ("10 % of training", ORANGE),
    "0.5": ("half-way", GREEN),
    "1.0": ("end of training", BLUE),
    "indefinite": ("most indefinite", RED),
}


def base_cells(study: pd.DataFrame) -> pd.DataFrame:
    """Double precision, all images, the first L2 and the first damping: every stage."""
    l2, damping = study["l2"].to_list()[0], study["damping_ratio"].to_list()[0]
    chosen = (study["dtype"] == "float64") & (study["batch"] == -1)
    chosen &= (study["l2"] == l2) & (study["damping_ratio"] == damping)
    rows: pd.DataFrame = study.loc[chosen]
    return rows


def draw_cost(study: pd.DataFrame) -> Figure:
    """Error of the hypergradient against the time of a solve, a panel a network."""
    rows = base_cells(study)
    rows = rows[rows["stage"] == "1.0"] if "1.0" in set(rows["stage"]) else rows
    networks = _networks(rows)
    figure, panels = make_axes(4.4 * len(networks) + 2.6, 5.0, len(networks))
    for axes, network in zip(panels, networks, strict=True):
        mine = rows[rows["network"] == network]
        for method, (name, colour, marker) in METHODS.items():
            line = mine[mine["method"] == method].groupby("max_products")
            if len(line) == 0:
                continue
            middle = line[["gradients", "hypergradient_error"]].median()
            axes.plot(
                middle["gradients"],
                middle["hypergradient_error"].clip(lower=1e-8),
                marker=marker,
                markersize=5,
                linewidth=1.3,
                color=colour,
                label=name,
            )
        _logarithmic(axes)
        axes.set_ylim(3e-9, 30)
        axes.set_title(_title(mine, network), loc="left", fontsize=10)
        axes.set_xlabel("time of the hypergradient, in gradients")
    panels[0].set_ylabel("relative error of the hypergradient (below 1e-8: at 1e-8)")
    _legend(figure, panels)
    figure.suptitle(
        "What time buys: distance to the exact hypergradient at the end of training", x=0.4
    )
    return figure


def draw_progress(study: pd.DataFrame) -> Figure:
    """Error of the hypergradient at the middle budget against the progress of training."""
    rows = base_cells(study)
    rows = rows[(rows["stage"] != "indefinite") & rows["method"].isin(PROGRESS)]
    budgets = sorted(rows.loc[rows["method"] == "neumann", "max_products"].unique())
    budget = budgets[len(budgets) // 2]
    rows = rows[rows["max_products"].isin([1, budget])]
    networks = _networks(rows)
    figure, panels = make_axes(3.9 * len(networks) + 2.6, 4.4, len(networks))
    for axes, network in zip(panels, networks, strict=True):
        mine = rows[rows["network"] == network]
        for method in PROGRESS:
            name, colour, marker = METHODS[method]
            line = mine[mine["method"] == method].groupby("progress")
            if len(line) == 0:
                continue
            middle = line["hypergradient_error"].median()
            axes.plot(
                100 * middle.index.to_numpy(),
                middle.clip(lower=1e-8),
                marker=marker,
                markersize=5,
                color=colour,
                label=name,
            )
        axes.set_yscale("log")
        axes.set_title(_title(mine, network), loc="left", fontsize=10)
        axes.set_xlabel("progress of training (%)")
    panels[0].set_ylabel("relative error of the hypergradient")
    _legend(figure, panels)
    figure.suptitle(f"How the error moves as training goes on, {budget} products", x=0.4)
    return figure


def draw_stability(study: pd.DataFrame) -> Figure:
    """Cosine over mini-batches; single against double precision; bounds against errors."""
    figure, (batches, precision, bounds) = make_axes(15.5, 5.0, 3)
    ran = study[study["batch"] >= 0]
    names = [m for m in METHODS if m in set(ran["method"])]
    for row, method in enumerate(reversed(names)):
        values = ran.loc[ran["method"] == method, "hypergradient_cosine"].to_numpy(np.float64)
        batches.plot(values, np.full(len(values), row), ".", color=METHODS[method][1], alpha=0.6)
        batches.plot(np.median(values), row, "|", color=BLACK, markersize=14)
    batches.set_yticks(range(len(names)), [METHODS[m][0] for m in reversed(names)])
    batches.set_xlim(right=1.02)
    batches.set_xlabel("cosine with the exact hypergradient of all images")
    batches.set_title("Curvature from mini-batches: bar = median", loc="left", fontsize=10)

    keys = ["network", "seed", "method", "max_products"]
    single = study[study["dtype"] == "float32"].set_index(keys)["hypergradient_error"]
    base = base_cells(study)
    double = base[base["stage"] == "1.0"].set_index(keys)["hypergradient_error"]
    both = pd.concat([double.rename("double"), single.rename("single")], axis=1, join="inner")
    for key, rows in both.groupby("method"):
        name, colour, marker = METHODS[str(key)]
        precision.plot(
            rows["double"].clip(lower=1e-8),
            rows["single"].clip(lower=1e-8),
            linestyle="none",
            marker=marker,
            color=colour,
            label=name,
        )
    _diagonal(precision)
    precision.set_xlabel("error of the hypergradient in double precision")
    precision.set_ylabel("… in single precision")
    precision.set_title("Above the line: precision is lost", loc="left", fontsize=10)

    known = study.dropna(subset=["error_bound", "true_error"])
    for key, rows in known[known["true_error"] > 0].groupby("method"):
        name, colour, marker = METHODS[str(key)]
        bounds.plot(
            rows["true_error"].clip(lower=1e-10),
            rows["error_bound"].clip(lower=1e-10),
            linestyle="none",
            marker=marker,
            markersize=3,
            color=colour,
            alpha=0.6,
            label=name,
        )
    _diagonal(bounds)
    bounds.set_xlabel("‖v − v*‖ / ‖g‖, measured")
    bounds.set_ylabel("error bound, ‖r‖ / λ")
    bounds.set_title("Certificates: on or above the line they hold", loc="left", fontsize=10)
    _legend(figure, [precision])
    return figure


def draw_spectra(spectra: pd.DataFrame) -> Figure:
    """Sorted absolute eigenvalues at each stage; negative ones apart."""
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
            for sign, style in ((1, "-"), (-1, ":")):
                part = np.sort(sign * values[sign * values > 1e-12 * largest])[::-1]
                if len(part):
                    label = name if sign == 1 else None
                    ranks = np.arange(1, len(part) + 1)
                    axes.plot(ranks, part, style, color=colour, label=label)
        _logarithmic(axes)
        axes.set_ylim(bottom=1e-9)
        axes.set_title(network, loc="left", fontsize=10)
        axes.set_xlabel("rank of the eigenvalue")
    panels[0].set_ylabel("eigenvalue of the curvature (dotted: −λ of negative ones)")
    _legend(figure, panels)
    figure.suptitle("A few large eigenvalues, a long tail: the tail is what truncation misses")
    return figure


def draw_memory(memory: pd.DataFrame) -> Figure:
    """Peak memory of a solve in parameter vectors against P: flat lines are O(P)."""
    figure, (axes,) = make_axes(8, 4.4)
    styles = {
        "nystrom, rank 10": ("Nyström, rank 10", PINK, "o"),
        "nystrom, rank 40": ("Nyström, rank 40", PINK, "^"),
    }
    for method, rows in memory.groupby("method", sort=False):
        name, colour, marker = styles.get(str(method)) or METHODS[str(method)]
        axes.plot(rows["parameters"], rows["vectors"], marker=marker, color=colour, label=name)
    _logarithmic(axes)
    axes.set_xlabel("number of parameters P")
    axes.set_ylabel("peak memory beyond the graph,\nin vectors of P numbers")
    axes.set_title("Memory of one solve: flat lines grow as P", loc="left")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _networks(rows: pd.DataFrame) -> list[str]:
    return sorted(rows["network"].unique(), key=lambda name: ("smc".find(name[0]), name))


def _title(rows: pd.DataFrame, network: str) -> str:
    curvature = "Hessian" if rows["curvature"].iloc[0] == "hessian" else "Gauss-Newton"
    return f"{network}, P = {rows['parameters'].iloc[0]:,}, {curvature}"


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _diagonal(axes: Axes) -> None:
    _logarithmic(axes)
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color=BLACK, linewidth=1)


def _legend(figure: Figure, panels: list[Axes]) -> None:
    found: dict[str, Artist] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    figure.legend(
        handles=list(found.values()),
        labels=list(found),
        loc="outside right center",
        frameon=False,
        fontsize=9,
    )
