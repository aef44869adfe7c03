"""What one seed trains and is judged on, and the random streams that draw it."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Flags = NDArray[np.bool_]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Unlabelled:
    """Unlabelled images, with the truth about them where it is known.

    Attributes:
        images: uint8 images in random order, (n, C, H, W).
        kinds: the code of each image's kind, a position in `ood.OOD_KINDS`, (n,); None: nobody
            knows which images are OOD.
        classes: the index of each image's seen class, −1 for OOD, (n,), or None.
        shifted: whether each image is of the shifted domain, (n,), or None.
    """

    images: Images
    kinds: Labels | None = None
    classes: Labels | None = None
    shifted: Flags | None = None


@dataclass(frozen=True)
class Splits:
    """All that one seed trains and is judged on.

    Attributes:
        labelled_images: uint8 images, (n, C, H, W).
        labels: the index of each labelled image's class in `class_names`, (n,).
        class_names: the names of the seen classes.
        pool: the unlabelled images that training sees.
        heldout: unlabelled images that training never sees; None: there are none.
        test_images: images of seen classes to test on; None: there is no test set.
        test_labels: the index of each test image's class, or None.
        test_shifted: whether each test image is of the shifted domain, or None.
    """

    labelled_images: Images
    labels: Labels
    class_names: tuple[str, ...]
    pool: Unlabelled
    heldout: Unlabelled | None = None
    test_images: Images | None = None
    test_labels: Labels | None = None
    test_shifted: Flags | None = None


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A random stream for one purpose: what one draws never shifts what another does."""
    digest = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
    return np.random.default_rng([seed, digest])


def proportional(sizes: list[int], total: int) -> list[int]:
    """Cut `total` ≤ sum(sizes) in proportion to `sizes`, by largest remainders."""
    shares = [size * total / sum(sizes) for size in sizes]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda k: counts[k] - shares[k])
    for position in by_remainder[: total - sum(counts)]:
        counts[position] += 1
    return counts


def fingerprint(array: NDArray[Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of an array's type, shape and content."""
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
