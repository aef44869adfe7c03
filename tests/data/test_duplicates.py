"""Copies among images whose hashes do not tell them apart."""

import numpy as np

from weighmatch.data import duplicates
from weighmatch.data.duplicates import find_copies


def plain_pictures(count, side, rng):
    """A few coarse backgrounds with a little square of noise at a random place, (n, 3, s, s)."""
    coarse = rng.integers(60, 190, (3, 3, 1, 2))
    images = np.kron(coarse[rng.integers(0, 3, count)], np.ones((1, 1, side, side // 2)))
    for image in images:
        top, left = rng.integers(0, side - 12, 2)
        image[:, top : top + 12, left : left + 12] = rng.integers(0, 256, (3, 12, 12))
    return images.clip(0, 255).astype(np.uint8)


def test_thumbnails_spare_comparisons_and_lose_no_copy(monkeypatch):
    rng = np.random.default_rng(0)
    originals = plain_pictures(60, 48, rng)
    copies = originals[:20].astype(int) + rng.integers(-3, 4, (20, 3, 48, 48))
    images = np.concatenate([originals, copies.clip(0, 255).astype(np.uint8)])
    compared = []
    thorough = duplicates._alike

    def count(stored, rows, pairs):
        compared.append(len(pairs))
        return thorough(stored, rows, pairs)

    monkeypatch.setattr(duplicates, "_alike", count)
    # Every hash is the same, so that all pairs within a window are candidates.
    given = [f"{k}" for k in range(80)], np.zeros(80, np.uint64), images, np.arange(80)
    found = find_copies(*given)
    monkeypatch.setattr(duplicates, "_roughly_alike", lambda *_: slice(None))
    np.testing.assert_array_equal(found.near, find_copies(*given).near)
    assert (found.near[60:] >= 0).all()
    assert compared[0] < compared[1] / 2
