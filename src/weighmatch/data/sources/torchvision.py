"""torchvision's data sets, read as they lie on disk or downloaded by torchvision itself.

torchvision checks the published MD5 of the files of CIFAR, SVHN and STL-10 before it reads them.
"""

import io
import logging
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from weighmatch.checks import require_boolean, require_choice, require_group, require_integer
from weighmatch.data.config import DataConfig
from weighmatch.data.contamination import Place, contaminate, load_photographs
from weighmatch.data.downloads import how_to_fetch
from weighmatch.data.ood import MIXED
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
from weighmatch.data.splits import Arrays, Images, Labels, Splits, Unlabelled, proportional, stream

log = logging.getLogger(__name__)
Part = Literal["train", "test", "unlabelled"]
CIFAR_10 = "airplane automobile bird cat deer dog frog horse ship truck"
STL_10 = "airplane bird car cat deer dog horse monkey ship truck"
CLOTHES = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot"
CIFAR_100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge
bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail
snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class DataSet:
    """One of torchvision's data sets.

    Attributes:
        kind: the name of torchvision's class.
        classes: the names of the classes, in the order of the labels.
        channels: 1 for grey, 3 for colour.
        side: the side of its images in pixels.
        by: how the class is asked for a part: "train" (true or false) or "split" (a name).
        options: what else it is asked for.
        photographs: whether a mirrored image is as good.
    """

    kind: str
    classes: tuple[str, ...]
    channels: int
    side: int
    by: Literal["train", "split"] = "train"
    options: tuple[tuple[str, str], ...] = ()
    photographs: bool = False


DATA_SETS = {
    "cifar10": DataSet(
        "CIFAR10",
        tuple(CIFAR_10.split()),
        3,
        32,
        photographs=True,
    ),
    "cifar100": DataSet("CIFAR100", tuple(CIFAR_100.split()), 3, 32, photographs=True),
    "svhn": DataSet("SVHN", DIGITS, 3, 32, "split"),
    "stl10": DataSet(
        "STL10",
        tuple(STL_10.split()),
        3,
        96,
        "split",
        photographs=True,
    ),
    "mnist": DataSet("MNIST", DIGITS, 1, 28),
    "fashion_mnist": DataSet(
        "FashionMNIST",
        tuple(CLOTHES.split()),
        1,
        28,
        photographs=True,
    ),
    "emnist": DataSet(
        "EMNIST",
        tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"),
        1,
        28,
        options=(("split", "balanced"),),
    ),
}


@dataclass(frozen=True)
class TorchvisionConfig:
    """Which data set, and what of it is known.

    Attributes:
        dataset: a name of `DATA_SETS`.
        seen: the names of the classes that the classifier knows, joined by "+", or how many of
            the first; the others are the unseen classes. "all": there are no unseen ones.
        foreign: the data set whose images are OOD of the kind "foreign", or "".
    """

    dataset: str = "cifar10"
    seen: str | int = "all"
    foreign: str = ""

    def __post_init__(self) -> None:
        require_choice("data.torchvision.dataset", self.dataset, tuple(DATA_SETS))
        if self.foreign:
            require_choice("data.torchvision.foreign", self.foreign, tuple(DATA_SETS))
        if self.foreign == self.dataset:
            raise ValueError(
                f"data.torchvision.foreign is {self.foreign}, as is data.torchvision.dataset; "
                "choose another"
            )
        known = DATA_SETS[self.dataset].classes
        if isinstance(self.seen, int):
            require_integer("data.torchvision.seen", self.seen, 2)
        names = self.seen_names()
        if len(set(names)) < max(2, len(names)) or not set(names) <= set(known):
            raise ValueError(
                "data.torchvision.seen must be two or more different classes joined by +, or how "
                f"many of the first, got {self.seen!r}; {self.dataset} has {', '.join(known)}"
            )

    def seen_names(self) -> tuple[str, ...]:
        """The names of the seen classes, in the order of their labels."""
        known = DATA_SETS[self.dataset].classes
        if isinstance(self.seen, int):
            return known[: self.seen]
        return known if self.seen == "all" else tuple(str(self.seen).split("+"))


