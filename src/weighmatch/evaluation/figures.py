"""Figures: one message each, readable without the text, in a palette safe for colour blindness."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from weighmatch.evaluation.statistics import mean_interval
from weighmatch.evaluation.tables import BASELINE, CEILING

# Okabe & Ito (2008).
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
RED, SKY, GREY, BLACK = "#D55E00", "#56B4E9", "#999999", "#000000"
# Tol (2021), muted: for what is more than eight.
INDIGO, WINE, OLIVE, SAND, PURPLE = "#332288", "#882255", "#999933", "#DDCC77", "#AA4499"
TEAL, BROWN = "#44AA99", "#661100"

ARM_NAMES = {
    "supervised": "supervised only",
    "fixmatch": "FixMatch",
    "fixmatch_matched": "FixMatch, learned arm's compute",
    "fixmatch_converged": "FixMatch, twice that compute",
    "fixmatch_realigned": "FixMatch, the other alignment",
    "fixmatch_rounds": "FixMatch restarted",
    "max_prob": "weights = confidence",
    "softmatch": "SoftMatch",
    "energy": "weights by energy",
    "pu": "weights = labelled-vs-pool classifier",
    "inlier": "inlier filter (one-vs-all heads)",
    "ds3l": "one-step weights on the softmax vector",
    "free": "a free weight an image",
    "learned": "learned weights",
    "oracle": "oracle (OOD removed)",
}
ARM_COLOURS = {
    "supervised": GREY,
    "fixmatch": BLUE,
    "fixmatch_matched": SKY,
    "fixmatch_converged": BLACK,
    "fixmatch_realigned": BROWN,
    "fixmatch_rounds": TEAL,
    "max_prob": ORANGE,
    "softmatch": SAND,
    "energy": OLIVE,
    "pu": PINK,
    "inlier": INDIGO,
    "ds3l": PURPLE,
    "free": WINE,
    "learned": RED,
    "oracle": GREEN,
}
SOURCE_NAMES = {
    "id": "in-distribution",
    "unseen": "unseen classes (OOD)",
    "patches": "photograph patches (OOD)",
    "noise": "noise (OOD)",
}
SOURCE_COLOURS = {"id": GREEN, "unseen": RED, "patches": PINK, "noise": ORANGE}


def make_axes(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `width` by `height` inches with `columns` plain panels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)[0]
    for axes in grid:
        make_plain(axes)
    return figure, list(grid)


def make_plain(axes: Axes) -> None:
    """Two spines and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _in_order(arms: Sequence[str]) -> list[str]:
    return [arm for arm in ARM_NAMES if arm in set(arms)]


def draw_accuracy(scores: pd.DataFrame) -> Figure:
    """Test accuracy of each arm: seeds as dots, mean and 95 % interval."""
    arms = _in_order(scores["arm"].unique().tolist())
    figure, (axes,) = make_axes(8, 0.5 * len(arms) + 1.4)
    for row, arm in enumerate(reversed(arms)):
        values = scores.loc[scores["arm"] == arm, "accuracy"].to_numpy(np.float64)
        _dots_and_interval(axes, row, values, ARM_COLOURS[arm])
    axes.set_yticks(range(len(arms)), [ARM_NAMES[arm] for arm in reversed(arms)])
    axes.set_xlabel("accuracy on test images of seen classes (%)")
    # An interval may reach beyond what an accuracy can be.
    axes.set_xlim(right=min(axes.get_xlim()[1], 101))
    seeds = scores["seed"].nunique()
    axes.set_title(
        f"Test accuracy: mean and 95 % interval over {_count(seeds, 'seed')}", loc="left"
    )
    return figure


def draw_differences(scores: pd.DataFrame) -> Figure:
    """Each arm's accuracy minus FixMatch's on the same seed."""
    wide = scores.pivot(index="seed", columns="arm", values="accuracy")
    arms = [arm for arm in _in_order(list(wide.columns)) if arm != BASELINE and BASELINE in wide]
    figure, (axes,) = make_axes(8, 0.5 * len(arms) + 1.6)
    for row, arm in enumerate(reversed(arms)):
        values = (wide[arm] - wide[BASELINE]).dropna().to_numpy(np.float64)
        _dots_and_interval(axes, row, values, ARM_COLOURS[arm])
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set_yticks(range(len(arms)), [ARM_NAMES[arm] for arm in reversed(arms)])
    axes.set_xlabel("accuracy minus FixMatch's on the same seed (points)")
    axes.set_title("Difference to FixMatch at equal steps: mean and 95 % interval", loc="left")
    return figure


