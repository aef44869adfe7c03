"""The figures of docs/results, drawn from the tables of the same pages.

python -m benchmarks.figures                      # every figure of docs/results
python -m benchmarks.figures --gallery FILE       # docs/gallery.png from a job's gallery.png

A figure therefore shows what its page says, and is drawn again when a table changes.
"""

import argparse
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from weighmatch.arms import all_arms, get_arm

PAGES = Path(__file__).parents[1] / "docs" / "results"
# Okabe & Ito (2008), which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
WIDTH = 5.2  # inches
Row = dict[str, str]


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, as a cell such as "+6.0 (+3.4 to +8.5)" has it."""

    mean: float
    low: float
    high: float


def read_table(page: str, *columns: str) -> list[Row]:
    """The rows of the first table of a page that has these columns, by the names of its columns.

    Raises:
        ValueError: if there is no such table.
    """
    lines = (PAGES / f"{page}.md").read_text().splitlines()
    for number, line in enumerate(lines):
        names = _cells(line)
        if set(columns) <= set(names) and lines[number + 1].startswith("|"):
            rows: list[Row] = []
            for row in lines[number + 2 :]:
                if not row.startswith("|"):
                    return rows
                rows.append(dict(zip(names, _cells(row), strict=True)))
            return rows
    raise ValueError(f"docs/results/{page}.md has no table with the columns {', '.join(columns)}")


def _cells(line: str) -> list[str]:
    plain = re.sub(r"[*`]", "", line).replace("−", "-")
    return [cell.strip() for cell in plain.strip().strip("|").split("|")]


def read_numbers(cell: str) -> list[float]:
    """The numbers of a cell, such as [6.0, 3.4, 8.5] of "+6.0 (+3.4 to +8.5)"; [] of "–"."""
    found = re.findall(r"[-+]?\d*\.?\d+(?:e-?\d+)?", cell.replace(",", "").replace("–", " "))
    return [float(number) for number in found]


def read_interval(cell: str) -> Interval | None:
    """The interval of a cell, or None where it has none."""
    numbers = read_numbers(cell)
    return Interval(*numbers[:3]) if len(numbers) >= 3 else None


def draw_digits() -> Figure:
    """The difference to FixMatch of each arm, a panel for each setting."""
    titles = (
        "2 labels a class, 50 % OOD",
        "2 labels a class, 75 % OOD",
        "4 labels a class, 75 % OOD",
    )
    figure, axes = _make_axes(1.8, len(titles))
    text = (PAGES / "digits.md").read_text()
    labels = {arm.name: arm for arm in all_arms()}
    for panel, title in zip(axes, titles, strict=True):
        part = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
        rows = [_cells(line) for line in part.splitlines() if line.startswith("|")][2:]
        known = [row for row in rows if row[0] in labels and read_interval(row[2])][:6]
        for height, row in enumerate(known):
            _draw_interval(panel, read_interval(row[2]), height, labels[row[0]].colour)
        _name_rows(panel, [labels[row[0]].label for row in known])
        panel.set_title(title)
        panel.set_xlabel("accuracy less FixMatch's, points")
    return figure


def draw_glyphs() -> Figure:
    """The difference to FixMatch of learned weights, the control and the oracle, by setting."""
    figure, (axes,) = _make_axes(5.2)
    rows = read_table("glyphs", "setting", "OOD", "learned - FixMatch")
    shown = (("learned", "learned - FixMatch"), ("pu", "pu - FixMatch"))
    for arm, column in (*shown, ("oracle", "oracle - FixMatch")):
        offset = {"learned": -0.22, "pu": 0.0, "oracle": 0.22}[arm]
        for height, row in enumerate(rows):
            interval = read_interval(row[column])
            label = get_arm(arm).label if not height else None
            _draw_interval(axes, interval, height + offset, get_arm(arm).colour, label)
    _name_rows(axes, [f"{row['setting']}, {row['OOD']} OOD" for row in rows])
    axes.set_xlabel("accuracy less FixMatch's,\npoints (95 % interval)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_cifar10() -> Figure:
    """What is kept of the pile, and that 120 labels cannot show a gain."""
    figure, (kept, differences) = _make_axes(1.7, 2)
    rows = read_table("cifar10", "images of the pile", "kept")
    shares = [read_numbers(row["kept"])[0] for row in rows]
    bars = kept.barh(range(len(rows)), shares, 0.6, color=[GREEN, GREY])
    kept.bar_label(bars, fmt="%.0f %%", padding=3)
    _name_rows(kept, [row["images of the pile"] for row in rows])
    kept.set(xlim=(0, 100), xlabel="kept of 1,500 each, %")
    kept.set_title("Animals are kept, vehicles left out")
    rows = read_table("cifar10", "learned weights against")
    for height, row in enumerate(rows):
        cell = row["difference in points (95 % interval)"]
        _draw_interval(differences, read_interval(cell), height, RED)
    _name_rows(differences, [f"against {row['learned weights against']}" for row in rows])
    differences.set_xlabel("accuracy gained, points")
    differences.set_title("A gain is not shown")
    return figure


def draw_ihvp() -> Figure:
    """Error of the hypergradient by method, on four networks."""
    figure, (axes,) = _make_axes(4.8)
    rows = read_table("ihvp", "method", "products", "softmax", "wide MLP")
    rows = [row for row in rows if row["method"] != "exact"]
    networks = {"softmax": ("o", BLUE), "MLP": ("s", ORANGE), "wide MLP": ("D", GREEN)}
    networks["CNN"] = ("^", RED)
    for network, (marker, colour) in networks.items():
        errors = [read_numbers(row[network])[0] for row in rows]
        axes.plot(errors, range(len(rows)), marker, color=colour, label=network, markersize=6)
    axes.set_xscale("log")
    axes.axvline(1, color=GREY, linewidth=0.8)
    _name_rows(axes, [row["method"] for row in rows])
    axes.set_xlabel("relative error of the hypergradient;\nabove 1, zero would be better")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def draw_meta_learning() -> Figure:
    """Accuracy that worse hypergradients lose, and what a stable step does to forgetting."""
    figure, (accuracy, drops) = _make_axes(3.2, 2)
    compared = read_table("meta_learning", "method", "- CG-20", "cost")[1:]
    for height, row in enumerate(compared):
        difference = read_interval(row["- CG-20"]) or Interval(0, 0, 0)
        _draw_interval(accuracy, difference, height, BLUE)
    _name_rows(accuracy, [f"{row['method']} ({row['cost']})" for row in compared])
    accuracy.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    accuracy.set_xlabel("test accuracy less that of CG-20 (1,345)")
    accuracy.set_title("Example weights (inner gradients)")
    table = read_table("meta_learning", "case", "identity", "CG-20", "exact")
    rows = {row["case"]: row for row in table}
    methods = ("identity", "Neumann-20", "CG-20", "exact")
    for offset, case, colour in ((-0.2, "fixed step", RED), (0.2, "stable step", GREEN)):
        values = [read_numbers(rows[case][method])[0] for method in methods]
        places = [place + offset for place in range(len(methods))]
        bars = drops.bar(places, values, 0.4, color=colour, label=case)
        drops.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    drops.set_xticks(range(len(methods)), methods, fontsize=9)
    drops.set_ylabel("accuracy lost since the best")
    drops.set_title("Forgetting, by solver")
    drops.legend(frameon=False)
    return figure


def draw_speed() -> Figure:
    """The cost of learned weights, and augmentation beside other libraries."""
    figure, (cost, pairs) = _make_axes(2.3, 2)
    rows = read_table("speed", "network", "schedule", "learned / FixMatch")
    for height, row in enumerate(rows):
        _draw_interval(cost, read_interval(row["learned / FixMatch"]), height, RED)
    names = [f"{row['network']}: {row['schedule'].split(',')[0]}" for row in rows]
    _name_rows(cost, names)
    cost.axvline(1, color=GREY, linewidth=0.8)
    cost.set(xlim=(0.98, 1.4), xlabel="time over FixMatch's")
    cost.set_title("Learned weights")
    rows = read_table("speed", "library", "pairs of views a second")
    speeds = [read_numbers(row["pairs of views a second"])[0] for row in rows]
    colours = [RED if row["library"] == "ours" else GREY for row in rows]
    bars = pairs.barh(range(len(rows)), speeds, 0.6, color=colours)
    pairs.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    _name_rows(pairs, [row["library"] for row in rows])
    pairs.set(xlim=(0, 65_000), xlabel="pairs of views a second")
    pairs.set_title("Augmentation")
    return figure


def draw_reliability() -> Figure:
    """The share of tries that survived by fault, and the lowest share that they leave possible."""
    figure, (axes,) = _make_axes(8)
    rows = [
        (row["fault"], int(row["survived"]), int(row["tries"]))
        for row in read_table("reliability", "fault", "tries", "survived", "lost")
    ]
    rows.sort(key=lambda row: (-least_share(*row[1:]), row[0]))
    for height, (_, survived, tries) in enumerate(rows):
        share = 100 * survived / tries
        interval = Interval(share, 100 * least_share(survived, tries), share)
        _draw_interval(axes, interval, height, GREEN if survived == tries else RED)
        axes.text(104, height, f"{survived} of {tries}", va="center", fontsize=9)
    _name_rows(axes, [textwrap.fill(fault, 32) for fault, *_ in rows])
    axes.tick_params("y", labelsize=9)
    axes.set(xlim=(0, 128), xticks=range(0, 101, 25), xlabel="tries that survived, %")
    figure.suptitle(
        "Dot: tries that survived. Line: how low the rate\n"
        "may be all the same (one-sided 95 % bound)",
        fontsize=11,
    )
    return figure


def least_share(survived: int, tries: int) -> float:
    """The lower 95 % bound, one-sided, of a rate of which so many tries succeeded.

    It is the exact binomial bound of Clopper & Pearson (1934), and one less it is the upper bound
    of the rate of loss.
    """
    lost = tries - survived
    return 1 - float(stats.beta.ppf(0.95, lost + 1, survived)) if survived else 0.0


def _make_axes(height: float, panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Panels of a height in inches, one below the other, so that a phone shows them readably."""
    figure = Figure(figsize=(WIDTH, panels * height), layout="constrained", dpi=120)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(11)
    return figure, tuple(axes)


