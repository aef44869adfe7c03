"""What defines a run: its data, its seed, its configuration and the code that trains it."""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.arms import SCHEDULES, Arm, Schedule, get_arm
from weighmatch.checks import require_choice, require_images, require_integer
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.training.code import code_digest


@dataclass(frozen=True)
class TrainingSet:
    """All that training may see: no test image, no word on which image is OOD.

    Attributes:
        labelled_images: (n, C, H, W) uint8, C 1 or 3.
        labels: (n,) int64, 0 to classes − 1.
        unlabelled_images: (N, C, H, W) uint8, N at least 1.
        class_names: a name for each class, in the order of the labels; () where there are none.

    Raises:
        ValueError: if they are not that; labels of another integer type are converted.
    """

    labelled_images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    unlabelled_images: NDArray[np.uint8]
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("labelled_images", "unlabelled_images"):
            object.__setattr__(self, name, require_images(name, getattr(self, name)))
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
        names = tuple(str(name) for name in self.class_names)
        object.__setattr__(self, "class_names", names)
        if names and len(names) <= int(labels.max()):
            raise ValueError(
                f"class_names has {len(names)} names, but labels go up to {labels.max()}; give "
                "each class a name"
            )

    @functools.cached_property
    def pool_fingerprint(self) -> str:
        """Identifies the unlabelled images."""
        return array_fingerprint(self.unlabelled_images)

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
    code: str = field(default_factory=code_digest)

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

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and containers of them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "RunConfig":
        """The configuration that `to_dict` wrote."""
        return cls(**{**content, "training": TrainingConfig(**content["training"])})

    def check_labels(self, data: TrainingSet) -> None:
        """Raise a ValueError if a label of `data` is none of the classes."""
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
    parts = [json.dumps(config.to_dict(), sort_keys=True), json.dumps(data.class_names)]
    parts += [array_fingerprint(array) for array in (data.labelled_images, data.labels)]
    parts.append(data.pool_fingerprint)
    if start is not None:
        parts += [array_fingerprint(value.cpu().numpy()) for value in start.values()]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def array_fingerprint(array: NDArray[Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of an array's type, shape and content."""
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


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
