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
# A gap of fewer points is no image's, but what rounding leaves.
MIN_GAP = 1e-9


@dataclass(frozen=True)
class PairedDifference:
    """The mean of paired differences and how sure it is.

    Attributes:
        mean: the mean difference.
        low, high: its 95 % t interval; None with a single seed.
        p_value: the result of a two-sided sign-flip test.
        seeds: the number of pairs.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float
    seeds: int


def paired_difference(differences: Floats) -> PairedDifference:
    """Mean, t interval and sign-flip test of differences (n,), one a seed.

    Raises:
        ValueError: without a difference.
    """
    n = len(differences)
    if n == 0:
        raise ValueError("a comparison needs at least one seed that both arms were trained with")
    mean = float(differences.mean())
    low, high = mean_interval(differences)
    return PairedDifference(mean, low, high, sign_flip_test(differences), n)


def mean_interval(values: Floats) -> tuple[float | None, float | None]:
    """95 % t interval of a mean; (None, None) for fewer than two values."""
    if len(values) < 2:
        return None, None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    mean = float(values.mean())
    return mean - half, mean + half


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
