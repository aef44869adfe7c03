"""The ranking table: order, calibration, and words for what ranks low."""

import numpy as np
import pytest

from weighmatch.evaluation.chosen import HeldOut
from weighmatch.evaluation.ranking import (
    COLUMNS,
    calibrate,
    explain,
    fit_temperature,
    ranking_table,
)

from .pools import files, pool


def held(confidence, right, count=400):
    """Held-out images of two classes that a classifier is `confident` of and so often right."""
    labels = (np.arange(count) % 2).astype(np.int64)
    said = np.where(np.arange(count) < right * count, labels, 1 - labels)
    probabilities = np.full((count, 2), 1 - confidence)
    probabilities[np.arange(count), said] = confidence
    return HeldOut(tuple(map(str, range(count))), labels, probabilities)


def test_the_table_is_sorted_and_complete():
    found = pool()
    table = ranking_table(found, files(50), None)
    assert tuple(table.columns) == COLUMNS
    assert sorted(table["path"]) == sorted(files(50)["path"])
    assert table["kept"].tolist() == [True] * 30 + [False] * 20
    for _, part in table.groupby("kept"):
        assert part["score"].is_monotonic_decreasing
    assert set(table["predicted_class"]) == {"cat", "dog"}
    assert table["probability"].isna().all()
    first = int(table["path"][0].split("/")[1][:3])
    assert table["confidence"][0] == found["probabilities"][first].max()
    assert table["score"][0] == found["scores"][first]


def test_a_classifier_that_is_too_sure_is_made_less_sure():
    sure = held(0.99, 0.8)
    temperature = fit_temperature(sure)
    assert calibrate(sure.probabilities, temperature).max(axis=1).mean() == pytest.approx(
        0.8, abs=0.03
    )
    doubtful = held(0.7, 0.9)
    assert fit_temperature(doubtful) < 1 < temperature
    table = ranking_table(pool(), files(50), temperature)
    assert (table["probability"] < table["confidence"]).all()


def test_a_few_labels_do_not_calibrate_and_none_give_none():
    few = held(0.7, 1.0, count=4)
    assert 0.7 < fit_temperature(few) < 1
    assert fit_temperature(None) is None


def test_low_images_have_a_reason_and_kept_ones_none():
    found = pool()
    found["influence"][40] = -1.0
    words = explain(found)
    assert words[:30] == [""] * 30
    assert all("unlike the labelled images" in text for text in words[30:])
    assert all("the classifier is unsure" in text for text in words[30:])
    assert "raise the loss" in words[40]
    everything = {**found, "kept": np.ones(50, bool)}
    assert explain(everything) == [""] * 50


def test_an_image_that_nothing_speaks_against_is_told_that_others_rank_higher():
    found = pool()
    found["kept"][0], found["scores"][0] = False, 1.0
    assert explain(found)[0].endswith("enough images of its class rank higher")


def test_copies_have_a_row_with_the_score_of_their_original_and_no_weight():
    rows = files(5)
    rows["index"] = [0, 1, 0, 0, -1]
    rows["duplicate_of"] = ["", "", "pool/000.png", "", "labelled/cat.png"]
    rows["near_duplicate_of"] = ["", "", "", "pool/000.png", ""]
    table = ranking_table(pool(useful=2, foreign=0), rows, None).set_index("path")
    assert table["near_duplicate_of"].to_dict() == {
        "pool/000.png": "",
        "pool/001.png": "",
        "pool/002.png": "pool/000.png",
        "pool/003.png": "pool/000.png",
        "pool/004.png": "labelled/cat.png",
    }
    copies = table[table["near_duplicate_of"] != ""]
    assert not copies["kept"].any()
    assert (copies["weight"] == 0).all()
    assert set(copies["why_low"]) == {"a copy of another file"}
    assert table["score"]["pool/002.png"] == table["score"]["pool/000.png"]
    assert np.isnan(table["score"]["pool/004.png"])
    assert table["predicted_class"]["pool/004.png"] == ""
    assert table.index[-1] == "pool/004.png"
