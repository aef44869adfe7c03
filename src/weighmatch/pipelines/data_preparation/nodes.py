"""Nodes of `data_preparation`."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from weighmatch.arms import declare
from weighmatch.data.config import DataConfig
from weighmatch.data.files import Rejected
from weighmatch.data.grid import Cell, GridConfig, make_cells, names_without_effect
from weighmatch.data.ood import KIND_NAMES
from weighmatch.data.source import get_source
from weighmatch.data.splits import Arrays, Splits, Unlabelled, fingerprint
from weighmatch.evaluation import gallery

Partitions = dict[str, Arrays]
# Images that a row of the figure of samples shows.
SAMPLES_PER_ROW = 14


def load_images(grid: GridConfig, data: DataConfig, cache_folder: str | None = None) -> Arrays:
    """Load what the source draws the splits of every cell from.

    Args:
        grid: the cells.
        data: what all cells share.
        cache_folder: a folder for images that are decoded once; None: that of the source.

    Raises:
        ValueError: if the source has too little to draw from.
    """
    source = get_source(data.source)
    # Only a source's own parameters tell what it loads.
    different = {cell.data.own: cell.data for cell in make_cells(grid, data)}
    arrays: Arrays = {}
    for config in different.values():
        arrays |= source.load_cached(config, Path(cache_folder) if cache_folder else None)
    return arrays


def draw_splits(
    raw_images: Arrays, grid: GridConfig, data: DataConfig
) -> tuple[
    Partitions, Partitions, Partitions, Partitions, dict[str, Any], pd.DataFrame, pd.DataFrame
]:
    """Draw one set of splits a cell and seed, so cut that training may see all of its own file.

    Where the source hands out a model, there is one set more a cell: all labelled images, without
    a test set.

    Returns:
        Training sets, evaluation images, truth about OOD and test labels, each by `Cell.key`,
        a manifest with parameters, counts and fingerprints, the file behind each image, and the
        files that are rejected. Truth and test labels have no entry where the source knows none.
    """
    source = get_source(data.source)
    training, evaluation, truth, labels = {}, {}, {}, {}
    described, files = [], []
    hashed: dict[int, str] = {}
    rejected: dict[Rejected, None] = {}
    for cell, seed, splits in _draw_all(raw_images, grid, data):
        key = cell.key(seed)
        training[key] = _present(
            labelled_images=splits.labelled_images,
            labels=splits.labels,
            unlabelled_images=splits.pool.images,
            class_names=np.array(splits.class_names, np.str_),
        )
        evaluation[key] = _present(
            test_images=splits.test_images,
            heldout_images=splits.heldout and splits.heldout.images,
        )
        known = _truth("pool", splits.pool) | _truth("heldout", splits.heldout)
        if known:
            truth[key] = known
        if splits.test_labels is not None:
            labels[key] = _present(labels=splits.test_labels, shifted=splits.test_shifted)
        images = {**training[key], **evaluation[key]}
        # All folds of a folder have the same pool, which is hashed once.
        for array in images.values():
            if id(array) not in hashed:
                hashed[id(array)] = fingerprint(array)
        found = {name: hashed[id(array)] for name, array in images.items()}
        described.append(_describe(cell, seed, splits, found))
        described[-1] |= source.describe(raw_images, cell.data)
        rejected |= dict.fromkeys(source.rejected(raw_images, cell.data))
        files.append(pd.DataFrame({"key": key, **vars(splits.name_files())}))
    _level_labels(described)
    idle = names_without_effect(data.source)
    manifest = {
        "parameters": {k: v for k, v in data.parameters().items() if k not in idle},
        "recipe": source.recipe(data),
        "primary": declare(source.contaminates).names(),
        "cells": described,
    }
    table = pd.DataFrame([asdict(one) for one in rejected], columns=["path", "reason"])
    return training, evaluation, truth, labels, manifest, pd.concat(files), table


def _draw_all(
    raw_images: Arrays, grid: GridConfig, data: DataConfig
) -> Iterator[tuple[Cell, int, Splits]]:
    source = get_source(data.source)
    for cell in make_cells(grid, data):
        for seed in source.seeds(raw_images, cell.data):
            yield cell, seed, source.draw(raw_images, cell.data, seed)
        everything = source.draw_all(raw_images, cell.data)
        if everything is not None:
            yield replace(cell, part="all"), cell.data.seeds[0], everything


def _present(**arrays: Any) -> Arrays:
    return {name: array for name, array in arrays.items() if array is not None}


def _truth(place: str, images: Unlabelled | None) -> Arrays:
    if images is None:
        return {}
    truth = _present(sources=images.kinds, classes=images.classes, shifted=images.shifted)
    return {f"{place}_{name}": array for name, array in truth.items()}


def _describe(
    cell: Cell, seed: int, splits: Splits, fingerprints: dict[str, str]
) -> dict[str, object]:
    """Describe one set of splits: an entry of the manifest's list `cells`."""
    data = cell.data
    labelled = np.bincount(splits.labels, minlength=len(splits.class_names))
    return {
        "key": cell.key(seed),
        "setting": cell.part or cell.setting,
        "regime": data.regime if cell.contaminated else None,
        "ratio": data.ratio if cell.contaminated else None,
        "ood_source": data.ood_source if cell.contaminated else None,
        # Where classes have different numbers of labels: the smallest.
        "labels_per_class": int(labelled.min()),
        "source": data.source,
        "seed": seed,
        "classes": list(splits.class_names),
        "labelled": int(labelled.sum()),
        "pool": _count(splits.pool, data),
        "heldout": _count(splits.heldout, data),
        "test": 0 if splits.test_images is None else len(splits.test_images),
        "fingerprints": fingerprints,
    }


