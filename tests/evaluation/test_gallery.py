"""Which images are shown, in which order, and what stands beside them."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from weighmatch.data.ood import OOD_KINDS
from weighmatch.evaluation.gallery import UNKNOWN_COLOUR, choose_run, draw_gallery, draw_samples

from .examples import scores

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (30, 3, 8, 8), dtype=np.uint8)
SCORES = RNG.permutation(np.linspace(0, 1, 30))
FOUND = {"heldout_scores": SCORES, "heldout_weights": 2 * SCORES}
SOURCES = np.where(SCORES > 0.6, 0, 1)


def table(**arms):
    runs = scores(**arms)
    return runs.assign(
        run=runs["arm"] + runs["seed"].astype(str), key="a" + runs["seed"].astype(str)
    )


def draw(images=GREY, truth=True, found=FOUND, per_side=12):
    by_key = {"a0": {"heldout_sources": SOURCES}} if truth else {}
    runs = table(fixmatch=[1.0], learned=[1.0])
    return draw_gallery(
        runs, {"learned0": lambda: found}, by_key, {"a0": {"heldout_images": images}}, per_side
    )


def shown(figure):
    return [axes for axes in figure.axes if axes.images]


def colour(axes):
    return to_hex(axes.spines["top"].get_edgecolor()).upper()


@pytest.mark.parametrize("images", [GREY, COLOUR])
def test_gallery_shows_the_highest_and_the_lowest_images_in_order(images):
    figure = draw(images)
    panels, order = shown(figure), np.argsort(-SCORES)
    chosen = [*order[:12], *order[-12:][::-1]]
    assert len(panels) == 24
    for axes, k in zip(panels, chosen, strict=True):
        drawn = axes.images[0].get_array()
        expected = images[k][0] if images.shape[1] == 1 else images[k].transpose(1, 2, 0)
        assert (np.asarray(drawn) == expected).all()
        assert axes.get_xlabel() == f"{SCORES[k]:.2f}"
        assert colour(axes) == OOD_KINDS[SOURCES[k]].colour
    if images is GREY:
        assert {axes.images[0].get_clim() for axes in panels} == {(0, 255)}
    assert [half.get_suptitle() for half in figure.subfigs] == [
        "learned weights: trusted most (weights 1.24 to 2.00), 0 % OOD",
        "learned weights: trusted least (weights 0.00 to 0.76), 100 % OOD",
    ]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["in-distribution", "unseen classes (OOD)"]
    frames = [to_hex(patch.get_edgecolor()).upper() for patch in figure.legends[0].get_patches()]
    assert frames == [kind.colour for kind in OOD_KINDS[:2]]


def test_without_the_truth_frames_are_grey_and_no_share_is_told():
    figure = draw(truth=False)
    assert {colour(axes) for axes in shown(figure)} == {UNKNOWN_COLOUR}
    assert figure.subfigs[0].get_suptitle() == (
        "learned weights: trusted most (weights 1.24 to 2.00)"
    )
    assert not figure.legends


def test_a_run_that_ranks_nothing_says_so():
    for found in ({**FOUND, "heldout_scores": np.ones(30)}, {}):
        figure = draw(found=found)
        assert figure.get_suptitle() == "learned weights: ranks no image"
        assert not figure.axes


def test_the_run_shown_is_that_of_learned_weights_or_of_the_next_arm():
    runs = table(fixmatch=[1.0, 1.0], free=[1.0], energy=[1.0], pu=[1.0], learned=[1.0, 1.0])
    order = []
    while len(runs):
        run = choose_run(runs)
        order.append(run["arm"])
        assert run["seed"] == 0
        runs = runs[runs["arm"] != run["arm"]]
    assert order == ["learned", "pu", "energy", "free", "fixmatch"]
    stages = pd.concat([table(learned=[1.0]), table(learned=[1.0]).assign(schedule="rounds")])
    assert choose_run(stages)["schedule"] == "rounds"
    cells = pd.concat([table(fixmatch=[1.0]), table(learned=[1.0]).assign(ratio=0.5)])
    assert choose_run(cells)["arm"] == "fixmatch"


def test_samples_show_a_row_a_kind():
    images = {"labelled": GREY[:3], "noise": GREY[3:8]}
    figure = draw_samples(images, "title")
    assert figure.get_suptitle() == "title"
    panels = shown(figure)
    assert len(panels) == 8
    for axes, image in zip(panels, GREY[:8], strict=True):
        assert (np.asarray(axes.images[0].get_array()) == image[0]).all()
    names = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert names == ["labelled", "noise\n(OOD)"]
    noise = next(kind for kind in OOD_KINDS if kind.name == "noise")
    assert [colour(axes) for axes in panels] == ["#000000"] * 3 + [noise.colour] * 5
