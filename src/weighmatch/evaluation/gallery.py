"""Figures of images: samples of what training is given, and what an arm ranks high and low."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from weighmatch.arms import get_arm
from weighmatch.data.ood import OOD_KINDS
from weighmatch.evaluation.chosen import choose_run
from weighmatch.evaluation.judging import Arrays, Predictions

Images = NDArray[np.uint8]

IMAGES_PER_ROW = 12
UNKNOWN_COLOUR = "#999999"


def draw_samples(images: Mapping[str, Images], title: str) -> Figure:
    """Rows of images (n, C, H, W), each with its name; a kind of images also has its colour."""
    columns = max(len(part) for part in images.values())
    figure = Figure(figsize=(0.62 * columns + 2.2, 0.72 * len(images) + 0.6), layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False)
    kinds = {kind.name: kind for kind in OOD_KINDS}
    for row, (name, part) in zip(grid, images.items(), strict=True):
        kind = kinds.get(name)
        for axes, image in zip(row, part, strict=False):
            _show(axes, image, kind.colour if kind else "#000000")
        for axes in row[len(part) :]:
            axes.set_axis_off()
        label = kind.label.replace(" (", "\n(") if kind else name
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_gallery(
    runs: pd.DataFrame,
    predictions: Predictions,
    truth: Mapping[str, Arrays],
    images: Mapping[str, Arrays],
    per_side: int = 24,
) -> Figure:
    """The held-out images that a run ranks highest and lowest, framed by what they really are.

    The run is that of `choose_run`. A sentence stands in place of the images if the run ranks none.

    Args:
        runs: as in `judge_runs`.
        predictions: as in `judge_runs`.
        truth: as in `judge_runs`; without it frames are grey and no share of OOD is told.
        images: by key, `heldout_images` (n, C, H, W) uint8, if there are any.
        per_side: how many of the highest and of the lowest.
    """
    run = choose_run(runs)
    label, found = get_arm(run["arm"]).label, predictions[run["run"]]()
    scores = found.get("heldout_scores", np.zeros(0))
    if len(scores) == 0 or np.ptp(scores) == 0:
        figure = Figure(figsize=(9, 0.8))
        figure.suptitle(f"{label}: ranks no image", y=0.6, fontsize=11)
        return figure
    order = np.argsort(-scores, kind="stable")
    per_side = min(per_side, len(order) // 2)
    rows = -(-per_side // IMAGES_PER_ROW)
    figure = Figure(
        figsize=(0.72 * IMAGES_PER_ROW + 0.6, 0.98 * 2 * rows + 1.5), layout="constrained"
    )
    codes = truth.get(run["key"], {}).get("heldout_sources")
    halves: Any = figure.subfigures(2, 1, hspace=0.04)
    parts = {"trusted most": order[:per_side], "trusted least": order[-per_side:][::-1]}
    for half, (title, chosen) in zip(halves, parts.items(), strict=True):
        share = "" if codes is None else f", {100 * np.mean(codes[chosen] != 0):.0f} % OOD"
        half.suptitle(
            f"{label}: {title} ({_span(found['heldout_weights'][chosen])}){share}", fontsize=11
        )
        grid = half.subplots(rows, IMAGES_PER_ROW, squeeze=False).ravel()
        for axes in grid[len(chosen) :]:
            axes.set_axis_off()
        for axes, k in zip(grid, chosen, strict=False):
            colour = UNKNOWN_COLOUR if codes is None else OOD_KINDS[codes[k]].colour
            _show(axes, images[run["key"]]["heldout_images"][k], colour)
            axes.set_xlabel(f"{scores[k]:.2f}", fontsize=8, labelpad=2)
    if codes is not None:
        _name_kinds(figure, sorted(set(codes.tolist())))
    return figure


def _name_kinds(figure: Figure, codes: Sequence[int]) -> None:
    kinds = [OOD_KINDS[code] for code in codes]
    frames = [Patch(facecolor="white", edgecolor=kind.colour, linewidth=2) for kind in kinds]
    figure.legend(
        frames,
        [kind.label for kind in kinds],
        loc="outside lower center",
        ncols=len(kinds),
        frameon=False,
        fontsize=9,
    )


def _span(weights: NDArray[np.floating]) -> str:
    low, high = f"{weights.min():.2f}", f"{weights.max():.2f}"
    return f"weight {low}" if low == high else f"weights {low} to {high}"


def _show(axes: Axes, image: Images, colour: str) -> None:
    if image.shape[0] == 1:
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_edgecolor(colour)
        spine.set_linewidth(2)
