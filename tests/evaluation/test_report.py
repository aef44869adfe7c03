"""The verdict, summary.json and the page."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from weighmatch.evaluation.report import _update_in_steps, render_report, summarise, verdict
from weighmatch.evaluation.tables import arm_table, compare_arms

from .examples import CELL, scores

SETTING = {
    "ratio": 0.75,
    "regime": "fixed_total",
    "ood_source": "unseen",
    "labels_per_class": 4,
    "seeds": [1, 2, 3],
}
COUNTS = {
    "labelled": 24,
    "pool": {"id": 150, "ood": 450},
    "heldout": {"id": 151, "ood": 152},
    "test": 270,
    "classes": [],
    "fingerprints": {"unlabelled_images": "abcd"},
}
MANIFEST = {
    "cells": [
        {**CELL, "ood_source": "unseen", "key": str(seed), "seed": seed, **COUNTS}
        for seed in (1, 2, 3)
    ]
}


def metrics(runs=None, manifest=MANIFEST, **accuracy):
    runs = scores(**accuracy) if runs is None else runs
    return summarise(arm_table(runs), compare_arms(runs), manifest)


def sentence(**accuracy):
    return metrics(**accuracy)["verdict"]


def test_the_verdict_follows_the_interval():
    base = [80.0, 85.0, 90.0]
    win = sentence(fixmatch=base, learned=[85.0, 90.1, 94.9])
    assert "+5.0 points, 95 % interval +4.8 to +5.2" in win
    assert "Learned weights beat FixMatch at equal steps." in win
    assert "Learned weights fall behind FixMatch" in sentence(
        fixmatch=base, learned=[75.0, 80.1, 84.9]
    )
    assert "Neither is shown to be better." in sentence(fixmatch=base, learned=[85.0, 80.0, 91.0])


def test_the_verdict_names_controls_and_oracle():
    text = sentence(
        fixmatch=[80.0, 85.0],
        learned=[85.0, 89.0],
        fixmatch_matched=[81.0, 86.0],
        pu=[85.0, 89.0],
        oracle=[90.0, 95.0],
    )
    assert "total compute (83.5 %) the difference is +3.5 points" in text
    assert "no hypergradient (87.0 %) the difference is +0.0 points" in text
    assert "close 45 % of that gap" in text
    flat = sentence(fixmatch=[80.0, 85.0], learned=[85.0, 89.0], oracle=[70.0, 85.0])
    assert "no gap to close" in flat


def test_one_seed_has_no_interval_and_missing_arms_no_verdict():
    assert "one seed: no interval" in sentence(fixmatch=[80.0], learned=[85.0])
    assert "no verdict between them" in sentence(supervised=[60.0], learned=[85.0])


def test_metrics_are_json_without_nan():
    found = metrics(fixmatch=[80.0], learned=[85.0])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["arms"]["learned"]["difference_low"] is None
    assert found["arms"]["learned"]["accuracy"] == 85
    assert found["learned_minus"]["fixmatch"]["mean"] == 5

    assert found["setting"] == SETTING


def test_metrics_are_those_of_the_first_cell_and_name_the_others():
    near = scores(fixmatch=[80.0, 82.0], learned=[85.0, 88.0])
    far = scores(fixmatch=[60.0, 61.0], learned=[70.0, 70.0]).assign(setting="more", ratio=0.5)
    cells = [*MANIFEST["cells"], {**MANIFEST["cells"][0], "setting": "more", "ratio": 0.5}]
    found = metrics(pd.concat([far, near]), {"cells": cells})
    assert found["arms"]["learned"]["accuracy"] == 86.5
    assert found["learned_minus"]["fixmatch"]["mean"] == 5.5
    others = found["setting"].pop("others")
    assert found["setting"] == SETTING
    assert others == [{"name": "more", **SETTING, "ratio": 0.5, "seeds": [1]}]


def test_an_arm_of_several_schedules_is_told_in_its_last():
    runs = pd.concat(
        [
            scores("rounds", learned=[90.0, 91.0]),
            scores(fixmatch=[80.0, 82.0], learned=[85.0, 88.0]),
        ]
    )
    found = metrics(runs)
    assert found["arms"]["learned"]["accuracy"] == 90.5
    assert found["learned_minus"]["fixmatch"]["mean"] == 9.5


def test_without_test_labels_or_a_known_ratio_there_is_a_sentence():
    runs = scores(fixmatch=[np.nan], learned=[np.nan]).assign(
        ratio=np.nan, setting="mine", regime=None
    )
    unknown = {"ratio": None, "regime": None, "ood_source": None, "setting": "mine"}
    cells = [{**cell, **unknown} for cell in MANIFEST["cells"]]
    found = metrics(runs, {"cells": cells})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["verdict"] == (
        "With 4 labels a class, over 3 paired seeds, no accuracy is known, as there are no "
        "labelled test images."
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("unseen", "(images of unseen classes)"),
        ("unseen+patches", "(images of unseen classes and patches of photographs)"),
        ("mix", "(a mix of unseen classes, photograph patches and noise)"),
    ],
)
def test_every_source_has_words(source, words):
    arms = {"learned": {"accuracy": 90.0}}
    assert words in verdict(arms, {}, {**SETTING, "ood_source": source})


def test_an_update_is_told_in_steps_of_fixmatch():
    fixmatch = {"seconds": 6.0, "steps": 1000, "update_seconds": None}
    learned = {"seconds": 8.0, "steps": 1000, "update_seconds": 0.06}
    assert _update_in_steps({"fixmatch": fixmatch, "learned": learned}) == pytest.approx(10)
    assert _update_in_steps({"learned": learned}) is None
    assert _update_in_steps({"fixmatch": fixmatch, "learned": fixmatch}) is None


def study():
    row = {
        "network": "mlp",
        "l2": 0.1,
        "damping_ratio": 0.1,
        "dtype": "float64",
        "batch": -1,
        "stage": "1.0",
        "seed": 0,
        "gradients": 30.0,
    }
    row |= {"products": 20, "hypergradient_error": 0.25, "hypergradient_cosine": 0.75}
    methods = (("neumann", 20), ("identity", 0))
    return pd.DataFrame([{**row, "method": m, "max_products": n} for m, n in methods])


def page(runs, manifest=MANIFEST):
    names = (
        "accuracy",
        "differences",
        "weights",
        "auroc",
        "calibration",
        "gallery",
        "ihvp",
        "samples",
    )
    pictures = {name: name.encode() for name in names}
    found = metrics(runs, manifest)
    return found, render_report(found, arm_table(runs), study(), manifest, pictures)


def cells_of(html, name):
    (row,) = re.findall(rf"<tr[^>]*>\s*<td>{name}</td>(.*?)</tr>", html, re.DOTALL)
    return re.findall(r"<td>(.*?)</td>", f"{row}", re.DOTALL)


def test_the_page_holds_verdict_numbers_figures_and_data():
    runs = scores(fixmatch=[80.0, 84.0], learned=[85.0, 88.0], oracle=[90.0, 95.0])
    found, html = page(runs)
    assert found["verdict"] in html
    assert cells_of(html, "learned weights")[:4] == ["86.5", "+4.5 (-1.9 to +10.9)", "1.000", "43"]
    assert cells_of(html, "FixMatch")[:4] == ["82.0", "–", "–", "–"]
    assert cells_of(html, "2")[:6] == ["24", "150", "450", "151", "152", "270"]
    assert "<code>abcd</code>" in html
    assert html.count("data:image/png;base64,") == 8
    assert html.index("FixMatch</td>") < html.index("learned weights</td>")
    assert "2.5e-01" in html
    assert "<h3>" not in html
    assert "The seen classes" not in html


def test_the_page_has_a_table_a_cell_and_names_classes():
    near = scores(fixmatch=[80.0, 82.0], learned=[85.0, 88.0])
    runs = pd.concat([near, near.assign(ratio=0.5)])
    _, html = page(
        runs, {"cells": [{**cell, "classes": ["cat", "dog"]} for cell in MANIFEST["cells"]]}
    )
    assert re.findall("<h3>(.*?)</h3>", html) == [
        "unseen: 50 % of the pool OOD",
        "unseen: 75 % of the pool OOD",
    ]
    assert html.count("<td>learned weights</td>") == 2
    assert "The seen classes are cat, dog." in html


def test_the_page_copes_without_truth_and_test_labels():
    runs = scores(fixmatch=[np.nan], learned=[np.nan]).assign(ratio=np.nan)
    cells = [
        {**cell, "ratio": None, "pool": {"images": 600}, "heldout": {"images": 0}, "test": 0}
        for cell in MANIFEST["cells"]
    ]
    found, html = page(runs, {"cells": cells})
    assert found["verdict"] in html
    assert cells_of(html, "learned weights")[0] == "–"
    assert "nan" not in html


def test_the_page_begins_with_the_verdict_on_the_pile_and_shows_the_recipe():
    runs = scores(fixmatch=[80.0, 84.0], learned=[85.0, 88.0])
    found = metrics(runs)
    pile = {
        "verdict": "The pile helped & more.",
        "useful": {"sentence": "60 % of the pile looks useful."},
        "files": {"rejected": 3, "copies": 0},
        "advice": ["Label more cats."],
    }
    manifest = {**MANIFEST, "recipe": {"training": {"steps": 1500, "influence": {"damping": 0.1}}}}
    names = "accuracy differences weights auroc calibration gallery samples"
    pictures = dict.fromkeys(names.split(), b"")
    sizes = {"model.pt2": 564_000, "gallery.html": 1_300_000}
    html = render_report({**found, "pile": pile}, arm_table(runs), None, manifest, pictures, sizes)
    assert "hypergradient?" not in html
    assert "<code>model.pt2</code> (0.56 MB)." in html
    assert "gallery.html</a> (1.3 MB)" in html
    assert html.index("The pile helped &amp; more.") < html.index(found["verdict"][:20])
    assert "<li>Label more cats.</li>" in html
    assert "3 files could not be used." in html
    assert "are copies" not in html
    assert 'href="gallery.html"' in html
    assert cells_of(html, "<code>training.influence.damping</code>") == ["0.1"]
