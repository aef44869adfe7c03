"""Stratified splits of a data set in which every image has a label, for sources that have one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from weighmatch.data.config import DataConfig
from weighmatch.data.contamination import Place, contaminate
from weighmatch.data.splits import Images, Labels, Splits, Unlabelled, proportional, stream


def check_supply(config: DataConfig, seen: list[int], unseen: int) -> None:
    """Check that a data set has the images that its splits ask for.

    Args:
        config: the sizes of the splits.
        seen: how many images each seen class has.
        unseen: how many images all other classes have together.

    Raises:
        ValueError: if there are too few; it names the parameters to lower.
    """
    if config.labels_per_class > min(seen):
        raise ValueError(
            f"data.labels_per_class is {config.labels_per_class}, but the rarest seen class has "
            f"only {min(seen)} images; lower it"
        )
    labelled = config.labels_per_class * len(seen)
    needed = labelled + config.heldout_size + config.test_size + config.pool_id
    tested = proportional(seen, min(config.test_size, sum(seen)))
    heldout = proportional(seen, min(config.heldout_size, sum(seen)))
    size = "data.id_size" if config.regime == "added" else "data.pool_size"
    if needed > sum(seen):
        raise ValueError(
            f"data asks for {needed} images of seen classes ({labelled} labelled, "
            f"{config.pool_id} in the pool, {config.heldout_size} held out, {config.test_size} "
            f"for the test), but there are {sum(seen)}; lower data.labels_per_class, "
            f"{size}, data.heldout_size or data.test_size"
        )
    if any(
        t + h + config.labels_per_class > n for t, h, n in zip(tested, heldout, seen, strict=True)
    ):
        raise ValueError(
            "data.labels_per_class leaves too few images of the rarest seen class for the "
            "held-out and test images; lower it, data.heldout_size or data.test_size"
        )
    wanted = sum(config.ood_counts(n)["unseen"] for n in (config.pool_ood, config.heldout_size))
    if wanted > unseen:
        raise ValueError(
            f"data asks for {wanted} images of unseen classes (pool and held-out), but there "
            f"are {unseen}; lower data.ratio, {size} or data.heldout_size, or choose the "
            f"data.ood_source patches or noise"
        )


def split_images(
    images: Images,
    labels: Labels,
    seen_classes: Sequence[int],
    photographs: Images,
    config: DataConfig,
    seed: int,
) -> Splits:
    """Draw the splits of one seed.

    The test, labelled and held-out in-distribution images are the same for every ratio, regime
    and source of OOD, and fewer labels per class are a subset of more, so that settings can be
    compared in pairs.

    Args:
        images: uint8 images of every class, (n, C, S, S).
        labels: the class of each image, (n,).
        seen_classes: the classes that the classifier knows, in the order of their new labels.
        photographs: photographs to cut natural patches from, (m, 3, H, W).
        config: the sizes of the splits and the contamination, as `check_supply` accepts them.
        seed: the seed of every draw.
    """
    order = stream(seed, "split").permutation(len(images))
    seen = [order[labels[order] == c] for c in seen_classes]
    unseen = order[~np.isin(labels[order], seen_classes)]
    taken = [0] * len(seen)

    def take(counts: list[int]) -> NDArray[np.intp]:
        """The next images of each seen class."""
        parts = []
        for position, count in enumerate(counts):
            parts.append(seen[position][taken[position] : taken[position] + count])
            taken[position] += count
        return np.concatenate(parts)

    sizes = [len(members) for members in seen]
    test = take(proportional(sizes, config.test_size))
    heldout_id = take(proportional(sizes, config.heldout_size))
    labelled = take([config.labels_per_class] * len(seen))
    rest = [size - used for size, used in zip(sizes, taken, strict=True)]
    pool_id = take(proportional(rest, config.pool_id))
    to_index = {c: k for k, c in enumerate(seen_classes)}

    def classes_of(chosen: NDArray[np.intp]) -> Labels:
        return np.array([to_index[c] for c in labels[chosen].tolist()], np.int64)

    def mix(
        chosen: NDArray[np.intp], total: int, others: NDArray[np.intp], place: Place
    ) -> Unlabelled:
        foreign = {"unseen": images[others[: config.ood_counts(total)["unseen"]]]}
        classes = classes_of(chosen)
        return contaminate(images[chosen], classes, foreign, photographs, config, seed, place)

    # The held-out set takes unseen images from the front, the pool from the back.
    return Splits(
        labelled_images=images[labelled],
        labels=classes_of(labelled),
        class_names=config.class_names,
        pool=mix(pool_id, config.pool_ood, unseen[::-1], "pool"),
        heldout=mix(heldout_id, config.heldout_size, unseen, "held-out set"),
        test_images=images[test],
        test_labels=classes_of(test),
        test_shifted=np.zeros(len(test), bool),
    )
