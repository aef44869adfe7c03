"""Own images: a folder with some labelled images and a pile of others, as it is found."""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from weighmatch.checks import counted, require_choice, require_integer
from weighmatch.data.cache import ReadImages, read_images
from weighmatch.data.config import DataConfig
from weighmatch.data.duplicates import find_copies
from weighmatch.data.files import FITS, Fit, Rejected, look_at
from weighmatch.data.layout import CURE, PLACES, Layout, read_layout
from weighmatch.data.recipes import make_recipe
from weighmatch.data.source import (
    Recipe,
    Source,
    UnusableDataError,
    Wishes,
    register,
    tag_arrays,
    untag_arrays,
)
from weighmatch.data.splits import Arrays, Files, Images, Labels, Splits, Unlabelled, stream

log = logging.getLogger(__name__)

# With one seed and no test folder, this many folds are cut and the first is tested on.
FOLDS_OF_ONE_SEED = 5
TEST, LABELLED, POOL = range(len(PLACES))


@dataclass(frozen=True)
class FolderParameters:
    """The parameters of a folder of images.

    Attributes:
        root: the folder, seen from where the command is given.
        size: the side of the images in pixels; "auto": that of small images, 32 for others.
        channels: 1 for grey, 3 for colour; "auto": 3 if an image has colours.
        fit: "crop" or "pad", see `weighmatch.data.files.decode`.
        background: what shows through transparent images and pads: a name or "#rrggbb".
    """

    root: str = ""
    size: int | Literal["auto"] = "auto"
    channels: int | Literal["auto"] = "auto"
    fit: Fit = "crop"
    background: str = "white"

    def __post_init__(self) -> None:
        if not isinstance(self.root, str):
            raise ValueError(f"data.root must be the path of a folder, got {self.root!r}")
        if self.size != "auto":
            require_integer("data.size", self.size, 8)
        if self.channels not in ("auto", 1, 3):
            raise ValueError(f"data.channels must be auto, 1 or 3, got {self.channels!r}")
        require_choice("data.fit", self.fit, FITS)
        if not _is_colour(self.background):
            raise ValueError(
                f"data.background {self.background!r} is no colour; give a name such as white, or "
                '"#rrggbb"'
            )


def _is_colour(name: object) -> bool:
    if not isinstance(name, str):
        return False
    if name in ("white", "black", "grey") or re.fullmatch("#[0-9a-fA-F]{6}", name):
        return True
    from PIL import ImageColor

    try:
        ImageColor.getrgb(name)
    except ValueError:
        return False
    return True


@register
class Folder(Source[FolderParameters]):
    """Images of a folder: no truth about the pool, and a test set only where there is one.

    Without test images the seeds are folds of the labelled images: the k-th seed is tested on the
    k-th fold and trained on the others.
    """

    name = "folder"
    parameters = FolderParameters
    contaminates = False
    without_effect = ("labels_per_class", "heldout_size", "test_size", "shifted")

    def class_names(self, config: DataConfig) -> tuple[str, ...]:
        layout = read_layout(self.own(config).root)
        return tuple(sorted({f.label for f in layout.files if f.place == "labelled"}))

    def load(self, config: DataConfig) -> Arrays:
        return self.load_cached(config, None)

    def load_cached(self, config: DataConfig, cache: Path | None) -> Arrays:
        own = self.own(config)
        layout = read_layout(own.root)
        _require_files(layout)
        images = read_images(layout.listing, self.shape(config), own.fit, own.background, cache)
        return tag_arrays(_Sorted(layout, images).arrays(), own)

    def check_found(self, config: DataConfig) -> None:
        _require_files(read_layout(self.own(config).root))

    def shape(self, config: DataConfig) -> tuple[int, int, int]:
        """Channels, height and width of the images, as asked for or as fits what is found."""
        own = self.own(config)
        size, channels = own.size, own.channels
        if size == "auto" or channels == "auto":
            found = look_at(read_layout(own.root).listing)
            size = found.side if size == "auto" else size
            channels = found.channels if channels == "auto" else channels
        return channels, size, size

    def seeds(self, raw: Arrays, config: DataConfig) -> tuple[int, ...]:
        found = _seeds(untag_arrays(raw, config.own), config)
        if len(found) < len(config.seeds):
            log.warning(
                "there are %d folds and not %d, as no more labelled images can be tested on",
                len(found),
                len(config.seeds),
            )
        return found

    def draw(self, raw: Arrays, config: DataConfig, seed: int) -> Splits:
        raw = untag_arrays(raw, config.own)
        if len(raw["test_images"]):
            test = (raw["test_images"], raw["test_labels"])
            return _splits(raw, np.arange(len(raw["labels"])), test, np.empty(0, np.int64))
        seeds = _seeds(raw, config)
        count = len(seeds) if len(config.seeds) > 1 else FOLDS_OF_ONE_SEED
        fold = _folds(raw["labels"], count, seeds[0]) == seeds.index(seed)
        tested = np.flatnonzero(fold)
        test = (raw["labelled_images"][tested], raw["labels"][tested])
        return _splits(raw, np.flatnonzero(~fold), test, tested)

    def draw_all(self, raw: Arrays, config: DataConfig) -> Splits:
        raw = untag_arrays(raw, config.own)
        return _splits(raw, np.arange(len(raw["labels"])), None, np.empty(0, np.int64))

    def rejected(self, raw: Arrays, config: DataConfig) -> list[Rejected]:
        raw = untag_arrays(raw, config.own)
        pairs = zip(raw["rejected_paths"].tolist(), raw["rejected_reasons"].tolist(), strict=True)
        return [Rejected(path, reason) for path, reason in pairs]

    def recipe(self, config: DataConfig, wishes: Wishes = Wishes()) -> Recipe:  # noqa: B008
        layout = read_layout(self.own(config).root)
        pool = sum(file.place == "pool" for file in layout.files)
        return make_recipe(self.shape(config), pool, wishes=wishes)

    def describe(self, raw: Arrays, config: DataConfig) -> dict[str, object]:
        raw = untag_arrays(raw, config.own)
        counts = Counter(
            f"{kind} in {PLACES[place]}"
            for kind in ("exact", "near")
            for copy, place in zip(raw[f"{kind}_copy_of"], raw["places"], strict=True)
            if copy
        )
        return {
            "rejected": len(raw["rejected_paths"]),
            "duplicates": dict(sorted(counts.items())),
            "root": str(raw["root"]),
        }


