"""The gallery page."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
from PIL import Image

from weighmatch.evaluation.gallery_page import choose_sections, render_gallery, thumbnail


def ranking(count=200, classes=("cat", "dog & <b>")):
    kept = np.arange(count) < count // 2
    return pd.DataFrame(
        {
            "path": [f"a/{k}.png" for k in range(count)],
            "score": np.linspace(1, 0, count),
            "weight": np.where(kept, 1.9, 0.1),
            "kept": kept,
            "predicted_class": [classes[k % len(classes)] for k in range(count)],
            "probability": 0.75,
            "confidence": 0.5,
            "near_duplicate_of": "",
            "why_low": np.where(kept, "", "unlike the labelled images; the classifier is unsure"),
        }
    )


def image(row):
    return np.full((3, 8, 8), row % 256, np.uint8)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def tags_of(page):
    parser = Tags()
    parser.feed(page)
    assert parser.open == []
    return parser.found


def test_both_ends_of_the_ranking_and_of_each_class_are_shown():
    sections = choose_sections(ranking())
    titles = [section.title for section in sections]
    assert titles[:4] == [
        "Trusted most",
        "Trusted least",
        "cat: trusted most",
        "cat: trusted least",
    ]
    assert sections[0].rows == tuple(range(48))
    assert sections[1].rows[0] == 199
    assert sections[2].rows == tuple(range(0, 24, 2))


def test_a_few_images_are_in_one_list_each():
    rows = [row for section in choose_sections(ranking(5, ("cat",)))[:2] for row in section.rows]
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert len(choose_sections(ranking(1, ("cat",)))) == 2


def test_the_page_is_whole_self_contained_and_escaped():
    page = render_gallery(ranking(), image)
    tags = tags_of(page)
    assert "http://" not in page
    assert "https://" not in page
    assert "dog & <b>" not in page
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in images)
    assert "100 of 200 images were kept" in page


def test_the_page_can_be_used_without_a_mouse_or_a_screen():
    tags = tags_of(render_gallery(ranking(), image))
    for tag, attributes in tags:
        if tag == "img":
            assert re.match(r"a/\d+\.png, predicted ", attributes["alt"])
        if tag == "section":
            assert ("h2", {"id": attributes["aria-labelledby"]}) in tags
    labelled = sum(tag == "label" for tag, _ in tags)
    assert labelled == sum(tag in ("select", "input") for tag, _ in tags)
    assert ("output", {"id": "count", "aria-live": "polite"}) in tags
    assert any(tag == "a" and attributes.get("href") == "#images" for tag, attributes in tags)
    names = {attributes.get("name") for tag, attributes in tags if tag == "meta"}
    assert "viewport" in names


def test_filters_offer_each_class_and_single_reason():
    page = render_gallery(ranking(), image)
    assert page.count("<option>unlike the labelled images</option>") == 1
    assert page.count("<option>the classifier is unsure</option>") == 1
    assert page.count("<option>cat</option>") == 1


def test_a_thumbnail_is_the_image_if_small_and_smaller_if_not():
    def read(uri):
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    assert np.array_equal(np.asarray(read(thumbnail(pixels))), pixels.transpose(1, 2, 0))
    assert np.array_equal(np.asarray(read(thumbnail(pixels[:1]))), pixels[0])
    large = read(thumbnail(np.zeros((3, 200, 100), np.uint8)))
    assert large.size == (48, 96)
    assert large.format == "JPEG"


def test_a_part_of_a_ranking_says_of_how_many_it_is():
    assert "1,000,000 images were ranked" in render_gallery(ranking(), image, total=1_000_000)
