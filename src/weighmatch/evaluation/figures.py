"""Figures of the arms: one message each, readable without the text, safe for colour blindness.

A job of one cell has one panel, a job of several cells a panel each. `scores` come from
`judge_runs`, `trace` from `trace_weights`, `calibration` from `calibration_table` and `comparison`
from `compare_arms`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from weighmatch.arms import FIXMATCH, ORACLE, Arm, all_arms, arm_names, get_arm
from weighmatch.checks import counted
from weighmatch.data.ood import OOD_KINDS
from weighmatch.evaluation.statistics import mean_interval
from weighmatch.evaluation.tables import (
    ONLINE,
    Accuracies,
    Series,
    accuracies,
    by_cell,
    label_series,
    of_series,
    overlap_of,
)

# Okabe & Ito (2008).
# How something is drawn: arguments of matplotlib.
Marks = dict[str, Any]


BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
RED, SKY, GREY, BLACK = "#D55E00", "#56B4E9", "#999999", "#000000"

# Inches and letters by which a panel and its labels are readable on a phone.
WIDTH, LABEL_WIDTH = 6.2, 20
MARKERS = ("o", "s", "^", "D", "v", "P", "<", "X", "p", ">", "h", "d", "8", "*", (4, 1, 0))
# Shares of the gap beyond these (%) are cut off.
MAX_GAP_SHOWN = 200.0


def make_axes(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `width` by `height` inches with `columns` plain panels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, make_grid(figure, 1, columns)


def make_grid(figure: Figure, rows: int, columns: int, **shared: Any) -> list[Axes]:
    """Plain panels in `rows` and `columns`, row by row."""
    panels: list[Axes] = figure.subplots(rows, columns, squeeze=False, **shared).ravel().tolist()
    for axes in panels:
        make_plain(axes)
    return panels


def make_plain(axes: Axes) -> None:
    """Two spines and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _name(owner: Axes | Figure, panels: Sequence[Axes], **where: Any) -> None:
    """A legend with each name once, whichever of the panels it comes from; none without a name."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        style = {"frameon": False, "fontsize": 9, **where}
        owner.legend(list(handles.values()), list(handles), **style)


def _panel_a_cell(
    table: pd.DataFrame, width: float, height: float, message: str
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Up to two panels side by side; the message is the title of a single one, or of all."""
    cells = by_cell(table) or [("", table)]
    columns = min(len(cells), 2)
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = make_grid(figure, rows, columns, sharey=True)
    for axes in panels[len(cells) :]:
        axes.remove()
    for axes, (title, _) in zip(panels, cells, strict=False):
        axes.set_title(title if len(cells) > 1 else message, loc="left")
    if len(cells) > 1:
        figure.suptitle(message)
    return figure, [(axes, rows) for axes, (_, rows) in zip(panels, cells, strict=False)]


def draw_accuracy(scores: pd.DataFrame) -> Figure:
    """Test accuracy of each arm: seeds as dots, mean and 95 % interval."""
    seeds = counted(scores["seed"].nunique(), "seed")
    message = f"Test accuracy: mean and 95 % interval over {seeds}"
    figure = _draw_seeds(scores, lambda arms: arms, message)
    for axes in figure.axes:
        axes.set_xlabel("accuracy on test images of seen classes (%)")
        # An interval may reach beyond what an accuracy can be.
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -1), min(high, 101))
    return figure


def draw_differences(scores: pd.DataFrame, against: Arm = FIXMATCH) -> Figure:
    """Accuracy of each arm minus that of another one on the same seed."""
    baseline = (against.name, ONLINE)

    def minus_baseline(arms: Accuracies) -> Accuracies:
        if baseline not in arms:
            return {}
        others = {series: accuracy for series, accuracy in arms.items() if series != baseline}
        return {series: (mine - arms[baseline]).dropna() for series, mine in others.items()}

    message = "Differences: mean and 95 % interval"
    figure = _draw_seeds(scores, minus_baseline, message)
    for axes in figure.axes:
        axes.axvline(0, color=BLACK, linewidth=1)
        axes.set_xlabel(f"accuracy minus that of\n{against.label} (points)")
    return figure


