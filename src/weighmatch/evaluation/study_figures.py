"""What the figures of all studies share: marks of methods, legends, numbers of seeds."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weighmatch.studies.methods import HypergradientMethod


def plot_method(axes: Axes, method: HypergradientMethod, x: Any, y: Any, **style: Any) -> None:
    """A line, or points, with the method's colour, marker and label."""
    own = {"marker": method.marker, "color": method.colour, "label": method.label}
    axes.plot(x, y, **{**own, **style})


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
