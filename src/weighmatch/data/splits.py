"""Seeded, stratified splits with a contaminated unlabelled pool."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weighmatch.data.config import DataConfig, proportional
from weighmatch.data.sources import MIXED, Images, natural_patches, noise

Labels = NDArray[np.int64]

# Codes of `sources`: 0 is in-distribution, then the OOD sources in their order.
SOURCE_NAMES = ("id", *MIXED)
# Patches of the pool and of the held-out set come from disjoint parts of the photographs.
POOL_SPAN, HELDOUT_SPAN = (0.0, 0.7), (0.7, 1.0)


@dataclass(frozen=True)
class Contaminated:
    """Unlabelled images with the truth about them.

    Attributes:
        images: (n, C, H, W), shuffled.
        sources: (n,) codes into `SOURCE_NAMES`.
        classes: (n,) index of the seen class, −1 for OOD.
    """

    images: Images
    sources: Labels
    classes: Labels


@dataclass(frozen=True)
class Splits:
    """All that one seed trains and is judged on; labels are indices into the seen classes."""

    labelled_images: Images
    labels: Labels
    pool: Contaminated
    heldout: Contaminated
    test_images: Images
    test_labels: Labels


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A random stream for one purpose: what one draws never shifts what another does."""
    digest = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
    return np.random.default_rng([seed, digest])


def make_splits(
    images: Images, labels: Labels, photographs: Images, config: DataConfig, seed: int
) -> Splits:
    """Draw the splits of one seed.

    The test, labelled and held-out in-distribution images are the same for every ratio, regime
    and source, and fewer labels per class are a subset of more, so that settings can be compared
    in pairs.

    Args:
        images: (n, C, S, S), every class.
        labels: (n,) class of each.
        photographs: (m, 3, H, W) for natural patches.
        config: what to draw.
        seed: of every draw.
    """
    order = stream(seed, "split").permutation(len(images))
    by_class = {c: order[labels[order] == c] for c in np.unique(labels).tolist()}
    seen = [by_class[c] for c in config.seen_classes]

    taken = [0] * len(seen)

    def take(total: int) -> NDArray[np.intp]:
        """The next `total` seen images, in proportion to the classes."""
        counts = proportional([len(members) for members in seen], total)
        return _take_counts(counts)

    def _take_counts(counts: list[int]) -> NDArray[np.intp]:
        parts = []
        for position, count in enumerate(counts):
            parts.append(seen[position][taken[position] : taken[position] + count])
            taken[position] += count
        return np.concatenate(parts)

    test = take(config.test_size)
    heldout_id = take(config.heldout_size)
    labelled = _take_counts([config.labels_per_class] * len(seen))
    rest = [len(members) - used for members, used in zip(seen, taken, strict=True)]
    pool_id = _take_counts(proportional(rest, config.pool_id))

    unseen = order[~np.isin(labels[order], config.seen_classes)]
    to_index = {c: k for k, c in enumerate(config.seen_classes)}

    def classes_of(chosen: NDArray[np.intp]) -> Labels:
        return np.array([to_index[c] for c in labels[chosen].tolist()], np.int64)

    def contaminate(
        chosen: NDArray[np.intp], total: int, unseen_images: NDArray[np.intp], name: str
    ) -> Contaminated:
        counts = config.ood_counts(total)
        rng = stream(seed, f"contamination of the {name}")
        span = POOL_SPAN if name == "pool" else HELDOUT_SPAN
        channels, size = images.shape[1], images.shape[2]
        parts = [
            images[chosen],
            images[unseen_images[: counts["unseen"]]],
            natural_patches(photographs, counts["patches"], size, channels, span, rng),
            noise(counts["noise"], size, channels, rng),
        ]
        sources = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        classes = np.full(len(sources), -1, np.int64)
        classes[: len(chosen)] = classes_of(chosen)
        shuffle = stream(seed, f"order of the {name}").permutation(len(sources))
        everything = np.concatenate(parts)[shuffle]
        return Contaminated(everything, sources[shuffle].astype(np.int64), classes[shuffle])

    # The held-out set takes unseen images from the front, the pool from the back.
    return Splits(
        labelled_images=images[labelled],
        labels=classes_of(labelled),
        pool=contaminate(pool_id, config.pool_ood, unseen[::-1], "pool"),
        heldout=contaminate(heldout_id, config.heldout_size, unseen, "held-out set"),
        test_images=images[test],
        test_labels=classes_of(test),
    )


def fingerprint(array: NDArray[np.generic]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of an array's type, shape and content."""
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
