"""What defines a run: its data, its seed, its configuration and the code that trains it."""

import functools
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.arms import SCHEDULES, Arm, Schedule, get_arm
from weighmatch.checks import require_choice, require_images, require_integer
from weighmatch.semisup.config import PoolMemory, TrainingConfig
from weighmatch.semisup.parts.backbones import load_backbone
from weighmatch.semisup.parts.group import ALONE, Group
from weighmatch.semisup.parts.state_file import State
from weighmatch.semisup.parts.store import ImageStore, Stored
from weighmatch.semisup.training.code import training_code


@dataclass(frozen=True)
class TrainingSet:
    """All that training may see: no test image, no word on which image is OOD.

    Attributes:
        labelled_images: (n, C, H, W) uint8, C 1 or 3. For a frozen backbone: features of the
            plain, weak and strong views of each image, (n, views, width) float16.
        labels: (n,) int64, 0 to classes − 1.
        unlabelled_images: N of them, at least 1, stored as the labelled ones. They need not repeat
            the labelled images: on 16 paired seeds of digits that changes FixMatch by +0.9 points
            (−0.7 to +2.6).
        class_names: a name for each class, in the order of the labels; () where there are none.
        rows: the images of `unlabelled_images` that are the pool, (n,); None: all of them.
        image_shape: (C, H, W) of the images behind stored features; (): that of the images.
        backbone: the digest of the weights of the backbone behind stored features; "": unknown.
        useful_share: the share of the pool that is useful, for arms that are told so much of the
            truth; None: nobody tells.

    A pool that is a memory map is shared by all processes: it travels to them as the name of its
    file.

    Raises:
        ValueError: if they are not that; labels of another integer type are converted.
    """

    labelled_images: Stored
    labels: NDArray[np.int64]
    unlabelled_images: Stored
    class_names: tuple[str, ...] = ()
    rows: NDArray[np.int64] | None = None
    image_shape: tuple[int, ...] = ()
    backbone: str = ""
    useful_share: float | None = None

    def __post_init__(self) -> None:
        for name in ("labelled_images", "unlabelled_images"):
            object.__setattr__(self, name, require_stored(name, getattr(self, name)))
        mine, theirs = self.labelled_images.shape, self.unlabelled_images.shape
        if mine[1:] != theirs[1:]:
            raise ValueError(
                f"labelled_images are of shape {mine[1:]} each and unlabelled_images of "
                f"{theirs[1:]}; resize or convert them to the same"
            )
        labels = np.asarray(self.labels)
        whole = np.issubdtype(labels.dtype, np.integer)
        if labels.shape != mine[:1] or not whole or labels.min() < 0:
            raise ValueError(
                f"labels must be whole numbers from 0, one for each of the {mine[0]} labelled "
                f"images, got {labels.dtype} of shape {labels.shape}; number the classes from 0"
            )
        object.__setattr__(self, "labels", labels.astype(np.int64, copy=False))
        shape = self.image_shape if self.has_features else mine[1:]
        if len(shape) != 3:
            raise ValueError(
                "stored features need image_shape, (C, H, W) of the images behind them"
            )
        object.__setattr__(self, "image_shape", tuple(int(side) for side in shape))
        object.__setattr__(self, "backbone", str(self.backbone))
        if self.useful_share is not None:  # read from a file it is an array
            object.__setattr__(self, "useful_share", float(self.useful_share))
        names = tuple(str(name) for name in self.class_names)
        object.__setattr__(self, "class_names", names)
        if names and len(names) <= int(labels.max()):
            raise ValueError(
                f"class_names has {len(names)} names, but labels go up to {labels.max()}; give "
                "each class a name"
            )

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> "TrainingSet":
        """The set whose attributes are these arrays, as they lie in a file."""
        given: Any = dict(arrays)
        return cls(**given)

    @functools.cached_property
    def pool_fingerprint(self) -> str:
        """Identifies the pool."""
        if self.rows is None:
            return self.images_fingerprint
        return f"{self.images_fingerprint}-{array_fingerprint(self.rows)}"

    @functools.cached_property
    def images_fingerprint(self) -> str:
        """Identifies all unlabelled images, hashed once however many parts are selected."""
        return array_fingerprint(self.unlabelled_images)

    @property
    def has_features(self) -> bool:
        """Whether features of a frozen backbone stand for the images."""
        return self.unlabelled_images.ndim == 3

    @property
    def plain_pool(self) -> Stored:
        """The pool's images as they are, or the features of these, (N, 1, width).

        It is a copy where the pool is a part of what is stored.
        """
        return next(self.parts(self.pool_size))

    def parts(self, size: int) -> Iterator[Stored]:
        """The pool's images as they are, or the features of these, at most `size` at a time."""
        stored = self.unlabelled_images
        plain = stored[:, :1] if self.has_features else stored
        for start in range(0, self.pool_size, size):
            part = slice(start, start + size)
            yield plain[part if self.rows is None else self.rows[part]]

    def store(self, device: torch.device, memory: PoolMemory, group: Group) -> ImageStore:
        """The pool as batches are drawn from it; see `ImageStore`."""
        return ImageStore(self.unlabelled_images, device, memory, self.rows, group)

    def pool_images(self, positions: NDArray[np.int64]) -> Stored:
        """What is stored of some images of the pool, whose positions are (n,)."""
        return self.unlabelled_images[positions if self.rows is None else self.rows[positions]]

    @property
    def pool_size(self) -> int:
        """Number of images in the pool."""
        return len(self.unlabelled_images) if self.rows is None else len(self.rows)

    def select(self, kept: NDArray[np.bool_]) -> "TrainingSet":
        """The same with a part of the pool, without a copy of its images.

        Args:
            kept: which images of the pool, (N,).
        """
        rows = np.arange(len(self.unlabelled_images)) if self.rows is None else self.rows
        chosen = replace(self, rows=rows[kept])
        chosen.__dict__["images_fingerprint"] = self.images_fingerprint
        return chosen

    def mapped(self, folder: Path) -> "TrainingSet":
        """The same with the unlabelled images in a file of `folder`, mapped into memory."""
        path = folder / f"{self.images_fingerprint}.npy"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            with partial.open("wb") as file:
                np.save(file, self.unlabelled_images)
            os.replace(partial, path)
        images: Stored = np.load(path, mmap_mode="r")
        chosen = replace(self, unlabelled_images=images)
        chosen.__dict__["images_fingerprint"] = self.images_fingerprint
        return chosen

    def __getstate__(self) -> State:
        state = dict(self.__dict__)
        images = self.unlabelled_images
        if _is_mapped(images):
            place = (str(images.filename), images.dtype, images.offset, images.shape)
            state["unlabelled_images"] = place
        return state

    def __setstate__(self, state: State) -> None:
        self.__dict__.update(state)
        if isinstance(state["unlabelled_images"], tuple):
            name, dtype, offset, shape = state["unlabelled_images"]
            images = np.memmap(name, dtype, "r", offset, shape)
            self.__dict__["unlabelled_images"] = images

    @property
    def classes(self) -> int:
        """Number of classes: that of the names, or else of the labels."""
        return len(self.class_names) or int(self.labels.max()) + 1