def _dots_and_interval(axes: Axes, row: int, values: NDArray[np.float64], colour: str) -> None:
    # Beside the interval, not on it; by rank, so that equal values do not hide each other.
    ranks = values.argsort(kind="stable").argsort(kind="stable")
    offsets = 0.14 + 0.1 * (ranks % 3)
    axes.scatter(
        values, row + offsets, s=20, color=colour, edgecolors="white", linewidths=0.6, zorder=2
    )
    low, high = mean_interval(values)
    if low is not None and high is not None:
        axes.plot([low, high], [row, row], color=colour, linewidth=2.5, zorder=1)
    axes.scatter(
        [values.mean()], [row], s=70, marker="D", color=colour, edgecolors="white", zorder=3
    )


def draw_weights(trace: pd.DataFrame) -> Figure:
    """Mean weight of each source of pool images through training, a panel a weighted arm."""
    varying = trace.groupby("arm")["weight"].agg(lambda w: float(np.ptp(w)))
    arms = _in_order([str(arm) for arm in varying[varying > 1e-6].index])
    figure, panels = make_axes(4.2 * max(len(arms), 1), 3.6, max(len(arms), 1))
    highest = 1.0
    for axes, arm in zip(panels, arms, strict=False):
        mine = trace[trace["arm"] == arm].assign(
            share=lambda t: t["step"] / t.groupby("seed")["step"].transform("max")
        )
        for source in [s for s in SOURCE_NAMES if s in set(mine["source"])]:
            wide = mine[mine["source"] == source].pivot(
                index="share", columns="seed", values="weight"
            )
            mean = wide.mean(axis=1)
            highest = max(highest, float(wide.to_numpy().max()))
            colour = SOURCE_COLOURS[source]
            low, high = wide.min(axis=1), wide.max(axis=1)
            # One snapshot has neither line nor band.
            marker = "o" if len(wide) == 1 else None
            axes.plot(
                100 * wide.index, mean, marker=marker, color=colour, label=SOURCE_NAMES[source]
            )
            axes.fill_between(100 * wide.index, low, high, color=colour, alpha=0.15)
            if len(wide) == 1:
                axes.vlines(100 * wide.index, low, high, color=colour, alpha=0.5)
        axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
        axes.set_title(ARM_NAMES[arm], loc="left")
        axes.set_xlabel("training done (%)")
    for axes in panels:
        axes.set_ylim(0, 1.05 * highest)
    panels[0].set_ylabel("mean weight (1: plain FixMatch)")
    if arms:
        panels[0].legend(frameon=False, loc="lower left", fontsize=9)
    figure.suptitle(
        "Which pool images are weighed up: mean over seeds, band from lowest to highest seed"
    )
    return figure


