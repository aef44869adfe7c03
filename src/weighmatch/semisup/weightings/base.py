"""What all weightings share.

A weighting gives each unlabelled image of a batch a weight. Weights have mean 1 over the batch
(save where `Weighting.weights` is overridden): they redistribute the consistency loss, and cannot
switch it off.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weighmatch.checks import require_choice
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.parts.group import ALONE, Group
from weighmatch.semisup.parts.losses import PseudoLabels, mean_one
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.parts.state_file import State, leaves
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams
from weighmatch.semisup.parts.views import Views
from weighmatch.semisup.weightings.meter import InfluenceMeter

# Weight of an image below the cut, before normalisation: small, so that it can come back.
BELOW_CUT = 0.05
# Pool images that are scored after an update, to place the cut: more would not move it. A pool
# that is no larger keeps these scores until the next update.
POOL_SAMPLE = 2048

Features = Callable[[], Tensor]


@dataclass(frozen=True)
class Context:
    """What a weighting is built from.

    Attributes:
        classifier: the classifier that is being trained.
        labelled: stored images that it trains on, uint8 (n, C, H, W), or stored features.
        labels: their labels, (n,).
        outer: images and labels of the outer loss; often the same ones.
        pool: the stored unlabelled images, N of them.
        classes: number of classes.
        views: makes plain, weak and strong views.
        training: the parameters of the run.
        streams: random streams by purpose.
        align: aligns the pseudo-labels' probabilities, as in training; None: nothing does.
        group: the processes that train this run, each with its share of every batch.
    """

    classifier: Classifier
    labelled: Tensor
    labels: Tensor
    outer: tuple[Tensor, Tensor]
    pool: ImageStore
    classes: int
    views: Views
    training: TrainingConfig
    streams: Streams
    align: Callable[[Tensor], Tensor] | None = None
    group: Group = ALONE


class Weighting(ABC):
    """Base of all weightings.

    Sub-classes set `name`, by which rows of `weighmatch.arms` refer to them, and say what ranks
    images (`criterion`). Training and scoring share that one method.

    Attributes:
        name: the name in the registry.
        masks: whether an image's pseudo-label must also reach τ; not where weights stand in for τ.
        lowers_outer_loss: whether the weights are learned to lower a loss on labelled images, so
            that half of these can be held out for it.
        transductive: whether it has scores for pool images alone, for those that were measured.
        cut: the score above which an image has full weight; None: scores are the weights.
        pool_scores: scores of the whole pool until the next update, (N,), or None.
        meter: what measures influences, or None.
    """

    registry: ClassVar[dict[str, type["Weighting"]]] = {}
    name: ClassVar[str]
    masks: ClassVar[bool] = True
    lowers_outer_loss: ClassVar[bool] = False
    transductive: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            Weighting.registry[cls.name] = cls

    def __init__(self, context: Context) -> None:
        self.context = context
        self.cut: float | None = None
        self.pool_scores: Tensor | None = None
        self.meter: InfluenceMeter | None = None

    @staticmethod
    def kind(name: str) -> type["Weighting"]:
        """The class of that name.

        Raises:
            ValueError: if there is none.
        """
        require_choice("weighting", name, tuple(Weighting.registry))
        return Weighting.registry[name]

    @abstractmethod
    def criterion(self, images: Tensor, features: Features, logits: Tensor) -> Tensor:
        """What ranks images, (n,), higher is better; without a graph.

        Args:
            images: weak views in training, else images as they are, (n, C, H, W) in [0, 1].
            features: gives the classifier's features of these images, (n, width).
            logits: what the classifier says of them, (n, classes), before any alignment: training
                and scoring must rank by the same.
        """

    def sized(self, scores: Tensor) -> Tensor:
        """Weights of any scale from the criterion's scores, (n,)."""
        return confidence_weights(scores, self.cut)

    def scores(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None) -> Tensor:
        """Positive weights (n,) of any scale, before they are normalised; see `weights`."""
        if self.pool_scores is not None and indices is not None:
            return self.sized(self.pool_scores[indices])
        with torch.no_grad():
            classifier = self.context.classifier
            return self.sized(
                self.criterion(weak, lambda: classifier.features(weak), pseudo.logits)
            )

    def weights(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None = None) -> Tensor:
        """Weights for a batch, (n,), of mean 1 over all processes' parts of it, without a graph.

        Args:
            weak: weak views, (n, C, H, W).
            pseudo: what the classifier says of them.
            indices: which images of the pool they are, (n,); None: none of them.
        """
        return mean_one(self.scores(weak, pseudo, indices), self.context.group)

    def update(self, classifier: Classifier) -> dict[str, float]:
        """Learn from the classifier as it stands; returns what is worth logging.

        Raises:
            FloatingPointError: if a number is not finite, of which nothing can be learned.
        """
        return {}

    def try_update(self, classifier: Classifier) -> dict[str, float] | None:
        """`update`, or None where a number was not finite: then nothing is changed."""
        before = copy.deepcopy(self.state_dict())
        try:
            log = self.update(classifier)
            self.context.group.unify(self.state_dict())
            if is_finite(self.state_dict()):
                return log
        except FloatingPointError:
            pass
        self.load_state_dict(before)
        return None

    def state_dict(self) -> State:
        """What a checkpoint needs to continue."""
        state: State = {"cut": self.cut, "pool_scores": self.pool_scores}
        if self.meter is not None:
            state["meter"] = self.meter.state_dict()
        return state

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`'s answer."""
        self.cut, scores = state["cut"], state["pool_scores"]
        self.pool_scores = None if scores is None else scores.to(self.context.pool.device)
        if self.meter is not None:
            self.meter.load_state_dict(state["meter"])

    def pool_sample(self) -> Tensor:
        """Indices of the pool images whose scores place a cut, (m,): all of a small pool."""
        size = len(self.context.pool)
        if size <= POOL_SAMPLE:
            return torch.arange(size)
        return self.context.streams.draw(size, POOL_SAMPLE, "sample for the cut")


def is_finite(state: State) -> bool:
    """Whether all tensors of nested containers are finite, and no number is NaN."""
    values = list(leaves(state))
    if any(isinstance(v, float) and math.isnan(v) for v in values):  # a cut may be infinite
        return False
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]
    # One number a device tells of all tensors there, so that it is waited for once.
    devices = {tensor.device for tensor in tensors}
    return all(
        bool(torch.stack([torch.isfinite(t).all() for t in tensors if t.device == device]).all())
        for device in devices
    )


def confidence_weights(scores: Tensor, cut: float | None) -> Tensor:
    """Scores in [0, 1] as they are, or, given a cut, `BELOW_CUT` below it and 1 above, (n,)."""
    if cut is None:
        return scores
    return torch.where(scores > cut, 1.0, BELOW_CUT).to(scores.dtype)


def otsu_cut(scores: Tensor) -> float:
    """The cut of scores (n,) into two groups that lie furthest apart (Otsu, 1979)."""
    # On the host: cumulative sums have no repeatable algorithm on a GPU.
    ordered = scores.cpu().sort().values.double()
    n = len(ordered)
    if n < 2:
        return float("-inf")
    below = torch.arange(1, n)
    sums = ordered.cumsum(0)
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / (n - below)
    best = int((below * (n - below) * gap.square()).argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)
