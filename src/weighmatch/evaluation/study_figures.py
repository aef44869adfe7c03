"""What the figures of all studies share: marks of methods, lines with labels, legends, seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from weighmatch.studies.methods import HypergradientMethod

# Lines that come nowhere further apart than this, as a share of a panel's sides, hide each other.
HIDDEN = 0.012
# Height of a label's line, in inches; and what leads from a line's end to its label.
LABEL_HEIGHT = 0.145
LEADER = {"arrowstyle": "-", "linewidth": 0.7, "linestyle": ":", "relpos": (0, 0.5), "shrinkB": 3}


@dataclass(frozen=True)
class Line:
    """A method's line in a panel: places (n,) and (n,), and what differs from its usual look."""

    method: HypergradientMethod
    x: NDArray[np.floating[Any]]
    y: NDArray[np.floating[Any]]
    look: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What is written at the line."""
        return self.look.get("label", self.method.label)


def plot_method(axes: Axes, method: HypergradientMethod, x: Any, y: Any, **style: Any) -> None:
    """A line, or points, with the method's colour, marker and label."""
    own = {"marker": method.marker, "color": method.colour, "label": method.label}
    axes.plot(x, y, **{**own, **style})


def plot_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Lines that are labelled at their ends, right of the panel.

    Of lines that lie on one another the first is broad and the others are dashed, each with
    smaller marks, so that all are seen. The scales and limits of the panel must be set before.
    """
    places = [_on_panel(axes, line) for line in lines]
    for number, line in enumerate(lines):
        alike = [k for k, other in enumerate(places) if _hides(places[number], other)]
        rank, above = alike.index(number), len(alike) - 1 - alike.index(number)
        broad = {"markersize": 4.5 + 2.5 * above, "linewidth": 1.3 + 1.5 * above}
        dashes = {"dashes": (3, 2)} if rank else {}
        plot_method(axes, line.method, line.x, line.y, **broad, **dashes, **line.look)
    ends = [float(place[-1, 1]) for place in places]
    box = axes.get_position()
    height = box.height * axes.get_figure().get_size_inches()[1]  # type: ignore[union-attr]
    for line, place in zip(lines, spread(ends, LABEL_HEIGHT / height), strict=True):
        axes.annotate(
            line.label,
            (float(line.x[-1]), float(line.y[-1])),
            (1.06, place),
            textcoords="axes fraction",
            arrowprops=LEADER | {"color": line.method.colour},
            va="center",
            fontsize=8,
            annotation_clip=False,
        )


def _on_panel(axes: Axes, line: Line) -> NDArray[np.float64]:
    """The places of a line as shares of the panel's sides, (n, 2)."""
    drawn = axes.transData.transform(np.column_stack([line.x, line.y]).astype(np.float64))
    return np.asarray(axes.transAxes.inverted().transform(drawn), np.float64)


def _hides(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    return first.shape == second.shape and bool((np.abs(first - second) < HIDDEN).all())


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved, least in squares, to lie `gap` apart in the same order, at most at 1."""
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    moved = isotonic_regression(np.asarray(places, np.float64)[order] - steps).x + steps
    # Counted from the highest down.
    moved = np.minimum(moved, 1.0 - steps[::-1])
    return [float(place) for place in moved[np.argsort(order)]]


def share_legend(figure: Figure, panels: Iterable[Axes], **style: Any) -> None:
    """One legend for several panels, with one entry a label."""
    found: dict[str, Artist] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    place = {"loc": "outside right center", "frameon": False, "fontsize": 9}
    figure.legend(handles=list(found.values()), labels=list(found), **{**place, **style})


def over_seeds(rows: pd.DataFrame) -> str:
    """The end of a title, such as ", 3 seeds"."""
    count = rows["seed"].nunique()
    return f", {count} seed" + "s" * (count > 1)