def _require_files(layout: Layout) -> None:
    """Refuse a folder that cannot be used before its files are read."""
    labels = {file.label for file in layout.files if file.place == "labelled"}
    _require_classes(sorted(labels), layout)
    if not any(file.place == "pool" for file in layout.files):
        raise UnusableDataError(f"{layout.listing.root} has no unlabelled image; {CURE}")


def _require_classes(names: list[str], layout: Layout) -> None:
    root = layout.listing.root
    if not names:
        raise UnusableDataError(
            f"{root} has no class with a labelled image that can be used; {CURE}"
        )
    if len(names) < 2:
        raise UnusableDataError(
            f"{root} has labelled images of the class {names[0]} alone, and a classifier needs two "
            "classes or more; add labelled images of another class"
        )


class _Sorted:
    """The images of a folder by what they are for, each copy once."""

    def __init__(self, layout: Layout, images: ReadImages) -> None:
        self.layout, self.images = layout, images
        said = {file.path: file for file in layout.files}
        self.files = [said[path] for path in images.paths]
        self.places = np.array([PLACES.index(file.place) for file in self.files], np.int64)
        self.labels = np.array([file.label for file in self.files], np.str_)
        self.rejected = list(images.rejected)
        copies = find_copies(images.content, images.perceptual, images.stored, images.rows)
        self.exact, self.near, self.original = copies.exact, copies.near, copies.original
        self.counts = self.original == np.arange(len(self.files))
        self.classes = self._find_classes()

    def _find_classes(self) -> list[str]:
        mine = self.counts & (self.places == LABELLED)
        found = Counter(self.labels[mine].tolist())
        _require_classes(sorted(found), self.layout)
        if not (self.counts & (self.places == POOL)).any():
            raise UnusableDataError(
                f"{self.layout.listing.root} has no unlabelled image that can be used and is no "
                f"copy of a labelled or test image; {CURE}"
            )
        top = next(f.path for f in self.files if f.place == "labelled").partition("/")[0]
        for name in self.layout.named:
            if not found[name]:
                reason = "the class has no image that can be used, and is left out"
                self.rejected.append(Rejected(f"{top}/{name}", reason))
            elif found[name] == 1:
                reason = "the class has one image: it is trained on, but nothing tells how well"
                self.rejected.append(Rejected(f"{top}/{name}", reason))
        return sorted(found)

    def arrays(self) -> Arrays:
        """The raw arrays that splits are drawn from."""
        known = np.isin(self.labels, self.classes)
        self._reject_unknown_tests(known)
        index = np.full(len(self.files), -1, np.int64)
        chosen = {}
        for place in range(len(PLACES)):
            mine = self.counts & (self.places == place)
            if place == TEST:
                mine &= known
            chosen[place] = np.flatnonzero(mine)
            index[chosen[place]] = np.arange(len(chosen[place]))
        # A copy stands for its original, where that is of the same place.
        same = self.places[self.original] == self.places
        index = np.where(same, index[self.original], -1)
        rejected = sorted(self.rejected, key=lambda one: one.path)
        paths = np.array(self.images.paths, np.str_)
        shown = known | (self.places != TEST)
        self._report(len(rejected))
        return {
            "labelled_images": self._images(chosen[LABELLED]),
            "labels": self._codes(chosen[LABELLED]),
            "pool_images": self._images(chosen[POOL]),
            "test_images": self._images(chosen[TEST]),
            "test_labels": self._codes(chosen[TEST]),
            "class_names": np.array(self.classes, np.str_),
            "paths": paths[shown],
            "places": self.places[shown],
            "index": index[shown],
            "path_labels": self.labels[shown],
            "exact_copy_of": np.where(self.exact >= 0, paths[self.exact], "")[shown],
            "near_copy_of": np.where(self.near >= 0, paths[self.near], "")[shown],
            "rejected_paths": np.array([one.path for one in rejected], np.str_),
            "rejected_reasons": np.array([one.reason for one in rejected], np.str_),
            "root": np.array(str(self.layout.listing.root)),
        }

    def _images(self, positions: NDArray[np.intp]) -> Images:
        return np.asarray(self.images.stored[self.images.rows[positions]])

    def _codes(self, positions: NDArray[np.intp]) -> Labels:
        codes = {name: code for code, name in enumerate(self.classes)}
        return np.array([codes[name] for name in self.labels[positions].tolist()], np.int64)

    def _reject_unknown_tests(self, known: NDArray[np.bool_]) -> None:
        for position in np.flatnonzero((self.places == TEST) & ~known):
            reason = f"no labelled image is of its class, {self.labels[position]}"
            self.rejected.append(Rejected(self.images.paths[position], reason))

    def _report(self, rejected: int) -> None:
        sizes = Counter(PLACES[place] for place in self.places[self.counts].tolist())
        log.info(
            "%s: %d labelled images of %d classes, %d in the pool, %d to test on (%s read now, the "
            "others known)",
            self.layout.listing.root,
            sizes["labelled"],
            len(self.classes),
            sizes["pool"],
            sizes["test"],
            counted(self.images.decoded, "file"),
        )
        if rejected:
            text = counted(rejected, "file is", "files are")
            log.warning("%s not used; rejected_files.csv says why", text)
        exact, near = (int((copies >= 0).sum()) for copies in (self.exact, self.near))
        if exact or near:
            leaks = int((self.places > self.places[self.original]).sum())
            text = counted(leaks, "of them is", "of them are")
            log.warning(
                "%s and %s of other files count once%s",
                counted(exact, "exact copy", "exact copies"),
                counted(near, "near copy", "near copies"),
                f"; {text} left out, as the original is a test or labelled image" if leaks else "",
            )
        for late in np.flatnonzero(self.places == LABELLED):
            early = self.original[late]
            if self.places[early] == LABELLED and self.labels[late] != self.labels[early]:
                log.warning(
                    "%s and %s are the same image in two classes; the first counts",
                    self.images.paths[early],
                    self.images.paths[late],
                )


