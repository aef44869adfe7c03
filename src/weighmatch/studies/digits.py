"""Images of digits as the bilevel problems draw them."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.studies.names import TEST_IMAGES

CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Images (n, 64) in [−0.5, 0.5], double precision, and labels (n,), drawn for one seed.

    Attributes:
        inner: images of the inner problem.
        inner_labels: labels of these, as given; some of them are wrong.
        wrong: which are wrong, (n,); for figures only.
        outer: images of the outer problem.
        outer_labels: labels of these.
        test: images that neither problem sees.
        test_labels: labels of these.
    """

    inner: Tensor
    inner_labels: Tensor
    wrong: Tensor
    outer: Tensor
    outer_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def to(self, dtype: torch.dtype) -> "Digits":
        """The same with images in another precision."""
        cast = {name: getattr(self, name).to(dtype) for name in ("inner", "outer", "test")}
        return replace(self, **cast)


@dataclass(frozen=True)
class Size:
    """How large a problem is drawn.

    Attributes:
        inner: number of inner images.
        outer: number of outer images.
        test: number of test images.
        label_noise: share of wrong inner labels.
        hidden: width of the hidden layer; 0: softmax regression.
        l2: λ, where the problem does not learn it.
        normalised: batch normalisation before the activation.
    """

    inner: int = 100
    outer: int = 100
    test: int = TEST_IMAGES
    label_noise: float = 0.4
    hidden: int = 8
    l2: float = 0.01
    normalised: bool = False


def scaled(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    inner: NDArray[np.int64],
    wrong: Tensor,
    outer: NDArray[np.int64],
    test: NDArray[np.int64],
) -> Digits:
    """The images with these numbers, with their true labels."""
    x = torch.from_numpy(images.reshape(len(images), -1)).double() / 255 - 0.5
    y = torch.from_numpy(labels)
    return Digits(x[inner], y[inner], wrong, x[outer], y[outer], x[test], y[test])


def require_images(name: str, size: Size, needed: int, there: int) -> None:
    """Raise a ValueError where a problem asks for more images than there are."""
    if needed > there:
        raise ValueError(
            f"{name} with inner {size.inner}, outer {size.outer} and test {size.test} needs "
            f"{needed} images of its classes, and there are {there}; make one of them smaller"
        )
