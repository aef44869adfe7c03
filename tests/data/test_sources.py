import numpy as np
import pytest

from weighmatch.data.sources import (
    DIGITS_PER_CLASS,
    load_digits,
    load_photographs,
    natural_patches,
    noise,
)


def test_digits_are_uint8_and_as_many_as_declared():
    images, labels = load_digits()
    assert images.dtype == np.uint8
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert tuple(np.bincount(labels)) == DIGITS_PER_CLASS


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