@dataclass(frozen=True)
class RunConfig:
    """What defines a run beside its data.

    Attributes:
        arm: name of the arm.
        seed: seed of every random stream.
        steps: steps of the classifier (schedule two_stages: those of the second stage).
        classes: number of seen classes.
        training: the rest of the parameters.
        schedule: "online", "two_stages" or "rounds".
        rounds: number of rounds of the schedule rounds.
        code: identifies the code that trains the run. It is fixed when the configuration is made:
            code that is edited while many runs go on must not split them into two kinds.
        group: the processes that train it together. It is no part of what defines the run.

    Raises:
        ValueError: if the arm is unknown or cannot be trained in that schedule, or a number is
            not a whole one.
    """

    arm: str
    seed: int
    steps: int
    classes: int
    training: TrainingConfig
    schedule: Schedule = "online"
    rounds: int = 1
    code: str = field(default_factory=training_code)
    group: Group = field(default=ALONE, compare=False, repr=False)

    def __post_init__(self) -> None:
        arm = get_arm(self.arm)
        require_choice("schedule", self.schedule, SCHEDULES)
        for name, minimum in (("seed", 0), ("steps", 1), ("classes", 1), ("rounds", 1)):
            require_integer(name, getattr(self, name), minimum)
        # Every arm may train online: rounds train FixMatch so whatever the arm is.
        if self.schedule not in ("online", *arm.schedules):
            raise ValueError(
                f"the arm {self.arm} cannot be trained in the schedule {self.schedule}; choose "
                f"from {', '.join(arm.schedules)}"
            )
        if self.schedule == "rounds" and self.steps < self.rounds:
            raise ValueError(
                f"training.steps {self.steps} are fewer than {self.rounds} rounds; raise them or "
                "lower runs.rounds"
            )

    @property
    def row(self) -> Arm:
        """The arm's row."""
        return get_arm(self.arm)

    @property
    def first_steps(self) -> int:
        """Steps of the first of two stages; 0 in other schedules."""
        if self.schedule != "two_stages":
            return 0
        return max(1, round(self.training.two_stages.first_share * self.steps))

    def to_dict(self) -> State:
        """Numbers, strings and containers of them."""
        content = asdict(replace(self, group=ALONE))
        del content["group"]
        return content

    @classmethod
    def from_dict(cls, content: State) -> "RunConfig":
        """The configuration that `to_dict` wrote."""
        return cls(**{**content, "training": TrainingConfig(**content["training"])})

    def check_data(self, data: TrainingSet) -> None:
        """Check that a run can train on `data`.

        Raises:
            ValueError: if a label is none of the classes, or a frozen backbone meets images
                instead of features.
        """
        if self.training.frozen != data.has_features:
            needed, given = (
                ("features", "images") if self.training.frozen else ("images", "features")
            )
            raise ValueError(
                f"training.network {self.training.network} with training.weights "
                f"{self.training.weights} trains on {needed}, but the training set has {given}; "
                "run the pipeline feature_extraction"
            )
        highest = int(data.labels.max())
        if highest >= self.classes:
            raise ValueError(
                f"labels go up to {highest}, so that there are {highest + 1} classes or more, but "
                f"RunConfig.classes is {self.classes}; raise it or number the classes from 0"
            )


