"""What tells how much of a ranked pool is worth training on; a row of `weighmatch.arms` names one.

None of them but "truth" sees which images are OOD.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.decision import Evidence, clean_chance
from weighmatch.semisup.training.measuring import measure_pool
from weighmatch.semisup.weightings.head import ConfidenceHead
from weighmatch.semisup.weightings.meter import Measured
from weighmatch.semisup.weightings.nearness import judge_pool
from weighmatch.semisup.weightings.share import Share, Slope

# The MLPs' probability from which an image is more like a labelled one than like one of the pool.
LIKELY = 0.5
# Of the posterior of the useful share: the interval that is told.
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Known:
    """What is known of a pool before it is ranked.

    Attributes:
        trained_on: the images that the classifier was trained on, (N,) bool.
        measured: influences that were measured at earlier classifiers, or none.
        slopes: what these measurements said of the useful share.
    """

    trained_on: Tensor
    measured: Measured | None = None
    slopes: list[Slope] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """Features of the images that a head is fitted to.

    Attributes:
        positives: of strong views of the n labelled images in turn, as many of each, (m, width).
        labels: labels of the n labelled images, (n,).
        views: of strong views of pool images, (views, k, width).
        labelled: of the labelled images as they are, (n, width).
        pool: of the same pool images as they are, (k, width).
    """

    positives: Tensor
    labels: Tensor
    views: Tensor
    labelled: Tensor
    pool: Tensor


@dataclass(frozen=True)
class Case:
    """All that a judge may look at.

    Attributes:
        run: the run whose features are ranked by.
        data: labelled images and the pool.
        config: what defines the whole run.
        seed: of what is drawn.
        seen: features.
        head: the head that ranks.
        scores: its raw scores of the pool, (N,).
        likely: its MLPs' probability that an image is a labelled one, (N,).
        known: what is known of the pool before.
    """

    run: TrainedRun
    data: TrainingSet
    config: RunConfig
    seed: int
    seen: Seen
    head: ConfidenceHead
    scores: Tensor
    likely: Tensor
    known: Known

    @property
    def level(self) -> float:
        """The level below which a pool is not kept whole."""
        return self.config.training.ranking.contamination_level

    def chance_clean(self) -> float | None:
        """`chance_clean` of what the head was fitted to."""
        return chance_clean(self.head, self.seen, self.config.classes)


Verdict = tuple[Evidence, Known]


def chance_clean(head: ConfidenceHead, seen: Seen, classes: int) -> float | None:
    """`decision.clean_chance` on the features that a head was fitted to."""
    positives, views = head.norm(seen.positives), head.norm(seen.views)
    return clean_chance(positives, seen.labels, views, classes)


def by_test(case: Case) -> Verdict:
    """A test of a clean pool; as much is kept as the MLPs find more like a labelled image."""
    share = float((case.likely > LIKELY).float().mean())
    return Evidence(share, case.chance_clean(), case.level), case.known


def by_prior(case: Case) -> Verdict:
    """The posterior of the useful share without any hypergradient.

    The first guess is the share that the MLPs find more like a labelled image than like the pool,
    and a test of a clean pool gives the odds.
    """
    guess = float((case.likely > LIKELY).float().mean())
    share = Share(case.known.slopes, guess, case.chance_clean())
    low, high = (share.quantile(level) for level in INTERVAL)
    evidence = Evidence(share.quantile(0.5), share.chance_clean(), case.level, low, high)
    return evidence, case.known


def by_hypergradient(case: Case) -> Verdict:
    """The posterior of the useful share, given hypergradients at this and earlier classifiers."""
    known = case.known
    measured, slope = measure_pool(
        case.run,
        case.data,
        known.trained_on,
        case.scores,
        known.measured,
        case.config,
        case.seed,
    )
    slopes = [*known.slopes, slope]
    return by_prior(replace(case, known=replace(known, measured=measured, slopes=slopes)))


def by_truth(case: Case) -> Verdict:
    """The share that is told: what the others could gain if they knew it."""
    share = case.data.useful_share
    if share is None:
        raise ValueError(
            f"the arm {case.config.arm} must be told how much of the pool is useful; use data "
            "whose truth is known, or leave the arm out"
        )
    return Evidence(share, 0.0, 1.0), case.known


def by_nearness(case: Case) -> Verdict:
    """A rank test, which is exact on features that were not trained on the labels."""
    norm, seen = case.head.norm, case.seen
    labelled, pool = norm(seen.labelled), norm(seen.pool)
    p_clean, share = judge_pool(labelled, seen.labels, pool, case.config.classes)
    return Evidence(share, p_clean, case.level), case.known


JUDGES: dict[str, Callable[[Case], Verdict]] = {
    "test": by_test,
    "prior": by_prior,
    "hypergradient": by_hypergradient,
    "truth": by_truth,
    "nearness": by_nearness,
}
