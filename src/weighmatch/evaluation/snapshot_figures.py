"""Figure of the snapshot study: what the influence of pool images is worth, by damping."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
from weighmatch.evaluation.statistics import mean_interval
from weighmatch.evaluation.study_figures import over_seeds

# One a stage, in the order of training.
COLOURS = (ORANGE, GREEN, BLUE, PINK, RED, SKY, BLACK)
SCORES = {"dot": "Influence", "cosine": "Influence over the last layer's gradient norm"}
# Between the intervals of two stages, as a share of the distance between two dampings.
DODGE = 0.08


def draw_influence(table: pd.DataFrame) -> Figure:
    """AUROC of the influence against damping: a line a stage, conjugate gradients dashed.

    Args:
        table: of `weighmatch.studies.snapshots.influence_quality`, seeds stacked.
    """
    names = [name for name in SCORES if name in set(table["score"])]
    figure, panels = make_axes(5.0 * len(names) + 3.4, 4.8, len(names))
    ratios = sorted(table["damping_ratio"].unique())
    for axes, name in zip(panels, names, strict=True):
        _draw_score(axes, table[table["score"] == name], ratios)
        axes.set_title(SCORES[name], loc="left", fontsize=10)
        axes.set_xlabel("damping δ / largest eigenvalue of the curvature")
        axes.set_xticks(_positions(ratios), [_ratio_name(ratio) for ratio in ratios])
        axes.sharey(panels[0])
    panels[0].set_ylabel("AUROC, in-distribution against OOD pool images\n(0.5 = chance)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    seeds = over_seeds(table)
    intervals = "" if table["seed"].nunique() == 1 else ", mean and 95 % interval"
    figure.suptitle(f"How influence on frozen FixMatch snapshots ranks the pool{intervals}{seeds}")
    return figure


def _draw_score(axes: Axes, rows: pd.DataFrame, ratios: list[float]) -> None:
    stages = sorted(rows["stage"].unique())
    axes.axhline(0.5, color=GREY, linewidth=1)
    for rank, stage in enumerate(stages):
        mine = rows[rows["stage"] == stage]
        colour = COLOURS[rank % len(COLOURS)]
        shift = DODGE * (rank - (len(stages) - 1) / 2)
        places = {ratio: x + shift for ratio, x in zip(ratios, _positions(ratios), strict=True)}
        for solver in sorted(set(mine["solver"]) - {"identity"}, reverse=True):  # "exact" first
            # No curvature is where every solver's line ends.
            line = mine[mine["solver"].isin([solver, "identity"])]
            mean = line.groupby("damping_ratio")["auroc"].mean()
            exact = solver == "exact"
            axes.plot(
                [places[ratio] for ratio in mean.index],
                mean,
                "-" if exact else "--",
                marker="o" if exact else None,
                markersize=5,
                color=colour,
                label=f"{_stage_name(mine, stage)}, {_solver_name(solver)}",
            )
            if exact:
                _draw_intervals(axes, line, places, colour)
        axes.axhline(
            mine["auroc_confidence"].mean(),
            color=colour,
            linewidth=1.2,
            linestyle=":",
            label="   confidence of the pseudo-label instead",
        )


def _draw_intervals(
    axes: Axes, rows: pd.DataFrame, places: dict[float, float], colour: str
) -> None:
    for ratio, place in places.items():
        values = rows.loc[rows["damping_ratio"] == ratio, "auroc"].to_numpy(np.float64)
        low, high = mean_interval(values)
        if low is not None and high is not None:
            axes.plot([place, place], [low, high], color=colour, linewidth=1.2, alpha=0.6)


def _positions(ratios: list[float]) -> list[float]:
    """Powers of ten of the ratios; one beyond the others for 0 and for no curvature."""
    finite = [math.log10(ratio) for ratio in ratios if 0 < ratio < math.inf] or [0.0]
    ends = {0.0: min(finite) - 1, math.inf: max(finite) + 1}
    return [ends[ratio] if ratio in ends else math.log10(ratio) for ratio in ratios]


def _ratio_name(ratio: float) -> str:
    if ratio == 0:
        return "weight\ndecay only"
    return "no\ncurvature" if math.isinf(ratio) else f"{ratio:g}"


def _stage_name(rows: pd.DataFrame, stage: float) -> str:
    accuracy = rows.drop_duplicates("seed")["accuracy_test_seen"].mean()
    return f"{100 * stage:g} % of training (accuracy {accuracy:.0f} %)"


def _solver_name(solver: str) -> str:
    return "exact" if solver == "exact" else f"CG, {solver.removeprefix('cg')} products"
