"""The verdict, summary.json and the page."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from weighmatch.arms import POOL_HELPS, WEIGHTS_PAY, get_arm
from weighmatch.evaluation.origin import Origin
from weighmatch.evaluation.report import (
    _update_in_steps,
    describe,
    render_report,
    summarise,
    summarise_study,
)
from weighmatch.evaluation.statistics import holm
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
    ],
    "primary": WEIGHTS_PAY.names(),
}


def metrics(runs=None, manifest=MANIFEST, **accuracy):
    runs = scores(**accuracy) if runs is None else runs
    against = get_arm(manifest["primary"]["against"])
    return summarise(arm_table(runs, against), compare_arms(runs), manifest)


def test_the_verdict_is_that_of_the_declared_comparison():
    found = metrics(
        fixmatch=[99.0] * 6,
        fixmatch_matched=[80.0, 85.0, 90.0, 80.0, 85.0, 90.0],
        learned=[85.0, 90.1, 94.9, 85.0, 90.0, 94.0],
        pu=[85.0, 89.0, 84.0, 90.0, 84.0, 80.0],
    )
    assert found["question"] == "Does it pay to weigh the unlabelled images?"
    assert (
        "89.8 % of the test images right and FixMatch with the same compute 85.0 %"
        in (found["verdict"])
    )
    assert len(re.findall(r"[+-]?\d+\.\d", found["verdict"])) == 3
    assert (found["light"], found["sure"][:4]) == ("green", "Yes.")
    # No correction eats it; the others are corrected among themselves.
    differences = found["learned_minus"]
    assert differences["fixmatch_matched"]["p_value"] == 2 / 64
    assert differences["fixmatch_matched"]["p_holm"] is None
    others = [differences[arm] for arm in ("fixmatch", "pu")]
    assert [row["p_holm"] for row in others] == pytest.approx(
        holm([row["p_value"] for row in others])
    )
    assert others[0]["p_holm"] == 2 * others[0]["p_value"]


def test_a_pool_as_it_was_found_has_the_verdict_on_the_pile():
    manifest = {**MANIFEST, "primary": POOL_HELPS.names()}
    runs = scores(supervised=[60.0, 61.0], learned=[80.0, 81.0])
    pile = {"verdict": "The pile helped.", "light": "green", "sure": "Yes.", "advice": []}
    tables = arm_table(runs, POOL_HELPS.against), compare_arms(runs)
    found = summarise(*tables, manifest, pile)
    assert [found[name] for name in ("verdict", "light", "sure")] == [
        "The pile helped.",
        "green",
        "Yes.",
    ]
    assert found["pile"] == pile
    assert found["question"] == POOL_HELPS.question
    # Where the truth is known, the pile's verdict is not the one.
    other = summarise(*tables, MANIFEST, pile)
    assert other["verdict"].startswith("There is no verdict")


def test_one_seed_shows_nothing_and_missing_arms_have_no_verdict():
    found = metrics(fixmatch_matched=[80.0], learned=[85.0])
    assert found["sure"] == "Not yet. One seed cannot show it; six can."
    assert "There is no verdict" in metrics(supervised=[60.0], learned=[85.0])["verdict"]


def test_metrics_are_json_without_nan():
    found = metrics(fixmatch_matched=[80.0], learned=[85.0])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["arms"]["learned"]["difference_low"] is None
    assert found["arms"]["learned"]["accuracy"] == 85
    assert found["learned_minus"]["fixmatch_matched"]["mean"] == 5
    assert found["setting"] == SETTING


def test_metrics_are_those_of_the_first_cell_and_name_the_others():
    near = scores(fixmatch=[80.0, 82.0], learned=[85.0, 88.0])
    far = scores(fixmatch=[60.0, 61.0], learned=[70.0, 70.0]).assign(setting="more", ratio=0.5)
    cells = [*MANIFEST["cells"], {**MANIFEST["cells"][0], "setting": "more", "ratio": 0.5}]
    found = metrics(pd.concat([far, near]), {**MANIFEST, "cells": cells})
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
    found = metrics(runs, {**MANIFEST, "cells": cells})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "no accuracy is known" in found["verdict"]
    assert describe(found["setting"]) == (
        "Training had 4 labels a class and was repeated over three seeds."
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("unseen", "75 % are foreign: images of unseen classes."),
        ("unseen+patches", "images of unseen classes and patches of photographs."),
        ("mix", "a mix of unseen classes, photograph patches and noise."),
    ],
)
def test_every_source_has_words(source, words):
    assert describe({**SETTING, "ood_source": source}).endswith(words)


def test_folds_are_called_so_and_the_set_of_every_label_is_no_setting_of_its_own():
    folds = {"ratio": None, "ood_source": None, "setting": "mine", "source": "folder"}
    cells = [{**cell, **folds, "test": 6} for cell in MANIFEST["cells"]]
    for cell in cells:
        cell["fingerprints"] = {**cell["fingerprints"], "test_images": cell["key"]}
    every = {**cells[0], "setting": "all", "labelled": 30, "test": 0}
    manifest = {"cells": [*cells, every], "primary": POOL_HELPS.names()}
    runs = scores(supervised=[60.0, 61.0], learned=[80.0, 81.0])
    runs = runs.assign(ratio=np.nan, setting="mine", source="folder", auroc_confidence=np.nan)
    found, html = page(runs, manifest)
    assert "others" not in found["setting"]
    assert "repeated over three folds of the labelled images." in html
    assert cells_of(section(html, "data"), "every label")[0] == "30"
    # Without a truth there are no figures that need one.
    assert html.count("<img") == 6


def test_an_update_is_told_in_steps_of_fixmatch():
    fixmatch = {"seconds": 6.0, "steps": 1000, "update_seconds": None}
    learned = {"seconds": 8.0, "steps": 1000, "update_seconds": 0.06}
    assert _update_in_steps({"fixmatch": fixmatch, "learned": learned}) == pytest.approx(10)
    assert _update_in_steps({"learned": learned}) is None
    assert _update_in_steps({"fixmatch": fixmatch, "learned": fixmatch}) is None


def study():
    row = {
        "l2": 0.1,
        "damping_ratio": 0.1,
        "dtype": "float64",
        "batch": -1,
        "stage": "1.0",
        "seed": 0,
    }
    budgets = {
        "identity": (1,),
        "neumann": (5, 10, 20),
        "conjugate_gradient": (5, 10, 20),
        "minres": (5, 10, 20),
        "exact": (650,),
    }
    rows = []
    for network, parameters, scale in (("softmax", 650, 1.0), ("cnn-4", 2182, 2.0)):
        for place, (method, sizes) in enumerate(budgets.items()):
            for size in sizes:
                error = scale * 2.5 / (1 + place) / size
                own = {"network": network, "parameters": parameters, "method": method}
                own |= {"max_products": size, "products": size, "hypergradient_error": error}
                rows.append({**row, **own, "hypergradient_cosine": 1 - error / 10})
    return pd.DataFrame(rows)


def test_the_study_is_told_by_its_main_methods_on_the_largest_network():
    found = summarise_study(study())
    assert [row["label"] for row in found] == [
        "conjugate gradients",
        "Neumann series",
        "identity (no curvature)",
    ]
    assert found[0]["hypergradient_error"] == pytest.approx(2 * 2.5 / 3 / 10)
    assert found[0]["hypergradient_cosine"] == pytest.approx(1 - 0.5 / 3 / 10)
    assert [row["products"] for row in found] == [10, 10, 1]


NAMES = ("accuracy", "differences", "weights", "auroc", "calibration", "gallery", "ihvp", "samples")
ORIGIN = Origin("kedro run", "1234abcd", True, "2026-11-27 14:00 UTC", {"torch": "2.15"})


def page(runs, manifest=MANIFEST, **more):
    pictures = {name: name.encode() for name in NAMES}
    found = {**metrics(runs, manifest), **more.pop("changes", {})}
    table = arm_table(runs, get_arm(manifest["primary"]["against"]))
    shown = more.pop("study", study())
    return found, render_report(found, table, shown, manifest, pictures, **more)


def cells_of(html, name):
    (row,) = re.findall(rf'<tr[^>]*><th scope="row">{name}</th>(.*?)</tr>', html, re.DOTALL)
    return re.findall(r"<td>(.*?)</td>", row, re.DOTALL)


def section(html, name):
    (found,) = re.findall(rf'<details id="{name}".*?</details>', html, re.DOTALL)
    return found


class Outline(HTMLParser):
    """What a screen reader goes by: tags with their attributes, and the nesting of all."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, *names):
        return [(tag, attrs) for tag, attrs in self.tags if tag in names]