def _draw_seeds(
    scores: pd.DataFrame, values: Callable[[Accuracies], Accuracies], message: str
) -> Figure:
    """A row an arm and schedule with what `values` makes of the accuracies of a cell."""
    found = [values(accuracies(rows)) for _, rows in by_cell(scores)]
    labels = {
        series: label
        for series, label in label_series(scores).items()
        if any(len(cell.get(series, ())) for cell in found)
    }
    figure, panels = _panel_a_cell(scores, WIDTH, 0.5 * len(labels) + 1.5, message)
    for (axes, _), cell in zip(panels, found, strict=True):
        for row, series in enumerate(reversed(labels)):
            if len(cell.get(series, ())):
                colour = get_arm(series[0]).colour
                _dots_and_interval(axes, row, cell[series].to_numpy(), colour, overlap_of(scores))
        axes.set_yticks(range(len(labels)), _wrapped(reversed(labels.values())))
    return figure


def _wrapped(labels: Iterable[str]) -> list[str]:
    """Labels on lines so short that a panel is readable on a phone."""
    return ["\n".join(wrap(label, LABEL_WIDTH)) for label in labels]


def _dots_and_interval(
    axes: Axes, row: int, values: NDArray[np.floating], colour: str, overlap: float
) -> None:
    # Beside the interval, not on it; by rank, so that equal values do not hide each other.
    ranks = values.argsort(kind="stable").argsort(kind="stable")
    offsets = 0.14 + 0.1 * (ranks % 3)
    dots: Marks = {"color": colour, "edgecolors": "white"}
    axes.scatter(values, row + offsets, s=20, linewidths=0.6, zorder=2, **dots)
    axes.plot(_interval(values, overlap), [row, row], color=colour, linewidth=2.5, zorder=1)
    axes.scatter([values.mean()], [row], s=70, marker="D", zorder=3, **dots)


def _interval(values: NDArray[np.floating], overlap: float = 0.0) -> list[float]:
    """The ends of the 95 % interval of a mean; NaN, which is not drawn, for a single value."""
    return [np.nan if end is None else end for end in mean_interval(values, overlap)]


def draw_weights(trace: pd.DataFrame) -> Figure:
    """Mean weight of each kind of pool images through training, for arms whose weights vary."""
    spread = trace.groupby(["arm", "schedule"])["weight"].agg(lambda w: float(np.ptp(w)))
    labels = {s: label for s, label in label_series(trace).items() if spread[s] > 1e-6}
    cells = by_cell(trace)
    columns, rows = max(len(labels), 1), max(len(cells), 1)
    if rows == 1:
        columns, rows = 1, columns
    width = 4.2 * columns if columns > 1 else WIDTH
    figure = Figure(figsize=(width, 3.2 * rows), layout="constrained")
    panels = make_grid(figure, rows, columns, sharey=True)
    places = [(title, cell, series) for title, cell in cells for series in labels]
    for axes, (title, cell, series) in zip(panels, places, strict=False):
        _draw_trace(axes, of_series(cell, series))
        where = f"\n{title}" if len(cells) > 1 else ""
        axes.set_title(f"{labels[series]}{where}", loc="left")
        axes.set_xlabel("training done (%)")
    highest = max([1.0, *(axes.dataLim.y1 for axes in panels[: len(places)])])
    panels[0].set_ylim(0, 1.05 * highest)
    for axes in panels[::columns]:
        axes.set_ylabel("mean weight (1: plain FixMatch)")
    _name(panels[0], panels, loc="upper left")
    figure.suptitle(
        "Which pool images are weighed up:\nmean over seeds, band from lowest to highest",
        fontsize=11,
    )
    return figure


def _draw_trace(axes: Axes, trace: pd.DataFrame) -> None:
    last = trace.groupby("seed")["step"].transform("max")
    trace = trace.assign(share=100 * trace["step"] / last)
    for kind in OOD_KINDS:
        mine = trace[trace["kind"] == kind.name]
        if mine.empty:
            continue
        over_seeds = mine.groupby("share")["weight"].agg(["min", "mean", "max"])
        share, (low, mean, high) = over_seeds.index.to_numpy(), over_seeds.to_numpy().T
        # One snapshot has neither line nor band.
        marker = "o" if len(share) == 1 else None
        axes.plot(share, mean, marker=marker, color=kind.colour, label=kind.label)
        axes.fill_between(share, low, high, color=kind.colour, alpha=0.15)
        if len(share) == 1:
            axes.vlines(share, low, high, color=kind.colour, alpha=0.5)
    axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")


