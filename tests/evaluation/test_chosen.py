"""The run that is handed out, and what its like say of labelled images that were held out."""

import numpy as np
import pandas as pd

from weighmatch.evaluation.chosen import (
    choose_run,
    describe_limit,
    held_out,
    held_out_by_best,
    paths_of,
    trained_part,
)

from .pools import files


def folder_runs():
    """Three folds of the learned arm, and a run on everything."""
    rows = [
        {"run": f"learned-{key}", "key": key, "arm": "learned", "setting": setting, "seed": seed}
        for key, setting, seed in (
            ("f-0", "folder", 0),
            ("f-1", "folder", 1),
            ("f-2", "folder", 2),
            ("all", "all", 0),
        )
    ]
    cell = {"source": "folder", "regime": None, "ratio": np.nan, "labels_per_class": 4}
    return pd.DataFrame(rows).assign(schedule="rounds", **cell)


def test_the_run_on_every_labelled_image_is_handed_out():
    assert choose_run(folder_runs())["run"] == "learned-all"


def test_folds_say_what_each_labelled_image_looks_like_to_those_that_did_not_see_it():
    runs = folder_runs()
    found = {"learned-all": dict}
    labels, tables = {}, []
    for fold in range(3):
        likely = np.full((2, 2), 0.5)
        likely[:, 0] = fold / 10
        found[f"learned-f-{fold}"] = lambda likely=likely: {"test_probabilities": likely}
        labels[f"f-{fold}"] = {"labels": np.array([0, 1])}
        # The first image of the third fold was in the first one, too.
        names = [f"{fold}a", f"{fold}b"] if fold < 2 else ["0a", "2b"]
        tables.append(files(2, "test", key=f"f-{fold}").assign(path=names))
    held = held_out(runs, found, labels, pd.concat(tables))
    assert held.paths == ("0a", "0b", "1a", "1b", "2b")
    assert held.labels.tolist() == [0, 1, 0, 1, 1]
    assert held.probabilities[:, 0].round(6).tolist() == [0.1, 0, 0.1, 0.1, 0.2]


def test_labels_are_checked_by_the_arm_that_is_right_most_often():
    learned = folder_runs()
    alone, oracle = (
        learned.assign(run=learned["run"].str.replace("learned", arm), arm=arm, schedule="online")
        for arm in ("supervised", "oracle")
    )
    runs = pd.concat([learned, alone, oracle], ignore_index=True)
    labels = {f"f-{fold}": {"labels": np.array([0, 1])} for fold in range(3)}
    tables = [
        files(2, "test", key=f"f-{fold}").assign(path=[f"{fold}a", f"{fold}b"]) for fold in range(3)
    ]

    def judge(**right):
        """The probability of the first image's label, where arms are right of so many of two."""
        found = {}
        for name, arm in zip(runs["run"], runs["arm"], strict=True):
            likely = np.array([[0.9, 0.1], [0.9, 0.1]])
            likely[1] = likely[1, ::-1] if right[arm] > 1 else likely[1]
            likely[0] = likely[0, ::-1] if right[arm] < 1 else likely[0]
            found[name] = lambda likely=likely: {"test_probabilities": likely}
        held = held_out_by_best(runs, found, labels, pd.concat(tables))
        return held.accuracy(), held.probabilities[0, 0]

    assert judge(learned=0, supervised=1, oracle=2) == (0.5, 0.9)  # no arm that knows the truth
    assert judge(learned=2, supervised=0, oracle=0) == (1, 0.9)
    held = held_out_by_best(learned, dict.fromkeys(runs["run"], dict), {}, files(2))
    assert held is None


def test_nothing_is_held_out_without_a_test_set():
    runs = folder_runs()
    found = dict.fromkeys(runs["run"], dict)
    assert held_out(runs, found, {}, files(2)) is None


def test_a_place_has_its_original_and_not_its_copies():
    rows = files(4)
    rows["index"] = [1, 1, 0, -1]
    rows["duplicate_of"] = ["c.png", "", "", "x.png"]
    assert paths_of(rows, "k", "pool") == ["pool/002.png", "pool/001.png"]


def test_what_a_time_limit_left_out_is_said():
    manifest = {"cells": [{"key": f"f-{k}", "seed": k} for k in range(6)], "source": "folder"}
    manifest["cells"].append({"key": "all", "seed": 0})
    runs = folder_runs().assign(steps=800)
    matched = runs.assign(arm="fixmatch_matched", steps=1900)
    staged = runs.assign(schedule="two_stages", steps=700)
    runs = pd.concat([runs, matched, staged])
    part = trained_part(manifest, runs)
    assert [cell["key"] for cell in part["cells"]] == ["f-0", "f-1", "f-2", "all"]
    assert part["source"] == "folder"
    assert describe_limit(manifest, runs, 1500, None) is None
    assert describe_limit(manifest, runs, 1500, "15m") == (
        "Within runs.time_limit 15m runs have 800 of 1,500 steps each, and 3 of 6 seeds were "
        "trained."
    )
    assert describe_limit(manifest, staged, 1500, "15m") == (
        "Within runs.time_limit 15m 3 of 6 seeds were trained."
    )