@dataclass(frozen=True)
class TorchvisionParameters:
    """The parameters of torchvision's data sets.

    Attributes:
        root: the folder that torchvision reads, seen from where the command is given.
        size: the side of the images in pixels; "auto": as they are.
        download: whether torchvision downloads what is missing there.
        torchvision: which data set, see `TorchvisionConfig`.
    """

    root: str = ""
    size: int | Literal["auto"] = "auto"
    download: bool = False
    torchvision: TorchvisionConfig = field(default_factory=TorchvisionConfig)

    def __post_init__(self) -> None:
        _check_place(self.root, self.size, self.download)
        group = require_group("data.torchvision", self.torchvision, TorchvisionConfig)
        object.__setattr__(self, "torchvision", group)


@dataclass(frozen=True)
class Stl10Parameters:
    """The parameters of STL-10 with its own unlabelled images.

    Attributes:
        root: see `TorchvisionParameters`, as are the others.
        size: the side of the images; "auto": 32, a third of theirs.
        download: whether torchvision downloads what is missing.
    """

    root: str = ""
    size: int | Literal["auto"] = "auto"
    download: bool = False

    def __post_init__(self) -> None:
        _check_place(self.root, self.size, self.download)


def _check_place(root: object, size: object, download: object) -> None:
    if not isinstance(root, str):
        raise ValueError(f"data.root must be the path of a folder, got {root!r}")
    if size != "auto":
        require_integer("data.size", size, 8)
    require_boolean("data.download", download)


@register
class Torchvision(Source[TorchvisionParameters]):
    """Some classes of a data set are seen; the others, another data set and more are OOD.

    Labelled images and the pool are of the training part. Test images and held-out images are of
    the test part, and have no image in common.
    """

    name = "torchvision"
    parameters = TorchvisionParameters
    ood_kinds = (*MIXED, "foreign")

    def check(self, config: DataConfig) -> None:
        asked = self.own(config).torchvision
        counts = config.ood_counts(max(config.pool_ood, config.heldout_size))
        if counts["foreign"] and not asked.foreign:
            raise ValueError(
                f"data.ood_source {config.ood_source} needs the name of another data set in "
                f"data.torchvision.foreign; choose from {', '.join(DATA_SETS)}"
            )
        unseen = len(DATA_SETS[asked.dataset].classes) - len(asked.seen_names())
        if counts["unseen"] and not unseen:
            raise ValueError(
                f"data.ood_source {config.ood_source} needs unseen classes, but all of "
                f"{asked.dataset} are seen; set data.torchvision.seen, such as seen=6"
            )

    def check_found(self, config: DataConfig) -> None:
        own = self.own(config)
        _require_root(own.root, own.download)

    def class_names(self, config: DataConfig) -> tuple[str, ...]:
        return self.own(config).torchvision.seen_names()

    def load(self, config: DataConfig) -> Arrays:
        own = self.own(config)
        known = DATA_SETS[own.torchvision.dataset]
        shape = self._shape(config)
        arrays: Arrays = {}
        for part in ("train", "test"):
            images, labels = _read(known, part, own.root, own.download, shape)
            arrays |= {f"{part}_images": images, f"{part}_labels": labels}
            if own.torchvision.foreign:
                other = DATA_SETS[own.torchvision.foreign]
                images, _ = _read(other, part, own.root, own.download, shape)
                arrays[f"foreign_{part}_images"] = images
        return {**tag_arrays(arrays, own), "photographs": load_photographs()}

    def draw(self, raw: Arrays, config: DataConfig, seed: int) -> Splits:
        asked, photographs = self.own(config).torchvision, raw["photographs"]
        raw = untag_arrays(raw, config.own)
        codes = [DATA_SETS[asked.dataset].classes.index(name) for name in asked.seen_names()]
        train = _Supply(raw["train_labels"], codes, seed, "split of the training part")
        test = _Supply(raw["test_labels"], codes, seed, "split of the test part")
        labelled = train.take([config.labels_per_class] * len(codes), "data.labels_per_class")
        tested = test.take_in_proportion(config.test_size, "data.test_size")

        def mix(part: str, supply: _Supply, members: int, total: int, place: Place) -> Unlabelled:
            size = "data.heldout_size" if part == "test" else "the pool (data.pool_size, id_size)"
            counts, images = config.ood_counts(total), raw[f"{part}_images"]
            chosen = supply.take_in_proportion(members, size)
            foreign = {"unseen": images[supply.take_unseen(counts["unseen"], size)]}
            if counts["foreign"]:
                others = raw[f"foreign_{part}_images"]
                order = stream(seed, f"foreign images of the {place}").permutation(len(others))
                _require_enough(counts["foreign"], len(others), "foreign images", size)
                foreign["foreign"] = others[order[: counts["foreign"]]]
            classes = supply.classes_of(chosen)
            return contaminate(images[chosen], classes, foreign, photographs, config, seed, place)

        heldout = config.heldout_size
        return Splits(
            labelled_images=raw["train_images"][labelled],
            labels=train.classes_of(labelled),
            class_names=self.class_names(config),
            pool=mix("train", train, config.pool_id, config.pool_ood, "pool"),
            heldout=mix("test", test, heldout, heldout, "held-out set"),
            test_images=raw["test_images"][tested],
            test_labels=test.classes_of(tested),
            test_shifted=np.zeros(len(tested), bool),
        )

    def recipe(self, config: DataConfig, wishes: Wishes = Wishes()) -> Recipe:  # noqa: B008
        known = DATA_SETS[self.own(config).torchvision.dataset]
        pool = config.pool_id + config.pool_ood
        recipe = make_recipe(self._shape(config), pool, known.photographs, wishes)
        return {**recipe, "runs": {**recipe["runs"], **super().recipe(config)["runs"]}}

    def _shape(self, config: DataConfig) -> tuple[int, int, int]:
        own = self.own(config)
        known = DATA_SETS[own.torchvision.dataset]
        side = known.side if own.size == "auto" else own.size
        return known.channels, side, side


