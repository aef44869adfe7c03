import numpy as np
import pandas as pd
import pytest

from weighmatch.evaluation import figures
from weighmatch.pipelines.reporting.nodes import SHOWN
from weighmatch.semisup.config import ARMS

from .test_tables import scores


def texts(figure):
    found = figure.findobj(lambda item: hasattr(item, "get_text"))
    return " ".join(item.get_text() for item in found)


def test_every_arm_has_a_name_and_a_colour():
    assert set(figures.ARM_NAMES) == set(figures.ARM_COLOURS) == set(ARMS)
    assert len(set(figures.ARM_COLOURS.values())) == len(set(figures.ARM_NAMES.values()))
    assert set(SHOWN) == set(ARMS)  # whichever arm was run alone, the gallery has weights to show


def test_accuracy_and_differences_name_axes_arms_and_seeds():
    table = scores(fixmatch=[80.0, 85.0], learned=[85.0, 89.0], oracle=[90.0, 95.0])
    shown = texts(figures.draw_accuracy(table))
    assert "accuracy on test images of seen classes (%)" in shown
    assert "2 seeds" in shown
    assert "learned weights" in shown
    shown = texts(figures.draw_differences(table))
    assert "points" in shown
    assert "FixMatch" in shown


def test_seeds_with_the_same_accuracy_do_not_hide_each_other():
    figure = figures.draw_accuracy(scores(learned=[97.0, 94.0, 97.0, 97.0]))
    dots = figure.axes[0].collections[0].get_offsets()
    assert len(dots) == len({tuple(dot) for dot in dots.tolist()}) == 4


@pytest.mark.parametrize("arms", [{"supervised": [60.0]}, {"learned": [85.0], "fixmatch": [80.0]}])
def test_single_seeds_and_missing_arms_can_be_drawn(arms):
    table = scores(**arms)
    for draw in (figures.draw_accuracy, figures.draw_differences, figures.draw_auroc):
        figure = draw(table)
        figure.canvas.draw()
        assert len(figure.axes) == 1


def test_weights_are_drawn_for_arms_whose_weights_vary():
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "step": step,
            "source": source,
            "weight": weight,
            "mask_rate": 0.5,
            "images": 10,
        }
        for arm, spread in (("fixmatch", 0.0), ("learned", 0.4))
        for seed in (0, 1)
        for step in (50, 100)
        for source, weight in (("id", 1 + spread), ("unseen", 1 - spread))
    ]
    figure = figures.draw_weights(pd.DataFrame(rows))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["learned weights"]
    assert "unseen classes (OOD)" in texts(figure)
    figures.draw_weights(pd.DataFrame(rows)[:4]).canvas.draw()  # no arm whose weights vary
    # One snapshot, as two stages have: a point in place of a line.
    once = figures.draw_weights(pd.DataFrame([row for row in rows if row["step"] == 100]))
    marked = [line for line in once.axes[0].get_lines() if line.get_marker() == "o"]
    assert [line.get_ydata()[0] for line in marked] == pytest.approx([1.4, 0.6])


def test_both_series_of_auroc_have_a_name_where_the_lowest_arm_has_one_of_them():
    rows = [
        {"arm": arm, "seed": seed, "auroc_weight": weight, "auroc_confidence": 0.7}
        for arm, weight in (("max_prob", 0.8), ("free", 0.5))
        for seed in (0, 1)
    ]
    (axes,) = figures.draw_auroc(pd.DataFrame(rows)).axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(names) == ["classifier's confidence", "weight"]


def test_gallery_shows_the_highest_first_and_counts_ood():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    weights = np.linspace(2, 0, 30)
    sources = ["id"] * 12 + ["unseen"] * 18
    figure = figures.draw_gallery(images, weights, weights, sources, "learned", per_side=12)
    shown = texts(figure)
    assert "learned weights: weighed up most (weights 1.24 to 2.00), 0 % OOD" in shown
    assert "learned weights: weighed down most (weights 0.00 to 0.76), 100 % OOD" in shown
    assert "2.00" in shown
    figures.draw_gallery(images.repeat(3, 1), weights, weights, sources, "pu").canvas.draw()
    alike = figures.draw_gallery(images, np.ones(30), np.ones(30), sources, "fixmatch")
    assert texts(alike) == "FixMatch: ranks no image"


def test_samples_show_a_row_a_source():
    images = {
        "labelled": np.zeros((3, 1, 8, 8), np.uint8),
        "noise": np.zeros((5, 1, 8, 8), np.uint8),
    }
    assert "noise" in texts(figures.draw_samples(images, "title"))