def draw_auroc(scores: pd.DataFrame) -> Figure:
    """How well weights and confidence tell held-out in-distribution images from OOD ones."""
    arms = _in_order(scores["arm"].unique().tolist())
    arms = [arm for arm in arms if arm not in ("supervised", CEILING)]
    figure, (axes,) = make_axes(8, 0.6 * len(arms) + 1.6)
    columns = (
        ("auroc_weight", RED, "weight"),
        ("auroc_confidence", BLUE, "classifier's confidence"),
    )
    named: set[str] = set()
    for row, arm in enumerate(reversed(arms)):
        for shift, (column, colour, name) in zip((0.16, -0.16), columns, strict=True):
            values = scores.loc[scores["arm"] == arm, column].dropna().to_numpy(np.float64)
            # Weights that are all the same rank nothing.
            if len(values) == 0 or (column == "auroc_weight" and (values == 0.5).all()):
                continue
            low, high = mean_interval(values)
            if low is not None and high is not None:
                axes.plot([low, high], [row + shift] * 2, color=colour, linewidth=2)
            label = None if name in named else name
            named.add(name)
            axes.scatter([values.mean()], [row + shift], color=colour, s=45, label=label, zorder=3)
    axes.axvline(0.5, color=BLACK, linewidth=1, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_yticks(range(len(arms)), [ARM_NAMES[arm] for arm in reversed(arms)])
    axes.set_xlabel("AUROC, in-distribution against OOD, held-out images (0.5 = chance)")
    axes.set_title("What tells new OOD images apart: mean and 95 % interval", loc="left")
    if arms:
        axes.legend(frameon=False, loc="upper left", fontsize=9)
    return figure


def draw_calibration(calibration: pd.DataFrame) -> Figure:
    """Reliability diagram: accuracy against confidence."""
    figure, (axes,) = make_axes(5.2, 4.6)
    axes.plot([0, 1], [0, 1], color=BLACK, linewidth=0.8, linestyle=":", label="calibrated")
    for arm in _in_order(calibration["arm"].unique().tolist()):
        bins = calibration[(calibration["arm"] == arm) & (calibration["count"] >= 10)]
        bins = bins.sort_values("confidence")
        axes.plot(
            bins["confidence"],
            bins["accuracy"],
            marker="o",
            markersize=4,
            color=ARM_COLOURS[arm],
            label=ARM_NAMES[arm],
        )
    axes.set_xlim(0.1, 1.01)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("confidence on test images")
    axes.set_ylabel("share classified rightly")
    axes.set_title("Calibration (bins of at least 10 images)", loc="left")
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_samples(images: dict[str, NDArray[np.uint8]], title: str) -> Figure:
    """Rows of images (n, C, H, W), one row a source, each named with its frame's colour."""
    columns = max(len(part) for part in images.values())
    figure = Figure(figsize=(0.62 * columns + 2.2, 0.72 * len(images) + 0.6), layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False)
    for row, (name, part) in enumerate(images.items()):
        colour = SOURCE_COLOURS.get(name, BLACK)
        for column, axes in enumerate(grid[row]):
            if column < len(part):
                _show(axes, part[column], colour)
            else:
                axes.set_axis_off()
        grid[row][0].set_ylabel(
            SOURCE_NAMES.get(name, name).replace(" (", "\n("),
            rotation=0,
            ha="right",
            va="center",
            fontsize=9,
        )
    figure.suptitle(title, fontsize=11)
    return figure


def draw_gallery(
    images: NDArray[np.uint8],
    scores: NDArray[np.float64],
    weights: NDArray[np.float64],
    sources: Sequence[str],
    arm: str,
    per_side: int = 24,
) -> Figure:
    """The images ranked highest and lowest by their scores, framed by what they really are.

    Where all scores are the same, a sentence in their place.

    Args:
        images: (n, C, H, W) uint8.
        scores: what ranks them and is written below them, (n,).
        weights: what follows from the scores, (n,); the titles name them.
        sources: of each, names of `SOURCE_NAMES`.
        arm: whose scores they are; the titles name it.
        per_side: how many of the highest and of the lowest.
    """
    if np.ptp(scores) == 0:
        figure = Figure(figsize=(9, 0.8))
        figure.suptitle(f"{ARM_NAMES[arm]}: ranks no image", y=0.6, fontsize=11)
        return figure
    order = np.argsort(-scores, kind="stable")
    per_side = min(per_side, len(order) // 2)
    columns = 12
    rows_each = -(-per_side // columns)
    figure = Figure(
        figsize=(0.72 * columns + 0.6, 0.98 * 2 * rows_each + 1.5), layout="constrained"
    )
    halves: Any = figure.subfigures(2, 1, hspace=0.04)
    parts = {"weighed up most": order[:per_side], "weighed down most": order[-per_side:][::-1]}
    for half, (title, chosen) in zip(halves, parts.items(), strict=True):
        ood = float(np.mean([sources[k] != "id" for k in chosen]))
        half.suptitle(
            f"{ARM_NAMES[arm]}: {title} ({_span(weights[chosen])}), {100 * ood:.0f} % OOD",
            fontsize=11,
        )
        grid = half.subplots(rows_each, columns, squeeze=False).ravel()
        for axes in grid[len(chosen) :]:
            axes.set_axis_off()
        for axes, k in zip(grid, chosen, strict=False):
            _show(axes, images[k], SOURCE_COLOURS[sources[k]])
            axes.set_xlabel(f"{scores[k]:.2f}", fontsize=8, labelpad=2)
    present = [name for name in SOURCE_NAMES if name in set(sources)]
    handles = [_frame_handle(SOURCE_COLOURS[name]) for name in present]
    figure.legend(
        handles,
        [SOURCE_NAMES[name] for name in present],
        loc="outside lower center",
        ncols=len(present),
        frameon=False,
        fontsize=9,
    )
    return figure


def _span(weights: NDArray[np.float64]) -> str:
    low, high = f"{weights.min():.2f}", f"{weights.max():.2f}"
    return f"weight {low}" if low == high else f"weights {low} to {high}"


def _frame_handle(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor="white", edgecolor=colour, linewidth=2)


def _show(axes: Axes, image: NDArray[np.uint8], colour: str) -> None:
    if image.shape[0] == 1:
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_edgecolor(colour)
        spine.set_linewidth(2)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