def _level_labels(cells: list[dict[str, object]]) -> None:
    """Give the folds of one setting one number of labels, the smallest, so that they are paired."""
    fewest: dict[tuple[object, ...], Any] = {}
    places = [tuple(cell[name] for name in ("setting", "regime", "ratio")) for cell in cells]
    for place, cell in zip(places, cells, strict=True):
        fewest[place] = min(fewest.get(place, cell["labels_per_class"]), cell["labels_per_class"])
    for place, cell in zip(places, cells, strict=True):
        cell["labels_per_class"] = fewest[place]


def _count(images: Unlabelled | None, data: DataConfig) -> dict[str, object]:
    """Count unlabelled images, by kind where their kinds are known."""
    if images is None or images.kinds is None:
        return {"images": 0 if images is None else len(images.images)}
    total, counts = len(images.kinds), np.bincount(images.kinds, minlength=len(KIND_NAMES)).tolist()
    possible = ("id", *get_source(data.source).ood_kinds)
    by_kind = {name: counts[KIND_NAMES.index(name)] for name in possible}
    return {"images": total, "id": counts[0], "ood": total - counts[0], "by_source": by_kind}


def draw_samples(training_sets: Partitions, ood_truth: Partitions) -> Figure:
    """Draw labelled images and pool images of the first set, a row a kind where kinds are known."""
    key = next(iter(training_sets))
    pool, labelled = (training_sets[key][f"{n}_images"] for n in ("unlabelled", "labelled"))
    # Labelled images are ordered by class: some of each are shown.
    count = min(SAMPLES_PER_ROW, len(labelled))
    rows = {"labelled": labelled[np.linspace(0, len(labelled) - 1, count).round().astype(int)]}
    kinds = ood_truth.get(key, {}).get("pool_sources")
    title = "What training is given"
    if kinds is None:
        rows["unlabelled"] = pool[:SAMPLES_PER_ROW]
        return gallery.draw_samples(rows, title)
    for code in np.unique(kinds):
        rows[KIND_NAMES[code]] = pool[kinds == code][:SAMPLES_PER_ROW]
    share = 100 * float((kinds != 0).mean())
    return gallery.draw_samples(rows, f"{title}: {share:.0f} % of the unlabelled pool is OOD")