def _draw_interval(
    axes: Axes, interval: Interval | None, height: float, colour: str, label: str | None = None
) -> None:
    if interval is None:
        return
    axes.plot([interval.low, interval.high], [height, height], color=colour, linewidth=2)
    axes.plot(interval.mean, height, "o", color=colour, label=label)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Rows from the top, with a line at zero where the axis crosses it."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    if axes.get_xlim()[0] < 0 < axes.get_xlim()[1]:
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)


FIGURES: dict[str, Callable[[], Figure]] = {
    "digits": draw_digits,
    "glyphs": draw_glyphs,
    "cifar10": draw_cifar10,
    "ihvp": draw_ihvp,
    "meta_learning": draw_meta_learning,
    "speed": draw_speed,
    "reliability": draw_reliability,
}


def shrink(source: Path, target: Path, width: int = 1000) -> None:
    """Write a picture anew at a width in pixels and with 256 colours, to be small in Git."""
    with Image.open(source) as picture:
        height = round(picture.height * width / picture.width)
        small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    small.quantize(256, Image.Quantize.MAXCOVERAGE).save(target, optimize=True)


def main() -> None:
    """Draw every figure, or shrink the gallery of a job for the first page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gallery", type=Path, help="the file gallery.png that a job reported")
    gallery = parser.parse_args().gallery
    if gallery is not None:
        shrink(gallery, PAGES.parent / "gallery.png")
        return
    for name, draw in FIGURES.items():
        # Without the library's version in the file, equal figures are equal files.
        draw().savefig(PAGES / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
