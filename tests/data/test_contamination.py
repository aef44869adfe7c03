import numpy as np
import pytest

from weighmatch.data.config import DataConfig
from weighmatch.data.contamination import contaminate, load_photographs, natural_patches, noise
from weighmatch.data.ood import KIND_NAMES, describe_ood


def test_patches_come_from_their_part_of_the_photographs():
    photographs = np.zeros((1, 3, 100, 400), np.uint8)
    photographs[..., 280:] = 255
    rng = np.random.default_rng(0)
    left = natural_patches(photographs, 50, 8, 1, (0.0, 0.7), rng)
    right = natural_patches(photographs, 50, 8, 3, (0.7, 1.0), rng)
    assert left.shape == (50, 1, 8, 8)
    assert (left == 0).all()
    assert right.shape == (50, 3, 8, 8)
    assert (right == 255).all()


def test_patches_are_pictures_and_differ():
    patches = natural_patches(load_photographs(), 40, 8, 1, (0.0, 0.7), np.random.default_rng(0))
    assert len({patch.tobytes() for patch in patches}) == 40
    assert patches.std(axis=(1, 2, 3)).mean() > 3


def test_noise_covers_the_range():
    image = noise(200, 8, 3, np.random.default_rng(0))
    assert image.shape == (200, 3, 8, 8)
    assert (image.min(), image.max()) == (0, 255)


@pytest.mark.parametrize("side", [8, 32, 64])
def test_patches_of_any_size_fit_their_span(side):
    rng = np.random.default_rng(0)
    patches = natural_patches(load_photographs(), 10, side, 3, (0.7, 1.0), rng)
    assert patches.shape == (10, 3, side, side)
    with pytest.raises(ValueError, match="too small for patches of 500"):
        natural_patches(load_photographs(), 1, 500, 3, (0.7, 1.0), rng)


def test_the_truth_follows_its_images_through_the_shuffle():
    """Every kind has grey levels of its own, so that an image tells what it is."""
    config = DataConfig(seeds=[0], pool_size=90, ratio=2 / 3, ood_source="unseen+patches")
    shape, classes = (30, 3, 8, 8), np.arange(30) % 3
    members = np.full(shape, 10, np.uint8) + classes.astype(np.uint8)[:, None, None, None]
    shifted = {"id": classes == 1}
    photographs = np.full((1, 3, 64, 400), 200, np.uint8)
    photographs[..., 280:] = 240  # what only held-out images may show
    foreign = {"unseen": np.full(shape, 50, np.uint8)}
    pool = contaminate(members, classes, foreign, photographs, config, 0, "pool", shifted)
    level = pool.images[:, 0, 0, 0]
    assert np.bincount(pool.kinds).tolist() == [30, 30, 30]
    for kind, low, high in (("id", 10, 12), ("unseen", 50, 50), ("patches", 200, 200)):
        mine = level[pool.kinds == KIND_NAMES.index(kind)]
        assert (mine.min(), mine.max()) == (low, high)
    expected = np.where(pool.kinds == 0, level.astype(int) - 10, -1)
    np.testing.assert_array_equal(pool.classes, expected)
    np.testing.assert_array_equal(pool.shifted, pool.classes == 1)
    assert (np.diff(pool.kinds) != 0).sum() > 20
    heldout = contaminate(members, classes, foreign, photographs, config, 0, "held-out set")
    assert set(heldout.images[heldout.kinds == 2].ravel().tolist()) == {240}
    assert not heldout.shifted.any()


def test_patches_that_nobody_asked_for_need_no_photographs():
    config = DataConfig(seeds=[0], source="glyphs", ood_source="unseen")
    large = np.zeros((4, 3, 500, 500), np.uint8)
    unlabelled = contaminate(
        large[:2], np.arange(2), {"unseen": large}, large[:0], config, 0, "pool"
    )
    assert len(unlabelled.images) == 6


def test_an_ood_source_in_words():
    assert describe_ood("unseen+noise") == "images of unseen classes and noise"
    assert describe_ood("mix") == "a mix of unseen classes, photograph patches and noise"