RUNS = {
    "fixmatch_matched": [80.0, 84.0],
    "fixmatch": [81.0, 85.0],
    "learned": [85.0, 88.0],
    "oracle": [90.0, 95.0],
}


def test_the_page_holds_verdict_numbers_figures_and_data():
    found, html = page(scores(**RUNS))
    assert found["verdict"] in html
    assert found["sure"] in html
    accuracy, data = section(html, "accuracy"), section(html, "data")
    assert cells_of(accuracy, "learned weights")[:3] == ["86.5", "+4.5", "−1.9 to +10.9"]
    assert cells_of(accuracy, "FixMatch, learned arm&#39;s compute")[:3] == ["82.0", "–", "–"]
    told = re.sub(r"<[^>]*>", " ", re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL))
    assert not re.search(r"(?<!\S)-\d", told)
    assert accuracy.index("compute</th>") < accuracy.index("learned weights</th>")
    assert "learned weights close 43 % of the gap" in accuracy
    against = section(html, "comparisons")
    assert cells_of(against, "FixMatch, learned arm&#39;s compute")[2:] == ["0.500", "declared"]
    assert cells_of(against, "FixMatch")[2:] == ["1.000", "secondary"]
    assert cells_of(data, "2")[:6] == ["24", "150", "450", "151", "152", "270"]
    assert "<code>abcd</code>" in data
    assert html.count("data:image/png;base64,") == 8
    ihvp = section(html, "ihvp")
    assert cells_of(ihvp, "conjugate gradients") == ["10", "0.17", "0.983"]
    assert ihvp.count('<th scope="row">') == 3
    assert "The seen classes" not in html
    assert 'id="parameters"' not in html
    assert 'id="origin"' not in html


