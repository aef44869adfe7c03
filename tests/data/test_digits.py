import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weighmatch.data.config import DataConfig
from weighmatch.data.ood import KIND_NAMES, MIXED
from weighmatch.data.source import get_source
from weighmatch.data.sources.digits import DIGITS_PER_CLASS

RAW = get_source("digits").load(DataConfig(seeds=[0]))


def split(seed=0, **changes):
    return get_source("digits").draw(RAW, DataConfig(seeds=[seed], **changes), seed)


def keys(images):
    return [image.tobytes() for image in images]


def test_digits_are_uint8_and_as_many_as_declared():
    images = RAW["images"]
    assert images.dtype == np.uint8
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert tuple(np.bincount(RAW["labels"])) == DIGITS_PER_CLASS


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    ood_source=st.sampled_from([*MIXED, "mix", "unseen+patches"]),
    regime=st.sampled_from(["fixed_total", "added"]),
    ratio=st.floats(0.2, 0.75),
    labels_per_class=st.integers(1, 3),
)
def test_every_setting_of_a_seed_is_clean_stratified_and_paired(
    seed, ood_source, regime, ratio, labels_per_class
):
    changes = {"ood_source": ood_source, "regime": regime, "ratio": ratio}
    base, found, again = (
        split(seed, **more)
        for more in ({}, *2 * [{**changes, "labels_per_class": labels_per_class}])
    )
    parts = (found.labelled_images, found.pool.images, found.heldout.images, found.test_images)
    for one, other in itertools.combinations(map(keys, parts), 2):
        assert not set(one) & set(other)
    assert (found.pool.kinds != 0).mean() == pytest.approx(ratio, abs=0.01)
    assert np.bincount(found.labels).tolist() == [labels_per_class] * 6
    assert np.ptp(np.bincount(found.test_labels)) <= 2
    assert np.ptp(np.bincount(found.pool.classes[found.pool.kinds == 0])) <= 3
    np.testing.assert_array_equal(found.test_images, base.test_images)
    assert set(keys(found.labelled_images)) < set(keys(base.labelled_images))
    np.testing.assert_array_equal(found.pool.images, again.pool.images)


def test_the_truth_is_true():
    class_of = dict(zip(keys(RAW["images"]), RAW["labels"], strict=True))
    splits = split(ood_source="mix")
    for part in (splits.pool, splits.heldout):
        for image, kind, label in zip(part.images, part.kinds, part.classes, strict=True):
            real = class_of.get(image.tobytes())
            expected = "id" if real in range(6) else "unseen" if real is not None else None
            if expected is None:
                assert KIND_NAMES[kind] in ("patches", "noise")
            else:
                assert KIND_NAMES[kind] == expected
            assert label == (real if kind == 0 else -1)
    assert [class_of[key] for key in keys(splits.labelled_images)] == splits.labels.tolist()
    assert [class_of[key] for key in keys(splits.test_images)] == splits.test_labels.tolist()


def test_seeds_differ():
    first, other = split(3), split(4)
    assert (first.labelled_images != other.labelled_images).any()
    assert (first.test_images != other.test_images).any()


def test_other_seen_classes():
    splits = split(seen_classes=[7, 2, 9], pool_size=200, heldout_size=60, test_size=90)
    assert splits.class_names == ("7", "2", "9")
    digit_of = dict(zip(keys(RAW["images"]), RAW["labels"], strict=True))
    named = [int(splits.class_names[label]) for label in splits.labels]
    assert named == [digit_of[key] for key in keys(splits.labelled_images)]
    assert set(splits.pool.classes[splits.pool.kinds == 0].tolist()) == {0, 1, 2}