def draw_auroc(scores: pd.DataFrame) -> Figure:
    """How well weights and confidence tell held-out in-distribution images from OOD ones.

    Arms that were not trained on the whole pool are left out.
    """
    labels = label_series(scores)
    labels = {series: labels[series] for series in labels if get_arm(series[0]).pool == "whole"}
    message = "What tells new OOD images apart: 95 % intervals"
    figure, panels = _panel_a_cell(scores, WIDTH, 0.6 * len(labels) + 1.6, message)
    for axes, cell in panels:
        _draw_aurocs(axes, cell, list(reversed(labels)))
        axes.axvline(0.5, color=BLACK, linewidth=1, linestyle=":")
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(labels) - 0.4)
        axes.set_yticks(range(len(labels)), _wrapped(reversed(labels.values())))
        axes.set_xlabel("AUROC on held-out images (0.5 = chance)")
    _name(panels[0][0], [axes for axes, _ in panels], loc="upper left")
    return figure


def _draw_aurocs(axes: Axes, cell: pd.DataFrame, rows: list[Series]) -> None:
    for column, colour, name, shift in (
        ("auroc_weight", RED, "weight", 0.16),
        ("auroc_confidence", BLUE, "classifier's confidence", -0.16),
    ):
        means = {}
        for row, series in enumerate(rows):
            values = of_series(cell, series)[column].dropna().to_numpy()
            # Weights that are all the same rank nothing.
            if len(values) and not (column == "auroc_weight" and (values == 0.5).all()):
                means[row + shift] = values.mean()
                axes.plot(_interval(values), [row + shift] * 2, color=colour, linewidth=2)
        if means:
            axes.scatter(
                list(means.values()), list(means), color=colour, s=45, label=name, zorder=3
            )


def draw_calibration(calibration: pd.DataFrame) -> Figure:
    """Reliability diagram: accuracy against confidence."""
    message = "Calibration (bins of at least 10 images)"
    figure, panels = _panel_a_cell(calibration, 5.2, 4.6, message)
    for axes, cell in panels:
        axes.plot([0, 1], [0, 1], color=BLACK, linewidth=0.8, linestyle=":", label="calibrated")
        full = cell[cell["count"] >= 10].sort_values("confidence")
        for series, label in label_series(calibration).items():
            bins, colour = of_series(full, series), get_arm(series[0]).colour
            marks: Marks = {"marker": "o", "markersize": 4, "color": colour}
            axes.plot(bins["confidence"], bins["accuracy"], label=label, **marks)
        axes.set_xlim(0.1, 1.01)
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("confidence on test images")
        axes.set_ylabel("share classified rightly")
    _name(panels[0][0], [axes for axes, _ in panels], fontsize=8)
    return figure


