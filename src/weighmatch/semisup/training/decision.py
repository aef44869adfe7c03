"""What decides how much of a ranking is kept, and which images: `decide`."""

import functools
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weighmatch.semisup.weightings.head import Moments, RelativeMahalanobis

log = logging.getLogger(__name__)

# Parts of the labelled images and of the pool when one is judged by what the others show.
FOLDS = 5
# However little of a pool is kept, it is at least this many images a class.
MIN_KEPT_PER_CLASS = 8
# The p of rank sums is multiplied by this in the test whether the pool is clean: values down to
# .004 were seen in clean pools, and less than a thousandth where three quarters are OOD.
RANK_SUM_FACTOR = 100


@dataclass(frozen=True)
class Evidence:
    """What speaks for and against keeping the whole pool.

    Attributes:
        share: the share of the pool that seems useful.
        p_clean: the chance that the pool is clean, or nominal p of the labelled images lying as
            they do in a clean pool; None: no test could be made, as a class has a single labelled
            image.
        level: level below which the pool is taken for contaminated; 1: it is, in any case.
        low: with `high` the interval that holds the useful share with a chance of 95 %, if the
            pool is contaminated; None: it is not known.
        high: see `low`.
    """

    share: float
    p_clean: float | None
    level: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Decision:
    """What is kept of a pool.

    Attributes:
        kept: the images to train on, (N,) bool.
        cut: the score above which an image counts as useful; 0: the pool seems clean.
    """

    kept: Tensor
    cut: float


def decide(scores: Tensor, classes: Tensor, count: int, evidence: Evidence) -> Decision:
    """Keep the best of each pseudo-class, as many as seem useful, or the whole pool.

    A ranking over all classes would starve those that look least sure.

    Args:
        scores: the ranking, (N,), higher is better.
        classes: pseudo-class of each image, (N,).
        count: number of classes.
        evidence: whether the pool is contaminated, and how much of it is useful.
    """
    level, share, p_clean = evidence.level, evidence.share, evidence.p_clean
    if 0 < level < 1 and p_clean is None:
        _warn_of_single_labels()
    contaminated = level >= 1 or (level > 0 if p_clean is None else p_clean < level)
    kept = torch.ones(len(scores), dtype=torch.bool)
    if not contaminated or share >= 1:
        return Decision(kept, 0.0)
    cut = float(scores.quantile(1 - share))
    return Decision(keep_best(scores, classes, share, count) if share < 1 else kept, cut)


@functools.cache
def _warn_of_single_labels() -> None:
    """Say once that nothing was tested."""
    log.warning(
        "a class has a single labelled image to train on, so that no test can tell whether the "
        "pool is clean; label another one, or set training.ranking.contamination_level to 0 (keep "
        "all) or 1 (it is contaminated)"
    )


def decide_by_cut(scores: Tensor, classes: Tensor, count: int, cut: float) -> Decision:
    """Keep the best of each pseudo-class, as many as lie above a cut; see `decide`."""
    # None is above the cut where all score the same: nothing is known of any.
    share = float((scores > cut).float().mean()) or 1.0
    kept = torch.ones(len(scores), dtype=torch.bool)
    return Decision(keep_best(scores, classes, share, count) if share < 1 else kept, cut)


def keep_best(scores: Tensor, classes: Tensor, share: float, count: int) -> Tensor:
    """The best of each pseudo-class, (N,) bool.

    Args:
        scores: (N,).
        classes: pseudo-class of each, (N,).
        share: share of the N images to keep, in equal parts of the classes; a class with fewer
            images than its part keeps them all.
        count: number of classes.
    """
    part = max(MIN_KEPT_PER_CLASS, round(share * len(scores) / count))
    kept = torch.zeros(len(scores), dtype=torch.bool)
    for label in range(count):
        members = (classes == label).nonzero().squeeze(1)
        best = scores[members].argsort(descending=True, stable=True)[:part]
        kept[members[best]] = True
    return kept