def fingerprint(
    config: RunConfig, data: TrainingSet, start: dict[str, Tensor] | None = None
) -> str:
    """Identifies a run: configuration (code included), data, start; 16 hexadecimal digits."""
    content = config.to_dict()
    del content["training"]["pool_memory"]  # on which nothing depends
    parts = [json.dumps(content, sort_keys=True), json.dumps(data.class_names)]
    parts += [array_fingerprint(array) for array in (data.labelled_images, data.labels)]
    parts += [data.pool_fingerprint, f"{data.useful_share}"]
    if config.training.fine_tune != "none":
        # A file of weights counts by its content.
        weights = load_backbone(config.training.network, config.training.weights)
        parts.append(weights.info.digest)
    if start is not None:
        parts += [array_fingerprint(value.cpu().numpy()) for value in start.values()]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def array_fingerprint(array: NDArray[Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of an array's type, shape and content.

    A mapped file is read piece by piece, so that its pages do not count as this process's memory.
    """
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    if _is_mapped(array):
        with open(str(array.filename), "rb") as file:
            file.seek(array.offset)
            left = array.nbytes
            while left:
                piece = file.read(min(left, 2**20))
                if not piece:
                    raise ValueError(f"{array.filename} is shorter than its array; make it again")
                digest.update(piece)
                left -= len(piece)
    else:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def require_stored(name: str, images: Any) -> Stored:
    """Images (n, C, H, W) uint8, or features of their views (n, views, width) float16.

    Raises:
        ValueError: unless they are that, n at least 1.
    """
    if getattr(images, "dtype", None) == np.float16 and images.ndim == 3 and len(images):
        features: NDArray[np.float16] = images
        return features
    return require_images(name, images)


def _is_mapped(array: Any) -> TypeGuard["np.memmap[Any, Any]"]:
    """Whether an array is a whole memory map of a file, in C order, and no part of another."""
    whole = isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap)
    return whole and bool(array.filename) and array.flags.c_contiguous


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one.

    Raises:
        ValueError: if "cuda" is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device is cuda, but torch sees no GPU; set it to auto or cpu")
    return torch.device(name)