def _seeds(raw: Arrays, config: DataConfig) -> tuple[int, ...]:
    """The seeds that have a fold of their own; all of them where there is a test set."""
    if len(raw["test_images"]):
        return config.seeds
    _, sizes = np.unique(raw["labels"], return_counts=True)
    return config.seeds[: max(int(sizes[sizes > 1].sum()), 1)]


def _folds(labels: Labels, count: int, seed: int) -> Labels:
    """The fold of each labelled image, (n,); −1 for the image of a class that has no other.

    Folds are numbered from 0 to `count` − 1. They have about as many images of each class as one
    another. No fold holds all of a class.
    """
    folds = np.full(len(labels), -1, np.int64)
    rng, start = stream(seed, "folds of the labelled images"), 0
    for code in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == code))
        if len(members) > 1:
            folds[members] = (start + np.arange(len(members))) % count
            start += len(members)
    return folds


def _splits(
    raw: Arrays,
    trained: NDArray[np.intp],
    test: tuple[Images, Labels] | None,
    tested: NDArray[np.intp],
) -> Splits:
    """Splits that train on some of the labelled images, ordered by class.

    Args:
        raw: arrays from `load`.
        trained: positions among the labelled images.
        test: the test images and their labels; None or no image: there is no test set.
        tested: positions of those that are labelled images, in the order of the test set.
    """
    labels: Any = raw["labels"]
    trained = trained[np.argsort(labels[trained], kind="stable")]
    present = test if test is not None and len(test[1]) else None
    return Splits(
        labelled_images=raw["labelled_images"][trained],
        labels=labels[trained],
        class_names=tuple(raw["class_names"].tolist()),
        pool=Unlabelled(raw["pool_images"]),
        test_images=present[0] if present else None,
        test_labels=present[1] if present else None,
        files=_files(raw, trained, present is not None, tested),
    )


def _files(
    raw: Arrays, trained: NDArray[np.intp], has_test: bool, tested: NDArray[np.intp]
) -> Files:
    """Where each file's image lies in these splits."""
    places, index = raw["places"].copy(), raw["index"].copy()
    moved = np.full(len(raw["labels"]), -1, np.int64)
    moved[trained] = np.arange(len(trained))
    in_test = np.zeros(len(moved), bool)
    moved[tested], in_test[tested] = np.arange(len(tested)), True
    labelled = np.flatnonzero((places == LABELLED) & (index >= 0))
    places[labelled] = np.where(in_test[index[labelled]], TEST, LABELLED)
    index[labelled] = moved[index[labelled]]
    # Without a test set in these splits no file is of one.
    shown = (places != TEST) | has_test
    names = np.array(["test", "labelled", "pool"])
    return Files(
        split=names[places][shown],
        index=index[shown],
        path=raw["paths"][shown],
        label=raw["path_labels"][shown],
        duplicate_of=raw["exact_copy_of"][shown],
        near_duplicate_of=raw["near_copy_of"][shown],
    )
