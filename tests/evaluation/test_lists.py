"""What to label next, and which labels to check."""

import numpy as np

from weighmatch.evaluation.chosen import HeldOut
from weighmatch.evaluation.lists import (
    BY_FEATURES,
    BY_RUNS,
    CHECK_COLUMNS,
    NEXT_COLUMNS,
    label_next,
    labels_to_check,
)

from .pools import files, pool


def position(path):
    return int(path.split("/")[1][:3])


def test_useful_and_uncertain_images_are_asked_for():
    found = pool()
    found["probabilities"][5] = [0.5, 0.5]
    table = label_next(found, files(50), count=10)
    assert tuple(table.columns) == NEXT_COLUMNS
    assert len(table) == 10
    assert not table["path"].duplicated().any()
    assert 5 in map(position, table["path"].head(3))
    assert table["kept"].all()


def test_what_is_asked_for_is_spread_over_the_pool():
    found = pool(useful=200)
    found["probabilities"][:] = 0.5
    # 180 images in one place, 10 in each of two others.
    places = np.repeat([[3.0, 3.0], [3.0, 4.0], [5.0, 3.0]], [180, 10, 10], axis=0)
    found["features"][:200] = places + 1e-3 * np.random.default_rng(0).normal(size=(200, 2))
    first = [position(path) for path in label_next(found, files(220), count=3)["path"]]
    assert {int(np.searchsorted([180, 190], k, side="right")) for k in first} == {0, 1, 2}


def test_what_is_left_out_is_not_asked_for_and_few_images_are_no_error():
    found = pool(useful=4, foreign=2)
    table = label_next(found, files(6))
    assert [position(path) for path in table["path"].sort_values()] == [0, 1, 2, 3]
    found["kept"][:] = False
    assert len(label_next(found, files(6))) == 0


def labelled(found, names=("cat", "dog")):
    labels = [names[label] for label in found["labels"]]
    return files(len(labels), "labelled", labels=labels)


def test_a_wrong_label_is_found_by_runs_that_did_not_learn_from_it():
    found = pool(labels=20)
    rows = labelled(found)
    labels = found["labels"].copy()
    probabilities = np.where(labels[:, None] == np.arange(2), 0.9, 0.1)
    labels[3] = 1 - labels[3]
    held = HeldOut(tuple(rows["path"]), labels, probabilities)
    table = labels_to_check(found, rows, held)
    assert tuple(table.columns) == CHECK_COLUMNS
    assert table["path"].tolist() == ["labelled/003.png"]
    assert (table["label"][0], table["suggested"][0]) == ("cat", "dog")
    assert table["how"].tolist() == [BY_RUNS]


def test_a_wrong_label_is_found_by_features_where_no_run_left_it_out():
    found = pool(labels=40)
    found["labels"][7] = 1 - found["labels"][7]
    table = labels_to_check(found, labelled(found), None)
    assert table["path"][0] == "labelled/007.png"
    assert set(table["how"]) == {BY_FEATURES}
    assert len(table) == 1


def test_one_label_a_class_cannot_be_checked():
    found = pool(labels=2)
    table = labels_to_check(found, labelled(found), None)
    assert len(table) == 0
    assert tuple(table.columns) == CHECK_COLUMNS