@register
class Stl10(Source[Stl10Parameters]):
    """STL-10 (Coates et al., 2011): its unlabelled images are of more classes, nobody knows which.

    Each seed draws its labelled images from the training part; the test part is the same for all.
    """

    name = "stl10"
    parameters = Stl10Parameters
    contaminates = False
    without_effect = ("heldout_size", "test_size", "shifted")

    def check_found(self, config: DataConfig) -> None:
        own = self.own(config)
        _require_root(own.root, own.download)

    def class_names(self, config: DataConfig) -> tuple[str, ...]:
        return DATA_SETS["stl10"].classes

    def load(self, config: DataConfig) -> Arrays:
        own = self.own(config)
        arrays: Arrays = {}
        parts: tuple[Part, ...] = ("train", "test", "unlabelled")
        for part in parts:
            images, labels = _read(
                DATA_SETS["stl10"], part, own.root, own.download, self._shape(config)
            )
            arrays |= {f"{part}_images": images, f"{part}_labels": labels}
        return tag_arrays(arrays, own)

    def draw(self, raw: Arrays, config: DataConfig, seed: int) -> Splits:
        raw = untag_arrays(raw, config.own)
        codes = list(range(len(self.class_names(config))))
        train = _Supply(raw["train_labels"], codes, seed, "split of the training part")
        labelled = train.take([config.labels_per_class] * len(codes), "data.labels_per_class")
        return Splits(
            labelled_images=raw["train_images"][labelled],
            labels=train.classes_of(labelled),
            class_names=self.class_names(config),
            pool=Unlabelled(raw["unlabelled_images"]),
            test_images=raw["test_images"],
            test_labels=raw["test_labels"],
        )

    def recipe(self, config: DataConfig, wishes: Wishes = Wishes()) -> Recipe:  # noqa: B008
        return make_recipe(self._shape(config), 100_000, True, wishes)

    def _shape(self, config: DataConfig) -> tuple[int, int, int]:
        size = self.own(config).size
        side = 32 if size == "auto" else size
        return 3, side, side


