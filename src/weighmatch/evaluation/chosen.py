"""The run whose ranking and model are shown and handed out, and what its like say out of fold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weighmatch.arms import LEARNED, SCHEDULES, get_arm
from weighmatch.evaluation.judging import CELL, Arrays, Predictions

# The setting of the runs that learn from every labelled image of a folder.
EVERYTHING = "all"


def choose_run(runs: pd.DataFrame) -> Mapping[Any, Any]:
    """The run whose ranking is shown, in its last schedule.

    It is the one that learned from every labelled image, or else the first seed of the first cell.
    Learned weights are shown if they were trained, or else another arm that weighs, rivals and
    those that score new images first.
    """
    everything = runs[runs["setting"] == EVERYTHING]
    first = everything if len(everything) else runs.merge(runs[list(CELL)].head(1))

    def rank(run: Mapping[Any, Any]) -> tuple[Any, ...]:
        arm = get_arm(run["arm"])
        wanted = (arm == LEARNED, arm.weighs, arm.inductive, arm.rival)
        return *(not wish for wish in wanted), -SCHEDULES.index(run["schedule"]), run["seed"]

    return min(first.to_dict("records"), key=rank)


def trained_part(manifest: Mapping[str, Any], runs: pd.DataFrame) -> Mapping[str, Any]:
    """The manifest with the cells that have a run; `runs.time_limit` may leave out the others."""
    cells = [cell for cell in manifest["cells"] if cell["key"] in set(runs["key"])]
    return {**manifest, "cells": cells}


def describe_limit(
    manifest: Mapping[str, Any], runs: pd.DataFrame, steps: int, limit: str | None
) -> str | None:
    """A sentence on what was trained within `runs.time_limit`, or None where there is no limit.

    Args:
        manifest: `cells`, a list with `key` and `seed` of each set of splits.
        runs: as in `judge_runs`.
        steps: `training.steps` as it was asked for.
        limit: `runs.time_limit`.
    """
    if limit is None:
        return None
    asked = {cell["seed"] for cell in manifest["cells"]}
    # In two stages a run has more steps, and matched arms have others.
    plain = runs["arm"].map(lambda arm: get_arm(arm).compute == "equal")
    taken = runs.loc[plain & (runs["schedule"] != "two_stages"), "steps"]
    each = f"runs have {taken.min():,} of {steps:,} steps each, and " if len(taken) else ""
    trained = runs["seed"].nunique()
    return f"Within runs.time_limit {limit} {each}{trained} of {len(asked)} seeds were trained."


@dataclass(frozen=True)
class HeldOut:
    """What classifiers say of labelled images that they were not trained on.

    Attributes:
        paths: the file of each image, (n,).
        labels: its label, (n,).
        probabilities: the mean over the classifiers that did not learn from it, (n, classes).
    """

    paths: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    def accuracy(self) -> float:
        """The share of images that are classified as they are labelled."""
        return float((self.probabilities.argmax(axis=1) == self.labels).mean())


def held_out(
    runs: pd.DataFrame,
    predictions: Predictions,
    test_labels: Mapping[str, Arrays],
    files: pd.DataFrame,
) -> HeldOut | None:
    """Predictions out of fold by the chosen run, or by those that stand in for it.

    The run that learned from every labelled image has none. Those of its arm and schedule that
    were trained on a part of them stand in for it.

    Args:
        runs: as in `judge_runs`.
        predictions: as in `judge_runs`.
        test_labels: as in `judge_runs`.
        files: the table `image_files`.

    Returns:
        What was found, in the order of the paths; None: no labelled image was held out.
    """
    run, alike = choose_run(runs), _alike(runs)
    mine = alike[(alike["arm"] == run["arm"]) & (alike["schedule"] == run["schedule"])]
    return _predicted(mine, predictions, test_labels, files)


def held_out_by_best(
    runs: pd.DataFrame,
    predictions: Predictions,
    test_labels: Mapping[str, Arrays],
    files: pd.DataFrame,
) -> HeldOut | None:
    """Predictions out of fold by the arm that has most of them right; see `held_out`.

    An unlabelled pile that does harm would have the learned arm doubt labels that are right.
    """
    alike = _alike(runs)
    blind = alike[[get_arm(arm).pool in ("none", "whole") for arm in alike["arm"]]]
    parts = [part for _, part in blind.groupby(["arm", "schedule"], sort=False)]
    judges = [_predicted(part, predictions, test_labels, files) for part in parts]
    able = [judge for judge in judges if judge is not None]
    return max(able, key=HeldOut.accuracy, default=None)


def _alike(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of all arms that are held against the chosen one, its own arm's first."""
    run = choose_run(runs)
    whole = run["setting"] == EVERYTHING
    alike = runs[runs["setting"] != EVERYTHING] if whole else runs[runs["key"] == run["key"]]
    return alike.iloc[np.argsort(alike["arm"] != run["arm"], kind="stable")]


def _predicted(
    runs: pd.DataFrame,
    predictions: Predictions,
    test_labels: Mapping[str, Arrays],
    files: pd.DataFrame,
) -> HeldOut | None:
    tables = []
    for name, key in zip(runs["run"], runs["key"], strict=True):
        found = predictions[name]() if key in test_labels else {}
        if "test_probabilities" in found:
            table = pd.DataFrame(found["test_probabilities"].astype(np.float64))
            table["label"] = test_labels[key]["labels"]
            tables.append(table.assign(path=paths_of(files, key, "test")))
    if not tables:
        return None
    means = pd.concat(tables).groupby("path").mean()
    return HeldOut(
        tuple(means.index),
        means["label"].to_numpy().astype(np.int64),
        means.drop(columns="label").to_numpy(),
    )


def files_of(files: pd.DataFrame, key: str, split: str) -> pd.DataFrame:
    """The file behind each image of one key and split, in the order of its arrays.

    Copies, which have the place of their original, have no row.
    """
    mine = files[(files["key"] == key) & (files["split"] == split) & (files["index"] >= 0)]
    copy = (mine["duplicate_of"] != "") | (mine["near_duplicate_of"] != "")
    ordered = mine.assign(copy=copy).sort_values(["index", "copy"], kind="stable")
    return ordered.drop_duplicates("index").drop(columns="copy").reset_index(drop=True)


def paths_of(files: pd.DataFrame, key: str, split: str) -> list[str]:
    """The file behind each image of one key and split, in the order of its arrays."""
    return [str(path) for path in files_of(files, key, split)["path"]]