@pytest.mark.parametrize("light", ["green", "amber", "red", "none"])
def test_one_lamp_is_lit_and_words_say_the_same(light):
    _, html = page(scores(**RUNS), changes={"light": light, "sure": "Words."})
    lamps = re.findall(r"<i( class=\"on\")?></i>", html)
    places = ("red", "amber", "green")
    assert [bool(lit) for lit in lamps] == [light == name for name in places if light != "none"]
    assert "<b>Is that sure?</b> Words." in html
    assert 'class="lamps" aria-hidden="true"' in html or light == "none"


def test_the_page_is_for_screen_readers_keyboards_and_the_dark():
    _, html = page(scores(**RUNS), parameters={"training": {"steps": 10}}, origin=ORIGIN)
    outline = Outline(html)
    assert not outline.open
    assert [len(outline.of(name)) for name in ("header", "main", "footer", "h1")] == [1, 1, 1, 1]
    assert outline.of("html")[0][1]["lang"] == "en"
    # Each section folds by its heading; no level of headings is left out.
    assert len(outline.of("summary")) == len(outline.of("h2")) == len(outline.of("details")) == 8
    assert not outline.of("h3")
    assert all(len(attrs["alt"]) > 20 for _, attrs in outline.of("img"))
    boxes = [attrs for _, attrs in outline.of("div") if attrs.get("class") == "box"]
    assert len(boxes) == len(outline.of("table")) == len(outline.of("caption")) == 5
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert all("scope" in attrs for _, attrs in outline.of("th"))
    identifiers = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(set(identifiers)) == len(identifiers)
    assert "prefers-color-scheme: dark" in html
    assert "://" not in html


def luminance(colour):
    channels = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_text_has_the_contrast_that_guidelines_ask_for():
    _, html = page(scores(**RUNS))
    schemes = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for ground in ("page", "card"):
            for text in ("ink", "soft", "link"):
                pair = sorted([luminance(colours[ground]), luminance(colours[text])])
                assert (pair[1] + 0.05) / (pair[0] + 0.05) > 4.5, (ground, text)


