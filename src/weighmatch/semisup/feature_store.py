"""Features of images by a frozen backbone: computed once, kept in a folder, mapped into memory.

Images are known by their content, so that a changed set of images computes only what is new. What
the views of an image are depends on the image alone, not on which others are computed with it. A
run that is killed goes on at the images that are missing, and a damaged row is computed again.
"""

import hashlib
import json
import logging
import os
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from weighmatch.semisup.config import AugmentationConfig, TrainingConfig
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.backbones import load_backbone
from weighmatch.semisup.parts.state_file import DamagedFileError
from weighmatch.workers import default_workers, one_thread, run_all

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]
Features = NDArray[np.float16]
# To be raised when the same images would get other features.
VERSION = 1
# Images of one job of a worker, and views that the backbone sees at a time.
CHUNK, AT_ONCE = 32, 32
# Rows whose checksums are written together.
RECORD = np.dtype([("content", "S32"), ("check", "<u4")])
# Images that are timed before a long computation is begun, and how long counts as long.
TIMED, LONG_SECONDS = 4, 60.0
TRAINED, SEEN, ROWS = "trained", "seen", "rows.npz"
# The name, among the rows, of the digest of the backbone's weights.
BACKBONE = "backbone"
# What a damaged file raises, by where it is damaged.
UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Recipe:
    """What decides the features of an image.

    Attributes:
        network: see `TrainingConfig`.
        weights: see `TrainingConfig`.
        weak_views: weak views of an image.
        strong_views: strong views of an image.
        augmentation: how views are made.
    """

    network: str
    weights: str
    weak_views: int
    strong_views: int
    augmentation: AugmentationConfig

    @classmethod
    def of(cls, training: TrainingConfig, views: bool) -> "Recipe":
        """The recipe of a run's features, with augmented views or without."""
        weak, strong = training.features.weak_views, training.features.strong_views
        counts = (weak, strong) if views else (0, 0)
        return cls(training.network, training.weights, *counts, training.augmentation)

    @property
    def views(self) -> int:
        """Views of an image, the plain one included."""
        return 1 + self.weak_views + self.strong_views

    def identity(self) -> str:
        """The same for the same features: weights count by their content."""
        parts = {**asdict(self), "weights": self.digest(), "version": VERSION}
        return json.dumps(parts, sort_keys=True)

    def digest(self) -> str:
        """Identifies the weights by their content."""
        return load_backbone(self.network, self.weights).info.digest

    def compute(self, images: NDArray[np.uint8]) -> Features:
        """Features of the plain, weak and strong views of images, (n, views, width).

        Args:
            images: (n, C, H, W).
        """
        backbone, augmentation = self._backbone(), Augmentation(self.augmentation)
        views = []
        for image in torch.from_numpy(np.ascontiguousarray(images)):
            noise = torch.Generator().manual_seed(int(_content(image.numpy())[:15], 16))
            views.append(augmentation.plain(image.unsqueeze(0)))
            for count, make in (
                (self.weak_views, augmentation.weak),
                (self.strong_views, augmentation.strong),
            ):
                if count:
                    views.append(make(image.expand(count, *image.shape), noise))
        with torch.no_grad():
            found = [backbone(part).half() for part in torch.cat(views).split(AT_ONCE)]
        features: Features = torch.cat(found).unflatten(0, (len(images), self.views)).numpy()
        return features

    def _backbone(self) -> torch.nn.Module:
        return load_backbone(self.network, self.weights)


def compute_chunk(recipe: Recipe, images: NDArray[np.uint8], progress: Any) -> Features:
    """A job of a worker process: `Recipe.compute`."""
    features = recipe.compute(images)
    progress(len(images))
    return features