def clean_chance(positives: Tensor, labels: Tensor, views: Tensor, classes: int) -> float | None:
    """Nominal one-sided p of the labelled images scoring so much higher than a clean pool.

    Were labelled images and pool drawn alike, what tells labelled from unlabelled could not know
    a labelled image that it never saw from a pool image that it never saw. Each fold of both is
    scored by a relative Mahalanobis distance estimated on the other folds. Two tests, the smaller
    p counts:

    - the lowest labelled image: if a share q of the pool lies below all n of them, (1 − q)ⁿ, the
      mean over groups of as many copies as a pool image has views (nominal: twice a mean of
      p-values is one, however they depend on each other; Vovk & Wang, 2020);
    - the folds' Mann–Whitney statistics, summed (Mann & Whitney, 1947; by strata: van Elteren,
      1960), p taken `RANK_SUM_FACTOR` times.

    Features were trained with the labels, which lifts labelled images as a whole: rank sums see
    that in clean pools, too. It hardly lifts the lowest of them.

    Args:
        positives: features of augmented copies of the labelled images in turn, as many of each,
            (m, width).
        labels: labels of the n labelled images, (n,).
        views: features of augmented views of pool images, (views, N, width).
        classes: how many there are.

    Returns:
        p; None where a class, or the pool, has a single image.
    """
    sizes = labels.bincount()
    count = min(FOLDS, int(sizes[sizes > 0].min()), views.shape[1])
    if count < 2:
        return None
    # Every class is in every fold: a labelled image is then judged by class means that lack as much
    # of its class as of any other, and so is an image of the pool.
    folds = torch.empty_like(labels)
    for label in labels.unique():
        folds[labels == label] = torch.arange(int(sizes[label])) % count
    # Copies first: (copies, n, width).
    positives = positives.unflatten(0, (-1, len(labels)))
    pool_folds = torch.arange(views.shape[1]) % count
    copies = [positives[:, folds == fold] for fold in range(count)]
    others = [views[:, pool_folds == fold] for fold in range(count)]
    labelled = [
        Moments.of(part.flatten(0, 1), labels[folds == fold].repeat(len(part)), classes)
        for fold, part in enumerate(copies)
    ]
    pool = [Moments.of(part.flatten(0, 1)) for part in others]
    all_labelled, whole_pool = Moments.together(labelled), Moments.together(pool)
    distance = RelativeMahalanobis(positives.shape[2], classes)
    # A labelled image is the mean of as many views as one of the pool: else it would vary less.
    size = min(len(views), len(positives))
    groups = len(positives) // size
    below, excess, variance = [], 0.0, 0.0
    for fold in range(count):
        others_of_class = all_labelled.without(labelled[fold])
        distance.fit_to_moments(others_of_class, whole_pool.without(pool[fold]))
        mine, theirs = _scored(distance, copies[fold]), _scored(distance, others[fold])
        means = mine[: groups * size].unflatten(0, (groups, size)).mean(1)
        ordered = theirs[:size].mean(0).sort().values
        below.append(torch.searchsorted(ordered, means) / len(ordered))
        n, m = mine.shape[1], theirs.shape[1]
        excess += float((mine.mean(0)[:, None] > theirs.mean(0)).float().sum()) - n * m / 2
        variance += n * m * (n + m + 1) / 12
    rank_sum = 0.5 * math.erfc(excess / math.sqrt(2 * variance))
    lowest = torch.cat(below, dim=1).amin(1)
    return min(float((1 - lowest).pow(len(labels)).mean()), RANK_SUM_FACTOR * rank_sum)


def _scored(distance: RelativeMahalanobis, features: Tensor) -> Tensor:
    """Distances (views, n) of features (views, n, width)."""
    scores: Tensor = distance(features.flatten(0, 1)).unflatten(0, features.shape[:2])
    return scores