def test_the_page_ends_with_settings_and_how_it_was_made():
    manifest = {**MANIFEST, "recipe": {"training": {"steps": 1500, "influence": {"damping": 0.1}}}}
    parameters = {"training": {"steps": 1000, "influence": {"damping": 0.1}}, "data": {"ratio": 1}}
    _, html = page(scores(**RUNS), manifest, parameters=parameters, origin=ORIGIN)
    found = section(html, "parameters")
    assert cells_of(found, "<code>training.<wbr>influence.<wbr>damping</code>") == [
        "0.1",
        "the recipe",
    ]
    # What was given instead is not the recipe's.
    assert cells_of(found, "<code>training.<wbr>steps</code>") == ["1000", ""]
    assert cells_of(found, "<code>data.<wbr>ratio</code>") == ["1", ""]
    made = section(html, "origin")
    assert "2026-11-27 14:00 UTC" in made
    assert "<code>kedro run</code>" in made
    assert "<code>1234abcd</code>, with changes that are not committed." in made
    assert "torch 2.15." in made
    _, html = page(scores(**RUNS), origin=replace(ORIGIN, commit=""))
    assert "The commit of the code is not known." in section(html, "origin")


def test_a_frozen_backbone_is_told_of():
    parameters = {"training": {"network": "timm/some_network"}}
    words = "a pretrained backbone, timm/some_network, which was frozen"
    for frozen in (True, False):
        _, html = page(scores(**RUNS), parameters=parameters, frozen=frozen)
        assert (words in section(html, "parameters")) == frozen


def test_the_page_has_a_table_a_cell_and_names_classes():
    near = scores(fixmatch_matched=[80.0, 82.0], learned=[85.0, 88.0])
    runs = pd.concat([near, near.assign(ratio=0.5)])
    cells = [{**cell, "classes": ["cat", "dog"]} for cell in MANIFEST["cells"]]
    more = [{**cell, "ratio": 0.5} for cell in cells]
    _, html = page(runs, {**MANIFEST, "cells": [*cells, *more]})
    assert re.findall("<caption><span>(unseen.*?);", html) == [
        "unseen: 50 % of the pool OOD",
        "unseen: 75 % of the pool OOD",
    ]
    assert section(html, "accuracy").count('<th scope="row">learned weights</th>') == 2
    assert "The verdict belongs to the first of 2 settings." in html
    assert "The seen classes are cat, dog." in html


def test_the_page_copes_without_truth_and_test_labels():
    runs = scores(fixmatch=[np.nan], learned=[np.nan]).assign(ratio=np.nan)
    cells = [
        {**cell, "ratio": None, "pool": {"images": 600}, "heldout": {"images": 0}, "test": 0}
        for cell in MANIFEST["cells"]
    ]
    found, html = page(runs, {**MANIFEST, "cells": cells})
    assert found["verdict"] in html
    assert cells_of(section(html, "accuracy"), "learned weights")[0] == "–"
    data = section(html, "data")
    assert cells_of(data, "1")[:3] == ["24", "600", "0"]
    assert "foreign" not in data
    assert "nan" not in html


def test_the_page_can_be_without_the_study_and_tells_of_a_limit():
    _, html = page(scores(**RUNS), study=None, changes={"time_limit": "Within 5 min."})
    assert "hypergradient behind" not in html
    assert "Within 5 min.</p>" in html


def test_the_page_tells_what_is_in_the_pile_and_names_the_lists():
    pile = {
        "useful": {"sentence": "60 % of the pile looks useful."},
        "files": {"rejected": 3, "copies": 0},
        "advice": ["Label more cats & dogs."],
    }
    sizes = {"classes.json": 240, "model.pt2": 564_000, "gallery.html": 1_300_000}
    _, html = page(scores(**RUNS), changes={"pile": pile}, sizes=sizes)
    found = section(html, "pile")
    assert "<code>classes.json</code> (0.2 kB), <code>model.pt2</code> (0.56 MB)." in found
    assert "gallery.html</a> (1.3 MB)" in found
    assert "<li>Label more cats &amp; dogs.</li>" in found
    assert "60 % of the pile looks useful. 3 files could not be used." in found
    assert "copies of" not in found
    pile["files"] = {"rejected": 1, "copies": 1}
    _, html = page(scores(**RUNS), changes={"pile": pile}, sizes=sizes)
    told = "1 file could not be used. 1 file is a copy of another, or nearly.</p>"
    assert told in section(html, "pile")
    assert 'href="gallery.html"' in found
