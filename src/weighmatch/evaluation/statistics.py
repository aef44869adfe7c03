"""Paired comparisons over seeds."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.floating[Any]]

# Up to this many seeds all sign patterns are enumerated; beyond, they are sampled.
MAX_EXACT_SEEDS = 16
RESAMPLES = 20_000
# A difference counts as shown where chance alone would give it at most this often.
LEVEL = 0.05
# A gap of fewer points is no image's, but what rounding leaves.
MIN_GAP = 1e-9


@dataclass(frozen=True)
class PairedDifference:
    """The mean of paired differences and how sure it is.

    Attributes:
        mean: the mean difference.
        low, high: its 95 % t interval; None with a single seed.
        p_value: the result of a two-sided sign-flip test, or of the corrected t test.
        seeds: the number of pairs.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float
    seeds: int


def paired_difference(differences: Floats, overlap: float = 0.0) -> PairedDifference:
    """Mean, t interval and test of differences (n,), one a seed or fold.

    Args:
        differences: paired differences, (n,).
        overlap: images tested on for each image trained on, where the training sets overlap as
            those of cross-validation do; 0 where seeds are drawn apart. The test is then the
            corrected resampled t test, else a sign-flip test.

    Raises:
        ValueError: without a difference.
    """
    n = len(differences)
    if n == 0:
        raise ValueError("a comparison needs at least one seed that both arms were trained with")
    mean = float(differences.mean())
    low, high = mean_interval(differences, overlap)
    p_value = _t_test(differences, overlap) if overlap else sign_flip_test(differences)
    return PairedDifference(mean, low, high, p_value, n)


def mean_interval(values: Floats, overlap: float = 0.0) -> tuple[float | None, float | None]:
    """95 % t interval of a mean; (None, None) for fewer than two values.

    With training sets that overlap the variance of the mean is not s² / n: it is taken as
    (1 / n + `overlap`) s² (Nadeau & Bengio, "Inference for the generalization error", 2003).
    """
    if len(values) < 2:
        return None, None
    half = float(stats.t.ppf(0.975, len(values) - 1) * _standard_error(values, overlap))
    mean = float(values.mean())
    return mean - half, mean + half


def _standard_error(values: Floats, overlap: float) -> float:
    if not overlap:
        return float(stats.sem(values))
    return float(values.std(ddof=1) * np.sqrt(1 / len(values) + overlap))


def _t_test(differences: Floats, overlap: float) -> float:
    """Two-sided p of a mean of 0; 1 where nothing varies."""
    error = _standard_error(differences, overlap) if len(differences) > 1 else 0.0
    if not error:
        return 1.0
    return float(2 * stats.t.sf(abs(differences.mean()) / error, len(differences) - 1))


def seeds_to_show() -> int:
    """The fewest seeds with which a sign-flip test can reach `LEVEL`: two patterns of 2ⁿ."""
    return int(np.ceil(np.log2(2 / LEVEL)))


def images_to_tell(first: float, second: float, half: float) -> int:
    """Test images by which an interval of a difference of accuracies is at most ± `half`.

    By the normal approximation of two binomials, as if both classifiers erred apart: that they
    err on the same images makes it an upper bound, as a rule.

    Args:
        first: an accuracy, 0 to 1; it counts as one from .05 to .95.
        second: the other one.
        half: half of the 95 % interval's width, above 0.
    """
    shares = np.clip([first, second], 0.05, 0.95)
    return int(np.ceil((1.96 / half) ** 2 * float((shares * (1 - shares)).sum())))


def sign_flip_test(differences: Floats) -> float:
    """Two-sided p-value of the hypothesis that each difference's sign is a coin flip.

    Exact up to 16 seeds (Fisher, 1935, section 21), else from 20,000 random patterns.
    """
    n = len(differences)
    if n <= MAX_EXACT_SEEDS:
        signs = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        rng = np.random.default_rng(0)
        signs = rng.choice((1.0, -1.0), size=(RESAMPLES, n))
        signs[0] = 1.0  # the pattern observed is one of those possible
    observed = abs(differences.sum())
    reached = np.abs(signs @ differences) >= observed - 1e-9 * max(1.0, observed)
    return float(reached.mean())


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for having made all of these tests (Holm, 1979)."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, position in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[position])
        adjusted[position] = min(1.0, running)
    return [float(p) for p in adjusted]


@dataclass(frozen=True)
class GapClosed:
    """Share of the way from FixMatch to the oracle, with a 95 % bootstrap interval.

    All None where the oracle is not above FixMatch, or (the interval) with a single seed.
    """

    share: float | None
    low: float | None
    high: float | None


def gap_closed(arm: Floats, baseline: Floats, oracle: Floats) -> GapClosed:
    """(mean arm − mean baseline) / (mean oracle − mean baseline) over paired seeds (n,).

    The interval resamples seeds; resamples without a gap are left out of it.
    """
    gap = float((oracle - baseline).mean())
    if gap <= MIN_GAP:
        return GapClosed(None, None, None)
    share = float((arm - baseline).mean()) / gap
    n = len(arm)
    if n < 2:
        return GapClosed(share, None, None)
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES // 2, n))
    gaps = (oracle - baseline)[drawn].mean(axis=1)
    gains = (arm - baseline)[drawn].mean(axis=1)
    there = gaps > MIN_GAP
    shares = gains[there] / gaps[there]
    low, high = np.quantile(shares, (0.025, 0.975))
    return GapClosed(share, float(low), float(high))
