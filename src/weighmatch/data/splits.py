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
Names = NDArray[np.str_]
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


@dataclass(frozen=True, eq=False)
class Files:
    """The files behind the images of one set of splits, a row a file; all arrays are (n,).

    Attributes:
        split: "labelled", "pool", "test" or "heldout".
        index: the position of its image among the images of that split. A copy has that of its
            original; −1: the image is in no array, as its original is in another split.
        path: its place, relative to the folder, with "/" between names.
        label: the name of its class as the folder says, or "".
        duplicate_of: the path of the first file of the same bytes, or "".
        near_duplicate_of: the path of the file that it is a near copy of, or "".
    """

    split: Names
    index: Labels
    path: Names
    label: Names
    duplicate_of: Names
    near_duplicate_of: Names


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
        files: the files behind the images; None: the images are made and have no files.
    """

    labelled_images: Images
    labels: Labels
    class_names: tuple[str, ...]
    pool: Unlabelled
    heldout: Unlabelled | None = None
    test_images: Images | None = None
    test_labels: Labels | None = None
    test_shifted: Flags | None = None
    files: Files | None = None

    def name_files(self) -> Files:
        """`files`, or names such as pool/000017 for images that have none."""
        if self.files is not None:
            return self.files
        classes = np.array(self.class_names, np.str_)
        tested = 0 if self.test_images is None else len(self.test_images)
        heldout = 0 if self.heldout is None else len(self.heldout.images)
        sizes = {
            "labelled": len(self.labelled_images),
            "pool": len(self.pool.images),
            "heldout": heldout,
            "test": tested,
        }
        test_labels = np.empty(0, np.int64) if self.test_labels is None else self.test_labels
        labels = {"labelled": classes[self.labels], "test": classes[test_labels]}
        split = np.repeat(list(sizes), list(sizes.values()))
        none = np.zeros(len(split), "U1")
        return Files(
            split=split,
            index=np.concatenate([np.arange(size) for size in sizes.values()]),
            path=np.array([f"{name}/{k:06d}" for name, n in sizes.items() for k in range(n)]),
            label=np.concatenate([labels.get(s, np.zeros(n, "U1")) for s, n in sizes.items()]),
            duplicate_of=none,
            near_duplicate_of=none,
        )


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
    # Text has no buffer; other arrays are hashed without a copy.
    content = np.ascontiguousarray(array)
    digest.update(content.tobytes() if array.dtype.kind == "U" else content.data)
    return digest.hexdigest()[:16]
