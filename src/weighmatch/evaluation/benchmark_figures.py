"""Figures of the benchmark: accuracy against compute, and how much of the gap is closed."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weighmatch.evaluation.benchmark_tables import AGAINST
from weighmatch.evaluation.figures import ARM_COLOURS, ARM_NAMES, BLACK, make_plain
from weighmatch.evaluation.statistics import mean_interval
from weighmatch.evaluation.tables import CEILING

# Plain FixMatch, longer and longer: what weights have to lie above.
LONGER = AGAINST[:3]
MARKERS = ("o", "s", "^", "D", "v", "P", "<", "X", "p", ">", "h", "d", "8", "*", (4, 1, 0))
# Shares of the gap beyond these (%) are cut off.
MOST_SHOWN = 200.0


def draw_compute(benchmark: pd.DataFrame) -> Figure:
    """Test accuracy against the compute of a run, every arm, a panel a setting and ratio."""
    benchmark = _by_regime(benchmark)
    settings, ratios = (benchmark[name].unique().tolist() for name in ("setting", "ratio"))
    ratios.sort()
    width = max(8.0, 1.2 + 4.2 * len(ratios))
    figure = Figure(figsize=(width, 2.2 + 3.0 * len(settings)), layout="constrained")
    grid = figure.subplots(len(settings), len(ratios), squeeze=False, sharex=True, sharey="row")
    arms = _arms(benchmark)
    for row, setting in enumerate(settings):
        for axes, ratio in zip(grid[row], ratios, strict=True):
            make_plain(axes)
            cell = benchmark[(benchmark["setting"] == setting) & (benchmark["ratio"] == ratio)]
            _draw_panel(axes, cell, arms, float(benchmark["cost"].max()))
            axes.set_title(f"{setting}: {100 * ratio:.0f} % of the pool OOD", loc="left")
        grid[row][0].set_ylabel("test accuracy (%)")
        # An interval may reach beyond what an accuracy can be.
        grid[row][0].set_ylim(top=min(grid[row][0].get_ylim()[1], 101))
    grid[0][0].set_xlim(left=0)
    for axes in grid[-1]:
        axes.set_xlabel("compute of a run (1,000 steps of FixMatch)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    columns = int(width // 3.9)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    figure.suptitle(
        f"{_source(benchmark)}: what accuracy each arm buys with its compute\n"
        f"mean and 95 % interval over {_seeds(benchmark['seed'].nunique())}; "
        "arms of about the same compute side by side",
        fontsize=12,
    )
    return figure


def _draw_panel(
    axes: Axes, cell: pd.DataFrame, arms: list[tuple[str, int]], dearest: float
) -> None:
    longer = []
    rows = {
        pair: mine
        for pair in arms
        if len(mine := cell[(cell["arm"] == pair[0]) & (cell["stages"] == pair[1])])
    }
    costs = {pair: float(mine["cost"].mean()) for pair, mine in rows.items()}
    places = _side_by_side(costs, apart=0.018 * dearest)
    for (arm, stages), mine in rows.items():
        values = 100 * mine["accuracy"].to_numpy(np.float64)
        place = places[arm, stages] / 1000
        low, high = mean_interval(values)
        if low is not None and high is not None:
            axes.plot([place, place], [low, high], color=ARM_COLOURS[arm], linewidth=1.5, zorder=2)
        axes.plot(
            place,
            values.mean(),
            linestyle="none",
            label=_name(arm, stages),
            zorder=3,
            **_marker(arm, stages),
        )
        if arm in LONGER:
            longer.append((place, float(values.mean())))
    if len(longer) > 1:
        axes.plot(*zip(*longer, strict=True), color=BLACK, linewidth=1, linestyle=":", zorder=1)


def _side_by_side(
    costs: dict[tuple[str, int], float], apart: float
) -> dict[tuple[str, int], float]:
    """Where arms are drawn: those of about the same cost, whose intervals would coincide, apart."""
    places = {}
    for pair, cost in costs.items():
        alike = [other for other, theirs in costs.items() if abs(theirs - cost) < apart]
        places[pair] = cost + apart * (alike.index(pair) - (len(alike) - 1) / 2)
    return places


def draw_gap(comparison: pd.DataFrame) -> Figure:
    """Share of the way from FixMatch to the oracle that arms in rounds or with weights go.

    FixMatch is that at equal compute, or else, where that was not run, at equal steps.
    """
    comparison = _by_regime(comparison)
    reference = next(
        (arm for arm in (LONGER[1], LONGER[0]) if (comparison["against"] == arm).any()), LONGER[0]
    )
    rows = comparison[(comparison["against"] == reference) & comparison["gap_closed"].notna()]
    rows = rows[~rows["arm"].isin(["supervised", *LONGER])]
    cells = [tuple(c) for c in rows[["setting", "ratio"]].drop_duplicates().to_numpy()]
    arms = _arms(rows)
    figure = Figure(figsize=(8, 2.2 + len(cells) * (0.35 + 0.22 * len(arms))), layout="constrained")
    axes = figure.subplots()
    make_plain(axes)
    for number, (arm, stages) in enumerate(arms):
        mine = rows[(rows["arm"] == arm) & (rows["stages"] == stages)]
        offset = 0.7 * ((number + 0.5) / len(arms) - 0.5)
        for row in mine.to_dict("records"):
            place = cells.index((row["setting"], row["ratio"])) + offset
            ends = [100 * row["gap_closed_low"], 100 * row["gap_closed_high"]]
            axes.plot(ends, [place, place], color=ARM_COLOURS[arm], linewidth=2)
            axes.plot(100 * row["gap_closed"], place, **_marker(arm, stages))
        axes.plot([], [], label=_name(arm, stages), **_marker(arm, stages))
    for place, name in ((0, ARM_NAMES[reference]), (100, ARM_NAMES[CEILING])):
        axes.axvline(place, color=BLACK, linewidth=1, linestyle=":")
        axes.text(
            place,
            1.0,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    names = [f"{setting}\n{100 * ratio:.0f} % OOD" for setting, ratio in cells]
    axes.set_yticks(range(len(cells)), names)
    axes.set_ylim(max(len(cells), 1) - 0.5, -0.5)
    axes.set_xlim(*_limits(axes.get_xlim()))
    axes.set_xlabel("share of the gap closed (%)")
    if arms:
        figure.legend(
            loc="outside lower center", ncols=min(2, len(arms)), frameon=False, fontsize=9
        )
    seeds = int(comparison["seeds"].max()) if len(comparison) else 0
    figure.suptitle(
        f"{_source(comparison)}: how far arms go from FixMatch to the oracle\n"
        f"mean and 95 % bootstrap interval over {_seeds(seeds)}",
        fontsize=12,
    )
    return figure


def _by_regime(rows: pd.DataFrame) -> pd.DataFrame:
    """Where there are several regimes, the names of settings tell them apart."""
    if rows["regime"].nunique() < 2:
        return rows
    return rows.assign(setting=rows["setting"] + ", " + rows["regime"].str.replace("_", " "))


def _limits(found: tuple[float, float]) -> tuple[float, float]:
    """At least from FixMatch to the oracle; at most where intervals are cut off."""
    return max(min(found[0], -10.0), -MOST_SHOWN), min(max(found[1], 110.0), MOST_SHOWN)


def _arms(rows: pd.DataFrame) -> list[tuple[str, int]]:
    there = {(str(arm), int(stages)) for arm, stages in rows[["arm", "stages"]].to_numpy()}
    return [pair for arm in ARM_NAMES for pair in sorted(there) if pair[0] == arm]


def _marker(arm: str, stages: int) -> dict[str, Any]:
    """An arm's own colour and shape; hollow with more than one stage."""
    return {
        "marker": MARKERS[list(ARM_NAMES).index(arm) % len(MARKERS)],
        "color": ARM_COLOURS[arm],
        "markerfacecolor": ARM_COLOURS[arm] if stages == 1 else "white",
        "markersize": 8,
    }


def _name(arm: str, stages: int) -> str:
    if stages == 1:
        return ARM_NAMES[arm]
    return f"{ARM_NAMES[arm]}, {stages} {'stages' if stages == 2 else 'rounds'}"


def _source(rows: pd.DataFrame) -> str:
    return " and ".join(str(name) for name in rows["source"].unique()).capitalize()


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"
