"""CIFAR-10 from a folder of JPEG files, or images that are made up in its place."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# What a pool of CIFAR-10 is foreign with where animals are seen (Guo et al., 2020).
SEEN = ("bird", "cat", "deer", "dog", "frog", "horse")
UNSEEN = ("airplane", "automobile", "ship", "truck")
CLASSES = tuple(sorted(SEEN + UNSEEN))

Pictures = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ImageSet:
    """Training and test images of ten classes, in a drawn order.

    Attributes:
        name: what they are, for the reader.
        images: (N, 3, H, W) uint8.
        labels: (N,), positions in `CLASSES`.
        test_images: (n, 3, H, W) uint8.
        test_labels: (n,).
    """

    name: str
    images: Pictures
    labels: Labels
    test_images: Pictures
    test_labels: Labels


def from_folder(folder: Path, per_class: int | None = None, every: int = 1) -> ImageSet:
    """CIFAR-10 as JPEG files in `train/<class>/` and `test/<class>/`.

    Args:
        folder: that holds both.
        per_class: how many of each class to take; None: all.
        every: of the rows and columns, the first of so many.

    Raises:
        ValueError: if a class has no files.
    """
    parts: list[tuple[Pictures, Labels]] = []
    for number, split in enumerate(("train", "test")):
        files, labels = [], []
        for label, name in enumerate(CLASSES):
            found = sorted((folder / split / name).glob("*.jp*g"))[:per_class]
            if not found:
                raise ValueError(f"--cifar: there is no JPEG file in {folder / split / name}")
            files += found
            labels += [label] * len(found)
        with ThreadPoolExecutor(os.cpu_count()) as readers:
            images = np.stack(list(readers.map(_pixels, files)))[:, :, ::every, ::every]
        order = np.random.default_rng(number).permutation(len(files))
        parts.append((np.ascontiguousarray(images[order]), np.array(labels)[order]))
    (images, targets), (test_images, test_targets) = parts
    return ImageSet("CIFAR-10", images, targets, test_images, test_targets)


def _pixels(file: Path) -> Pictures:
    """(3, H, W)."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def generated(count: int, test: int, side: int) -> ImageSet:
    """A coarse pattern a class, moved and under noise: for times, and for a rehearsal."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 216, (len(CLASSES), 3, 4, 4))
    patterns = coarse.repeat(side // 4, axis=2).repeat(side // 4, axis=3)

    def draws() -> Iterator[tuple[Pictures, Labels]]:
        for size in (count, test):
            labels = np.arange(size) % len(CLASSES)
            images = np.empty((size, 3, side, side), np.uint8)
            for start in range(0, size, 1000):  # all at once would be gigabytes
                chosen = patterns[labels[start : start + 1000]]
                moved = np.roll(chosen, int(rng.integers(side)), axis=3)
                noisy = moved + rng.normal(0, 40, moved.shape)
                images[start : start + 1000] = noisy.clip(0, 255).astype(np.uint8)
            order = rng.permutation(size)
            yield images[order], labels[order]

    (images, labels), (test_images, test_labels) = draws()
    return ImageSet("generated images, not CIFAR-10", images, labels, test_images, test_labels)
