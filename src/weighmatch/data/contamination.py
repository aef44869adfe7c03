"""Contamination of unlabelled images with OOD images, shared by every source of images."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from weighmatch.data.ood import KIND_NAMES
from weighmatch.data.splits import Flags, Images, Labels, Unlabelled, stream

if TYPE_CHECKING:
    from weighmatch.data.config import DataConfig

Place = Literal["pool", "held-out set"]
# Patches of the pool and of the held-out set are cut from disjoint parts of the photographs, so
# that they share no pixel: fractions of the photographs' width.
SPANS: dict[Place, tuple[float, float]] = {"pool": (0.0, 0.7), "held-out set": (0.7, 1.0)}


def contaminate(
    members: Images,
    classes: Labels,
    foreign: Mapping[str, Images],
    photographs: Images,
    config: "DataConfig",
    seed: int,
    place: Place,
    shifted: Mapping[str, Flags] | None = None,
) -> Unlabelled:
    """Mix in-distribution images with OOD images of every kind, and shuffle them.

    Patches and noise are made here, as many as `config` asks for.

    Args:
        members: in-distribution images, (n, C, S, S).
        classes: the index of each member's class, (n,).
        foreign: the OOD images that the source brings itself, by kind.
        photographs: photographs to cut patches from, (m, 3, H, W).
        config: the kinds and the number of OOD images.
        seed: the seed of every draw.
        place: which of the unlabelled images these are.
        shifted: for members ("id") and kinds of `foreign`, which images are of the shifted domain;
            no other image is.
    """
    total = config.pool_ood if place == "pool" else config.heldout_size
    counts = config.ood_counts(total)
    channels, side = members.shape[1:3]
    rng = stream(seed, f"contamination of the {place}")
    images = {"id": members, **foreign}
    if counts["patches"]:
        images["patches"] = natural_patches(
            photographs, counts["patches"], side, channels, SPANS[place], rng
        )
    images["noise"] = noise(counts["noise"], side, channels, rng)
    present = [name for name in KIND_NAMES if name in images]
    sizes = [len(images[name]) for name in present]
    kinds = np.repeat([KIND_NAMES.index(name) for name in present], sizes)
    everyone = np.full(len(kinds), -1, np.int64)
    everyone[: len(classes)] = classes
    moved = {name: np.zeros(len(images[name]), bool) for name in present} | dict(shifted or {})
    order = stream(seed, f"order of the {place}").permutation(len(kinds))
    return Unlabelled(
        np.concatenate([images[name] for name in present])[order],
        kinds[order].astype(np.int64),
        everyone[order],
        np.concatenate([moved[name] for name in present])[order],
    )


def load_photographs() -> Images:
    """Load the two photographs that ship with scikit-learn, (2, 3, 427, 640)."""
    from sklearn.datasets import load_sample_images

    photographs = np.stack(load_sample_images().images).astype(np.uint8)
    return np.ascontiguousarray(photographs.transpose(0, 3, 1, 2))


def natural_patches(
    photographs: Images,
    count: int,
    size: int,
    channels: int,
    span: tuple[float, float],
    rng: np.random.Generator,
) -> Images:
    """Square cuts of photographs at random places and scales, shrunk by averaging.

    Args:
        photographs: uint8 photographs, (n, 3, H, W).
        count: how many patches to cut.
        size: the side of a patch in pixels; the cut is 1 to 8 times as wide, as far as it fits.
        channels: 1 for grey, 3 for colour.
        span: the part of the photographs' width to cut from, as fractions; disjoint spans
            give patches that share no pixel.
        rng: the stream that draws photograph, scale and place.

    Returns:
        uint8 patches, (count, channels, size, size).

    Raises:
        ValueError: if the span is smaller than a patch.
    """
    _, _, height, width = photographs.shape
    first, last = round(span[0] * width), round(span[1] * width)
    largest = min(8, height // size, (last - first) // size)
    if largest < 1:
        raise ValueError(f"photographs of {height}×{width} are too small for patches of {size}")
    patches = np.empty((count, channels, size, size), np.uint8)
    for k in range(count):
        scale = int(rng.integers(1, largest + 1))
        side = scale * size
        top = int(rng.integers(0, height - side + 1))
        left = int(rng.integers(first, last - side + 1))
        photograph = photographs[rng.integers(len(photographs))]
        cut = photograph[:, top : top + side, left : left + side].astype(np.float64)
        if channels == 1:
            cut = np.tensordot([[0.299, 0.587, 0.114]], cut, axes=1)
        small = cut.reshape(channels, size, scale, size, scale).mean(axis=(2, 4))
        patches[k] = np.round(small)
    return patches


def noise(count: int, size: int, channels: int, rng: np.random.Generator) -> Images:
    """Draw independent uniform grey levels, (count, channels, size, size)."""
    return rng.integers(0, 256, (count, channels, size, size), dtype=np.uint8)
