"""The handwritten digits of scikit-learn: 1,797 real images of 8×8 pixels."""

from dataclasses import dataclass

import numpy as np

from weighmatch.data.config import DataConfig
from weighmatch.data.contamination import load_photographs
from weighmatch.data.labelled import check_supply, split_images
from weighmatch.data.source import Source, register
from weighmatch.data.splits import Arrays, Images, Labels, Splits

# How many images of each digit there are, so that a request for more is refused before anything
# is loaded.
DIGITS_PER_CLASS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)


@dataclass(frozen=True)
class DigitParameters:
    """The digits' own parameters.

    Attributes:
        seen_classes: the digits that the classifier knows; the others are the unseen classes.
    """

    seen_classes: tuple[int, ...] = (0, 1, 2, 3, 4, 5)

    def __post_init__(self) -> None:
        classes = self.seen_classes
        known = range(len(DIGITS_PER_CLASS))
        if (
            not isinstance(classes, list | tuple)
            or any(type(c) is not int or c not in known for c in classes)
            or len(set(classes)) < len(classes)
            or len(classes) < 2
        ):
            raise ValueError(
                f"data.seen_classes must be at least two different digits 0–9, got {classes!r}"
            )
        object.__setattr__(self, "seen_classes", tuple(classes))


@register
class Digits(Source[DigitParameters]):
    """Some digits are seen classes, the others are OOD."""

    name = "digits"
    parameters = DigitParameters

    def check(self, config: DataConfig) -> None:
        seen = self.own(config).seen_classes
        sizes = [DIGITS_PER_CLASS[digit] for digit in seen]
        check_supply(config, sizes, sum(DIGITS_PER_CLASS) - sum(sizes))

    def class_names(self, config: DataConfig) -> tuple[str, ...]:
        return tuple(str(digit) for digit in self.own(config).seen_classes)

    def load(self, config: DataConfig) -> Arrays:
        images, labels = load_digits()
        return {"images": images, "labels": labels, "photographs": load_photographs()}

    def draw(self, raw: Arrays, config: DataConfig, seed: int) -> Splits:
        seen = self.own(config).seen_classes
        return split_images(raw["images"], raw["labels"], seen, raw["photographs"], config, seed)


def load_digits() -> tuple[Images, Labels]:
    """Load the 1,797 handwritten digits of scikit-learn (Alpaydin & Kaynak, 1998).

    Returns:
        Images (1797, 1, 8, 8), grey levels 0–16 stretched to 0–255, and labels 0–9 (1797,).
    """
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return images, digits.target.astype(np.int64)