class FeatureStore:
    """Features of the images of training sets and of evaluation images, in one folder.

    Args:
        folder: what `extract` filled.

    Raises:
        DamagedFileError: if it holds no features.
    """

    def __init__(self, folder: Path) -> None:
        self._trained, self._seen = _Table(folder / TRAINED), _Table(folder / SEEN)
        try:
            with np.load(folder / ROWS, allow_pickle=False) as file:
                self._rows = dict(file)
        except UNREADABLE as error:
            raise DamagedFileError(
                f"{folder} holds no features; run the pipeline feature_extraction"
            ) from error

    @classmethod
    def extract(
        cls,
        folder: Path,
        training_sets: Mapping[str, Arrays],
        evaluation_images: Mapping[str, Arrays],
        training: TrainingConfig,
        workers: int | Literal["auto"] = "auto",
    ) -> "FeatureStore":
        """Compute what `folder` does not hold yet.

        Args:
            folder: made if missing; what it holds of other weights or views is replaced.
            training_sets: by key, the arrays of a `TrainingSet` of pixels.
            evaluation_images: by key, arrays of images, of which no views are needed.
            training: says which backbone and views.
            workers: number of processes; "auto": one a core.
        """
        folder.mkdir(parents=True, exist_ok=True)
        rows: dict[str, NDArray[np.int64]] = {}
        names = ("labelled_images", "unlabelled_images")
        trained = {f"{k}/{n}": arrays[n] for k, arrays in training_sets.items() for n in names}
        seen = {f"{k}/{n}": a for k, arrays in evaluation_images.items() for n, a in arrays.items()}
        for name, images, views in ((TRAINED, trained, True), (SEEN, seen, False)):
            table = _Table(folder / name)
            rows |= table.update(Recipe.of(training, views), images, workers)
        partial = folder / f"rows.{os.getpid()}.partial"
        with partial.open("wb") as file:
            digest = np.array(Recipe.of(training, False).digest())
            np.savez_compressed(file, **rows, **{BACKBONE: digest})  # type: ignore[arg-type]
        os.replace(partial, folder / ROWS)
        return cls(folder)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder holds features."""
        return (folder / ROWS).exists()

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove what `extract` wrote to a folder."""
        for name in (TRAINED, SEEN):
            _Table(folder / name).clear()
        (folder / ROWS).unlink(missing_ok=True)

    def training_set(self, key: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """The arrays of a training set of pixels, with stored features in their place."""
        stored = self._trained.features()
        shape = arrays["unlabelled_images"].shape[1:]
        return {
            **arrays,
            "labelled_images": stored[self._of(key, "labelled_images")],
            "unlabelled_images": stored,
            "rows": self._of(key, "unlabelled_images"),
            "image_shape": np.array(shape),
            "backbone": self._rows.get(BACKBONE, np.array("")),
        }

    def evaluation_images(self, key: str, name: str) -> Features:
        """Features of evaluation images, (n, 1, width)."""
        return self._seen.features()[self._of(key, name)]

    def _of(self, key: str, name: str) -> NDArray[np.int64]:
        place = f"{key}/{name}"
        if place not in self._rows:
            raise DamagedFileError(
                f"there are no features of {name} of the set {key}; run the pipeline "
                "feature_extraction"
            )
        rows: NDArray[np.int64] = self._rows[place]
        return rows


def with_features(sets: Mapping[str, Arrays], folder: Path) -> dict[str, Arrays]:
    """The training sets, with the features of `folder` if it holds any."""
    if not FeatureStore.is_in(folder):
        return dict(sets)
    store = FeatureStore(folder)
    return {key: store.training_set(key, arrays) for key, arrays in sets.items()}


def evaluation_inputs(images: Mapping[str, Arrays], folder: Path) -> dict[str, Arrays]:
    """Evaluation images, or their features (n, 1, width) if `folder` holds any."""
    if not FeatureStore.is_in(folder):
        return dict(images)
    store = FeatureStore(folder)
    return {
        key: {name: store.evaluation_images(key, name) for name in arrays}
        for key, arrays in images.items()
    }


def with_rows(arrays: Arrays, rows: NDArray[np.int64]) -> Arrays:
    """A training set with a part of its pool, whose positions are (n,)."""
    known = arrays.get("rows")
    return {**arrays, "rows": rows if known is None else known[rows]}


class _Table:
    """Rows of features with the content of their images, in files that only grow.

    `<name>.features` holds the rows, `<name>.index` a record for each, `<name>.json` the rest. A
    row counts once its record is written.
    """

    def __init__(self, place: Path) -> None:
        self._data, self._index = place.with_suffix(".features"), place.with_suffix(".index")
        self._about = place.with_suffix(".json")

    def clear(self) -> None:
        for path in (self._data, self._index, self._about):
            path.unlink(missing_ok=True)

    def features(self) -> Features:
        """All rows, (rows, views, width), mapped into memory."""
        try:
            about = json.loads(self._about.read_text("utf-8"))
            shape = (len(self._records()), about["views"], about["width"])
            if not shape[0]:
                return np.zeros(shape, np.float16)
            return np.memmap(self._data, np.float16, "r", shape=shape)
        except UNREADABLE as error:
            raise DamagedFileError(
                f"the features in {self._data} are damaged; run the pipeline feature_extraction"
            ) from error

    def update(
        self, recipe: Recipe, images: Arrays, workers: int | Literal["auto"]
    ) -> dict[str, NDArray[np.int64]]:
        """Compute what is missing; returns the row of each image of each array."""
        self._begin(recipe)
        known = {content: row for row, content in enumerate(self._records()["content"].tolist())}
        wanted, rows, contents = _Wanted(), {}, _Contents()
        for name, array in images.items():
            found = np.empty(len(array), np.int64)
            for position, content in enumerate(map(str.encode, contents.of(array))):
                if content not in known:
                    known[content] = len(known)
                    wanted.add(array, position)
                found[position] = known[content]
            rows[name] = found
        self._append(recipe, wanted, workers)
        self._mend(recipe, images, rows)
        return rows

    def _records(self) -> NDArray[Any]:
        if not self._index.exists():
            return np.zeros(0, RECORD)
        content = self._index.read_bytes()
        whole = len(content) // RECORD.itemsize
        return np.frombuffer(content, RECORD, count=whole)

    def _begin(self, recipe: Recipe) -> None:
        """Keep what there is of the same recipe, as far as it is whole; remove the rest."""
        identity = recipe.identity()
        width = load_backbone(recipe.network, recipe.weights).width
        row = recipe.views * width * 2
        try:
            if json.loads(self._about.read_text("utf-8"))["identity"] != identity:
                raise ValueError("features of something else")
            whole = min(len(self._records()), self._data.stat().st_size // row)
        except UNREADABLE:
            whole = 0
            self.clear()
            about = {"identity": identity, "views": recipe.views, "width": width}
            self._about.write_text(json.dumps(about), "utf-8")
        for path, size in ((self._data, row), (self._index, RECORD.itemsize)):
            path.touch()
            os.truncate(path, whole * size)

    def _append(self, recipe: Recipe, wanted: "_Wanted", workers: int | Literal["auto"]) -> None:
        if not len(wanted):
            return
        count = default_workers() if workers == "auto" else workers
        _announce(recipe, wanted, count)
        jobs = _Jobs(recipe, wanted)
        title = f"features of {len(wanted):,} images"
        answers = run_all(compute_chunk, jobs, workers, title=title, total=len(wanted))
        with self._data.open("ab") as data, self._index.open("ab") as index:
            for position, features in _in_order(answers):
                write_rows(data, index, wanted.contents(position), features)

    def _mend(self, recipe: Recipe, images: Arrays, rows: Mapping[str, NDArray[np.int64]]) -> None:
        """Compute rows again whose content is not what was written."""
        records, stored = self._records(), self.features()
        damaged = {
            row for row, check in enumerate(records["check"].tolist())
            if zlib.crc32(stored[row].tobytes()) != check
        }  # fmt: skip
        if not damaged:
            return
        log.warning("%d rows of %s are damaged and are computed again", len(damaged), self._data)
        with self._data.open("r+b") as data, self._index.open("r+b") as index:
            for name, array in images.items():
                for position, row in enumerate(rows[name].tolist()):
                    if row in damaged:
                        damaged.discard(row)
                        pixels = np.asarray(array[position : position + 1])
                        features = recipe.compute(pixels)
                        data.seek(row * features[0].nbytes)
                        index.seek(row * RECORD.itemsize)
                        write_rows(data, index, [_content(pixels[0])], features)


def write_rows(
    data: BinaryIO, index: BinaryIO, contents: Sequence[str], features: Features
) -> None:
    """Write rows, and then the records without which they do not count."""
    data.write(features.tobytes())
    data.flush()
    pairs = zip(contents, features, strict=True)
    records = [(content.encode(), zlib.crc32(row.tobytes())) for content, row in pairs]
    index.write(np.array(records, RECORD).tobytes())
    index.flush()


class _Wanted:
    """Images that are to be computed: where each of them lies."""

    def __init__(self) -> None:
        self._places: list[tuple[NDArray[Any], int]] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, array: NDArray[Any], position: int) -> None:
        self._places.append((array, position))

    def chunk(self, number: int, size: int = CHUNK) -> NDArray[np.uint8]:
        places = self._places[number * CHUNK :][:size]
        return np.stack([np.asarray(array[position]) for array, position in places])

    def contents(self, number: int) -> list[str]:
        return [_content(image) for image in self.chunk(number)]


class _Jobs(Sequence[tuple[Any, ...]]):
    """The calls of `compute_chunk`; images are read when a call begins."""

    def __init__(self, recipe: Recipe, wanted: _Wanted) -> None:
        self._recipe, self._wanted = recipe, wanted

    def __len__(self) -> int:
        return -(-len(self._wanted) // CHUNK)

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError(number)
        return self._recipe, self._wanted.chunk(number)


class _Contents:
    """Hashes of the images of arrays; an array that several sets map from one file counts once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], list[str]] = {}

    def of(self, images: NDArray[Any]) -> list[str]:
        key: tuple[object, ...] = (id(images),)
        if isinstance(images, np.memmap):
            key = (str(images.filename), images.offset, images.shape)
        if key not in self._known:
            self._known[key] = [_content(image) for image in images]
        return self._known[key]


def _content(image: NDArray[Any]) -> str:
    """32 hexadecimal digits that identify an image (C, H, W)."""
    shape = str(image.shape).encode()
    return hashlib.blake2b(shape + image.tobytes(), digest_size=16).hexdigest()


def _in_order(answers: Iterator[tuple[int, Features]]) -> Iterator[tuple[int, Features]]:
    """Answers in the order of their jobs: the same images then give the same file."""
    early: dict[int, Features] = {}
    turn = 0
    for position, features in answers:
        early[position] = features
        while turn in early:
            yield turn, early.pop(turn)
            turn += 1


def _announce(recipe: Recipe, wanted: _Wanted, workers: int) -> None:
    """Say how long it takes, where that is long, and what would take less."""
    few = wanted.chunk(0, TIMED)
    with one_thread():
        recipe.compute(few[:1])
        began = time.monotonic()
        recipe.compute(few)
        seconds = (time.monotonic() - began) / len(few) * len(wanted) / max(workers, 1)
    source = load_backbone(recipe.network, recipe.weights).info.source
    log.info("features of %d images by %s, %d views each", len(wanted), source, recipe.views)
    if seconds > LONG_SECONDS:
        log.info(
            "this takes about %.0f minutes on %d cores; one view an image (training.features."
            "weak_views=0, training.features.strong_views=0) takes about %.0f; smaller images "
            "(data.size) take less in proportion to their area",
            seconds / 60,
            workers,
            seconds / 60 / recipe.views,
        )