class _Supply:
    """The images of one part of a data set, taken in a random order, each once."""

    def __init__(self, labels: Labels, codes: list[int], seed: int, purpose: str) -> None:
        order = stream(seed, purpose).permutation(len(labels))
        self.labels, self.codes = labels, codes
        self.seen = [order[labels[order] == code] for code in codes]
        self.unseen = order[~np.isin(labels[order], codes)]

    def take(self, counts: list[int], parameter: str) -> NDArray[np.intp]:
        """The next images of each seen class."""
        taken = []
        for position, count in enumerate(counts):
            _require_enough(count, len(self.seen[position]), "images of a seen class", parameter)
            taken.append(self.seen[position][:count])
            self.seen[position] = self.seen[position][count:]
        return np.concatenate(taken)

    def take_in_proportion(self, total: int, parameter: str) -> NDArray[np.intp]:
        """The next images of all seen classes, as many of each as their shares."""
        sizes = [len(members) for members in self.seen]
        _require_enough(total, sum(sizes), "images of seen classes", parameter)
        return self.take(proportional(sizes, total), parameter)

    def take_unseen(self, count: int, parameter: str) -> NDArray[np.intp]:
        """The next images of unseen classes."""
        _require_enough(count, len(self.unseen), "images of unseen classes", parameter)
        taken, self.unseen = self.unseen[:count], self.unseen[count:]
        return taken

    def classes_of(self, chosen: NDArray[np.intp]) -> Labels:
        new = {code: position for position, code in enumerate(self.codes)}
        return np.array([new[code] for code in self.labels[chosen].tolist()], np.int64)


def _require_enough(wanted: int, there: int, what: str, parameter: str) -> None:
    if wanted > there:
        raise UnusableDataError(
            f"{wanted} {what} are asked for, but {there} are left for {parameter}; lower it"
        )


def _require_root(root: str, download: bool) -> None:
    if not root:
        raise UnusableDataError(
            "data.root is empty; give the folder that torchvision's data sets lie in"
        )
    if not download and not Path(root).is_dir():
        raise UnusableDataError(
            f"data.root {root} does not exist; give the folder that torchvision's data sets lie "
            "in, or set data.download=true"
        )


def _read(
    known: DataSet, part: Part, root: str, download: bool, shape: tuple[int, int, int]
) -> tuple[Images, Labels]:
    """The images of a part in this shape, (n, C, H, W), and their labels, (n,).

    Raises:
        UnusableDataError: if torchvision does not find the files or does not trust them.
    """
    import torchvision.datasets

    split = {"unlabelled": "unlabeled"}.get(part, part)
    asked = {"train": part == "train"} if known.by == "train" else {"split": split}
    kind = getattr(torchvision.datasets, known.kind)
    try:
        with redirect_stdout(io.StringIO()):
            found = kind(root, download=download, **asked, **dict(known.options))
    except (RuntimeError, OSError) as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        done = "could not download" if download else "cannot read"
        cure = "" if download else "set data.download=true, or "
        raise UnusableDataError(
            f"torchvision {done} {known.kind} in {root} ({first}); {cure}"
            f"{how_to_fetch(kind, split, root)}"
        ) from error
    labels = found.labels if hasattr(found, "labels") else found.targets
    images = np.asarray(found.data)
    if known.kind == "EMNIST":
        images = images.swapaxes(1, 2)  # its files hold rows as columns
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] == 3 and images.shape[1] != 3:
        images = images.transpose(0, 3, 1, 2)
    count = len(images)
    known_labels = np.full(count, -1) if labels is None else np.asarray(labels)
    return _as_shape(images, shape), known_labels.astype(np.int64)


def _as_shape(images: NDArray[Any], shape: tuple[int, int, int]) -> Images:
    """Images in other channels and at another size, (n, C, H, W)."""
    from PIL import Image

    if images.shape[1:] == shape:
        return np.ascontiguousarray(images, np.uint8)
    made = np.empty((len(images), *shape), np.uint8)
    for k, image in enumerate(images):
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        picture = picture.convert("L" if shape[0] == 1 else "RGB")
        picture = picture.resize((shape[2], shape[1]), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)
        made[k] = pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)
    return made
