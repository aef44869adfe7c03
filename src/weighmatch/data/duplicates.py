"""Copies among images: exact ones by a hash of the file, near ones by a perceptual hash.

A near copy must pass two tests. Its perceptual hash differs in at most `NEAR_BITS` of 64 bits,
and its pixels correlate with those of the original. The second test keeps apart images that are
alike in their coarse parts alone, such as two drawings of the same letter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weighmatch.data.splits import Images, Labels

NEAR_BITS = 4
# Of 60,000 photographs of 32×32 all pairs that these find were the same picture; of 4,000 rendered
# characters, which are all different, they find at most 4, of 1,797 digits of 8×8 they find 2.
NEAR_CORRELATION, NEAR_CORRELATION_OF_SMALL = 0.95, 0.98
SMALL = 16 * 16
# Images whose levels spread less than this are flat: they are copies if they differ no more.
FLAT = 2.0
# Two hashes that differ in at most 4 bits agree in one of 5 parts of them; among the hashes that
# agree in a part, each is compared with this many of those that follow it in order.
BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))
WINDOW = 128
PAIRS_AT_ONCE = 2_048
# Plain pictures have many hashes alike. Before pixels are compared, thumbnails of this side are;
# they may correlate by so much less. Half of the contrast of two pictures may then lie in details.
THUMBNAIL, LENIENCE = 8, 0.05
THUMBNAILS_AT_ONCE = 64 * PAIRS_AT_ONCE


@dataclass(frozen=True, eq=False)
class Copies:
    """Which images are copies of which others.

    Attributes:
        exact: for each image, the position of the one whose file has the same bytes, or −1, (n,).
        near: the position of the one that it is a near copy of, or −1, (n,).
    """

    exact: Labels
    near: Labels

    @property
    def original(self) -> Labels:
        """The position of the one that counts in its place: its own where it is no copy, (n,)."""
        own = np.arange(len(self.exact))
        first = np.where(self.exact >= 0, self.exact, own)
        return np.where(self.near[first] >= 0, self.near[first], first)


def find_copies(
    content: Sequence[str],
    perceptual: NDArray[np.uint64],
    stored: Images,
    rows: NDArray[np.int64],
) -> Copies:
    """Find copies; of several copies the first counts.

    No original is a copy itself, and no image is a near copy of a copy: chains, as of the frames
    of a film, are not followed.

    Args:
        content: a hash of each file's bytes, (n,).
        perceptual: the perceptual hash of each image, (n,).
        stored: an array of images, (m, C, H, W).
        rows: the row of each image in `stored`, (n,).
    """
    n = len(content)
    exact, near = np.full(n, -1, np.int64), np.full(n, -1, np.int64)
    first: dict[str, int] = {}
    for position, digest in enumerate(content):
        original = first.setdefault(digest, position)
        if original != position:
            exact[position] = original
    single = np.flatnonzero(exact < 0)
    pairs = single[_close_pairs(perceptual[single])]
    pairs = pairs[_roughly_alike(stored, rows, pairs)]
    pairs = pairs[_alike(stored, rows, pairs)]
    # The later of two is a copy of the earlier, if that is an original.
    for early, late in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if near[early] < 0 and near[late] < 0:
            near[late] = early
    return Copies(exact, near)


def _close_pairs(hashes: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Pairs of positions (k, 2), the smaller first, whose hashes differ in few bits."""
    found = [np.empty((0, 2), np.intp)]
    for shift, bits in BANDS:
        # The part first, so that hashes which agree in it lie side by side.
        left = np.uint64(shift)
        turned = (hashes << left) | (hashes >> np.uint64(64 - shift)) if shift else hashes
        order = np.argsort(turned, kind="stable")
        ordered = turned[order]
        part = ordered >> np.uint64(64 - bits)
        for step in range(1, min(WINDOW, len(hashes) - 1) + 1):
            same = part[step:] == part[:-step]
            if not same.any():
                break
            close = same & (np.bitwise_count(ordered[step:] ^ ordered[:-step]) <= NEAR_BITS)
            where = np.flatnonzero(close)
            found.append(np.stack([order[where], order[where + step]], 1))
    pairs = np.sort(np.concatenate(found), 1)
    unique: NDArray[np.intp] = np.unique(pairs, axis=0)
    return unique


def _roughly_alike(
    stored: Images, rows: NDArray[np.int64], pairs: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Whether the thumbnails of each pair may be of the same picture, (k,)."""
    alike = np.ones(len(pairs), bool)
    step = min(stored.shape[2:]) // THUMBNAIL if len(stored) else 0
    if step < 2 or not len(pairs):
        return alike
    places, pair_places = np.unique(pairs, return_inverse=True)
    pair_places = pair_places.reshape(pairs.shape)
    side = step * THUMBNAIL
    thumbnails = np.empty((len(places), stored.shape[1] * THUMBNAIL**2), np.float32)
    for start in range(0, len(places), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        images = stored[rows[places[part]], :, :side, :side]
        blocks = images.reshape(*images.shape[:2], THUMBNAIL, step, THUMBNAIL, step)
        means = blocks.mean((3, 5), dtype=np.float32)
        thumbnails[part] = means.reshape(len(means), -1)
    thumbnails -= thumbnails.mean(1, keepdims=True)
    spread = thumbnails.std(1)
    thumbnails /= np.maximum(spread, 1e-6)[:, None]
    for start in range(0, len(pairs), THUMBNAILS_AT_ONCE):
        part = slice(start, start + THUMBNAILS_AT_ONCE)
        first, second = pair_places[part].T
        alike[part] = (thumbnails[first] * thumbnails[second]).mean(1) >= (
            NEAR_CORRELATION - LENIENCE
        )
        # A thumbnail may be flat where its picture is not.
        alike[part] |= np.minimum(spread[first], spread[second]) < FLAT
    return alike


def _alike(stored: Images, rows: NDArray[np.int64], pairs: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether the pixels of each pair say the same, (k,)."""
    alike = np.zeros(len(pairs), bool)
    small = stored[0, 0].size < SMALL if len(stored) else False
    enough = NEAR_CORRELATION_OF_SMALL if small else NEAR_CORRELATION
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        part = pairs[start : start + PAIRS_AT_ONCE]
        a, b = (
            stored[rows[part[:, side]]].reshape(len(part), -1).astype(np.float32) for side in (0, 1)
        )
        difference = np.abs(a - b).mean(1)
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        spread_a, spread_b = a.std(1), b.std(1)
        flat = np.minimum(spread_a, spread_b) < FLAT
        correlation = (a * b).mean(1) / np.maximum(spread_a * spread_b, 1e-6)
        alike[start : start + PAIRS_AT_ONCE] = np.where(
            flat, difference < FLAT, correlation >= enough
        )
    return alike