def draw_compute(scores: pd.DataFrame) -> Figure:
    """Test accuracy of every arm against the compute of a run, a column of panels a ratio."""
    cells, labels = by_cell(scores), label_series(scores)
    columns = scores["ratio"].nunique(dropna=False)
    rows = -(-len(cells) // columns)
    width = max(8.0, 1.2 + 4.2 * columns)
    figure = Figure(figsize=(width, 2.2 + 3.0 * rows), layout="constrained")
    panels = make_grid(figure, rows, columns, sharex=True, sharey="row")
    for axes, (title, cell) in zip(panels, cells, strict=False):
        _draw_costs(axes, cell, labels, apart=0.018 * float(scores["cost"].max()))
        axes.set_title(title, loc="left")
    for axes in panels[::columns]:
        axes.set_ylabel("test accuracy (%)")
        # An interval may reach beyond what an accuracy can be.
        axes.set_ylim(top=min(axes.get_ylim()[1], 101))
    panels[0].set_xlim(left=0)
    for axes in panels[-columns:]:
        axes.set_xlabel("compute of a run (1,000 steps of FixMatch)")
    _name(figure, panels, loc="outside lower center", ncols=int(width // 3.9))
    figure.suptitle(
        f"{_sources(scores)}: what accuracy each arm buys with its compute\n"
        f"mean and 95 % interval over {counted(scores['seed'].nunique(), 'seed')}; "
        "arms of about the same compute side by side",
        fontsize=12,
    )
    return figure


def _draw_costs(axes: Axes, cell: pd.DataFrame, labels: Mapping[Series, str], apart: float) -> None:
    found = {series: mine for series, mine in accuracies(cell).items() if len(mine)}
    costs = {s: float(of_series(cell, s)["cost"].mean()) for s in labels if s in found}
    longer = []
    for series, place in _side_by_side(costs, apart).items():
        values, arm = found[series].to_numpy(), get_arm(series[0])
        ends = _interval(values, overlap_of(cell))
        axes.plot([place, place], ends, color=arm.colour, linewidth=1.5, zorder=2)
        axes.plot(place, values.mean(), label=labels[series], zorder=3, **_marker(series))
        if _is_plain(arm):
            longer.append((place, values.mean()))
    if len(longer) > 1:
        axes.plot(*zip(*longer, strict=True), color=BLACK, linewidth=1, linestyle=":", zorder=1)


def _is_plain(arm: Arm) -> bool:
    """Whether it is FixMatch, trained longer or not, and otherwise unchanged."""
    whole = arm.pool == "whole" and not arm.weighs
    return whole and arm.alignment == "as_set" and arm.schedules == (ONLINE,)


def _side_by_side(costs: Mapping[Series, float], apart: float) -> dict[Series, float]:
    """The places of arms, in 1,000 steps: those of about the same cost lie `apart` steps apart."""
    places = {}
    for series, cost in costs.items():
        alike = [other for other, theirs in costs.items() if abs(theirs - cost) < apart]
        shift = alike.index(series) - (len(alike) - 1) / 2
        places[series] = (cost + apart * shift) / 1000
    return places


def draw_gap(comparison: pd.DataFrame) -> Figure:
    """Share of the way from FixMatch to the oracle that arms in rounds or with weights go.

    FixMatch has the same compute or, where that was not run, as many steps.
    """
    plain = [arm for arm in all_arms() if _is_plain(arm)]
    matched = [arm for arm in plain if arm.compute == "matched"]
    there = [arm for arm in matched if (comparison["against"] == arm.name).any()]
    reference = (*there, FIXMATCH)[0]
    left_out = [arm.name for arm in all_arms() if arm in plain or arm.pool == "none"]
    rows = comparison[comparison["against"] == reference.name].dropna(subset="gap_closed")
    rows = rows[~rows["arm"].isin(left_out)]
    cells, labels = by_cell(rows), label_series(rows)
    figure, (axes,) = make_axes(8, 2.2 + len(cells) * (0.35 + 0.22 * len(labels)))
    for number, (series, label) in enumerate(labels.items()):
        offset = 0.7 * ((number + 0.5) / len(labels) - 0.5)
        for position, (_, cell) in enumerate(cells):
            shares = (
                100 * of_series(cell, series)[["gap_closed_low", "gap_closed_high", "gap_closed"]]
            )
            for low, high, share in shares.to_numpy():
                places = [position + offset] * 2
                axes.plot([low, high], places, color=get_arm(series[0]).colour, linewidth=2)
                axes.plot(share, places[0], **_marker(series))
        axes.plot([], [], label=label, **_marker(series))
    for place, arm in ((0, reference), (100, ORACLE)):
        axes.axvline(place, color=BLACK, linewidth=1, linestyle=":")
        above: Marks = {
            "transform": axes.get_xaxis_transform(),
            "ha": "center",
            "va": "bottom",
        }
        axes.text(place, 1.0, arm.label, fontsize=8, **above)
    axes.set_yticks(range(len(cells)), ["\n".join(title.rsplit(": ", 1)) for title, _ in cells])
    axes.set_ylim(max(len(cells), 1) - 0.5, -0.5)
    # At least from FixMatch to the oracle; at most where intervals are cut off.
    low, high = axes.get_xlim()
    axes.set_xlim(max(min(low, -10.0), -MAX_GAP_SHOWN), min(max(high, 110.0), MAX_GAP_SHOWN))
    axes.set_xlabel("share of the gap closed (%)")
    _name(figure, [axes], loc="outside lower center", ncols=min(2, len(labels)))
    seeds = int(comparison["seeds"].max()) if len(comparison) else 0
    figure.suptitle(
        f"{_sources(comparison)}: how far arms go from FixMatch to the oracle\n"
        f"mean and 95 % bootstrap interval over {counted(seeds, 'seed')}",
        fontsize=12,
    )
    return figure


def _marker(series: Series) -> Marks:
    """An arm's own colour and shape; hollow if it is not trained online."""
    name, schedule = series
    colour = get_arm(name).colour
    return {
        "marker": MARKERS[arm_names().index(name) % len(MARKERS)],
        "linestyle": "none",
        "color": colour,
        "markerfacecolor": colour if schedule == ONLINE else "white",
        "markersize": 8,
    }


def _sources(table: pd.DataFrame) -> str:
    return " and ".join(str(name) for name in table["source"].unique()).capitalize()
