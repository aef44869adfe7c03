"""How much of a ranked pool is worth training on, by hypergradients at several shares.

FixMatch is trained on the best share q of a ranking. Let the lower half of the whole ranking have
the weight 1 − a. The hypergradient of the outer loss in a, at a = 0, is −c(q), where −c(q) is the
mean influence of the images of the lower half. Where c is positive, training on them raises the
loss on labelled images, so that q is too large. Where it is negative, they would lower it. The best
share q* is the root of c, and about it c(q) is close to k log(q / q*). Each measurement tells of
the same root, at whatever share it was taken, so that all of them are kept: `Share` is the
posterior of q* and k on a grid.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

# Half of the prior: the whole pool is useful, and q* lies between 1 and 2. Else q* is below 1, and
# log q* is normal with this standard deviation about the logarithm of a first guess.
SMALLEST, LARGEST = 0.05, 2.0
GUESS_SPREAD = 0.5
# Slopes k that are thought possible.
LEAST_SLOPE, MOST_SLOPE = 0.05, 0.6
# Standard deviation by which c differs between classifiers of the same training.
SNAPSHOT_SPREAD = 0.1
# Points of the grid on either side of q* = 1.
POINTS = 96
# The z-value of the test of a clean pool: its spread over clean pools, and that of how much higher
# it may lie in contaminated ones. The first is below 1 as nominal p are means over copies.
CLEAN_SPREAD, CONTAMINATED_SPREAD = 0.55, 1.0


@dataclass(frozen=True)
class Slope:
    """A measurement of c at a classifier.

    Attributes:
        share: the share q of the pool that the classifier was trained on, 0 to 1.
        value: c(q), in units of the influences' root mean square.
        error: its standard error over repeated measurements of the same classifier.
    """

    share: float
    value: float
    error: float

    @classmethod
    def of(cls, share: float, scores: Tensor, influences: Tensor) -> "Slope":
        """A measurement, from repeated ones.

        Args:
            share: the share of the pool that the classifier was trained on.
            scores: the rank of each measured image among the pool, 0 (worst) to 1, (m, n).
            influences: m measurements of n images each, (m, n).
        """
        lower = (scores < 0.5).to(influences.dtype)
        values = -(influences * lower).sum(1) / lower.sum(1).clamp(min=1)
        error = float(values.std()) / len(values) ** 0.5
        return cls(share, float(values.mean()), error)


class Share:
    """The posterior of the useful share q*, given measurements of c.

    Args:
        slopes: the measurements; none: the prior.
        guess: a first guess of q*, above 0, from anything but hypergradients.
        p_clean: nominal p of a test of a clean pool, or None.
    """

    def __init__(self, slopes: list[Slope], guess: float, p_clean: float | None = None) -> None:
        below = torch.linspace(math.log(SMALLEST), 0, POINTS + 1, dtype=torch.float64)[:-1]
        above = torch.linspace(0, math.log(LARGEST), POINTS, dtype=torch.float64)
        self._roots = torch.cat([below, above])
        steepness = torch.linspace(
            math.log(LEAST_SLOPE), math.log(MOST_SLOPE), POINTS // 4, dtype=torch.float64
        ).exp()
        fit = torch.zeros(len(self._roots), len(steepness), dtype=torch.float64)
        for found in slopes:
            expected = steepness * (math.log(found.share) - self._roots[:, None])
            variance = found.error**2 + SNAPSHOT_SPREAD**2
            fit -= (expected - found.value).square() / (2 * variance)
        distance = (below - math.log(max(guess, SMALLEST))) / GUESS_SPREAD
        prior = torch.ones_like(self._roots)
        prior[:POINTS] = torch.softmax(-distance.square() / 2, dim=0) * POINTS
        prior[:POINTS] *= odds_of_test(p_clean)
        chances = prior * (fit - fit.max()).exp().mean(1)
        self._chances = chances / chances.sum()

    def chance_clean(self) -> float:
        """The chance that the whole pool is worth training on, q* ≥ 1."""
        return float(self._chances[POINTS:].sum())

    def quantile(self, level: float) -> float:
        """A quantile of q*, given that it is below 1."""
        below = self._chances[:POINTS].cumsum(0)
        position = int(torch.searchsorted(below, level * below[-1]))
        return float(self._roots[min(position, POINTS - 1)].exp())


def odds_of_test(p_clean: float | None) -> float:
    """By how much the p of a test of a clean pool raises the odds of a contaminated one.

    The z-value of p is normal about 0 in clean pools. In contaminated ones it lies higher by the
    absolute value of another normal variable.
    """
    if p_clean is None:
        return 1.0
    standard = NormalDist()
    z = -standard.inv_cdf(min(max(p_clean, 1e-12), 1 - 1e-12))
    together = math.hypot(CLEAN_SPREAD, CONTAMINATED_SPREAD)
    shifted = standard.cdf(z * CONTAMINATED_SPREAD / (CLEAN_SPREAD * together))
    alternative = 2 * NormalDist(0, together).pdf(z) * shifted
    return alternative / max(NormalDist(0, CLEAN_SPREAD).pdf(z), 1e-300)
