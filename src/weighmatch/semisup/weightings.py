"""The weights of the arms that do not need a hypergradient.

A weighting gives each unlabelled image of a batch a weight, scaled to mean 1 over the batch (save
where `Weighting.weights` is overridden): it redistributes the consistency loss, and cannot switch
it off.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighmatch.semisup.config import WeighingConfig
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.losses import PseudoLabels, mean_one
from weighmatch.semisup.parts.networks import Classifier, ConfidenceNetwork
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams, derive_seed


class Weighting(ABC):
    """Base of all weightings.

    Attributes:
        masks: whether an image's pseudo-label must also reach τ; not where weights stand in for τ.
    """

    masks = True

    def weights(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None = None) -> Tensor:
        """Weights of mean 1 for a batch, (n,), without a graph.

        Args:
            weak: weak views, (n, C, H, W).
            pseudo: what the classifier says of them.
            indices: which images of the pool they are, (n,); None: none of them.
        """
        return mean_one(self.scores(weak, pseudo, indices))

    @abstractmethod
    def scores(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None) -> Tensor:
        """Positive scores (n,) of any scale: the weights before they are normalised."""

    def update(self, classifier: Classifier) -> dict[str, float]:
        """Learn from the classifier as it stands; returns what is worth logging."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (not all keep a state)
        """Continue from `state_dict`'s answer."""


class Uniform(Weighting):
    """Every image counts the same: plain FixMatch."""

    def scores(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None) -> Tensor:
        return torch.ones_like(pseudo.confidence)


class MaxProbability(Weighting):
    """The pseudo-label's own confidence."""

    def scores(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None) -> Tensor:
        return pseudo.confidence


# Weight of an image below the cut, before normalisation: small, so that it can come back.
BELOW_CUT = 0.05
# Pool images that are scored after an update, to place the cut: more would not move it. A pool
# that is no larger keeps these scores until the next update.
SCORED = 2048


def confidence_weights(scores: Tensor, cut: float | None) -> Tensor:
    """Scores in [0, 1] as they are, or, given a cut, `BELOW_CUT` below it and 1 above, (n,)."""
    if cut is None:
        return scores
    return torch.where(scores > cut, 1.0, BELOW_CUT).to(scores.dtype)


def otsu_cut(scores: Tensor) -> float:
    """The cut of scores (n,) into two groups that lie furthest apart (Otsu, 1979)."""
    # On the host: sums that build up have no repeatable algorithm on a GPU.
    ordered = scores.cpu().sort().values.double()
    n = len(ordered)
    if n < 2:
        return float("-inf")
    below = torch.arange(1, n)
    sums = ordered.cumsum(0)
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / (n - below)
    best = int((below * (n - below) * gap.square()).argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)


class InductiveWeighting(Weighting):
    """Weights from scores σ(f_φ(u)), f_φ a small network on the image alone.

    Sub-classes say how φ is fitted, and score the pool after each fit: with scores that are far
    from perfect, weights of two sizes helped where soft ones did not.
    """

    def __init__(
        self,
        labelled: Tensor,
        labels: Tensor,
        pool: ImageStore,
        augmentation: Augmentation,
        config: WeighingConfig,
        streams: Streams,
    ) -> None:
        self.labelled, self.labels, self.pool = labelled, labels, pool
        self.augmentation, self.config, self.streams = augmentation, config, streams
        self.cut: float | None = None
        self.pool_scores: Tensor | None = None
        self._build()

    def _build(self) -> None:
        """The network and its optimiser."""
        config = self.config
        self.network = self._make_network().to(self.pool.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def _make_network(self) -> nn.Module:
        seed = derive_seed(self.streams.seed, "initialisation of the confidence network")
        return ConfidenceNetwork(self.pool.shape[1], self.config.width, seed)

    def scores(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None) -> Tensor:
        known = self.pool_scores is not None and indices is not None
        raw = self.pool_scores[indices] if known else self._raw(weak)  # type: ignore[index]
        return confidence_weights(raw, self.cut)

    def _raw(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.sigmoid(self.network(images))

    def score_pool(self) -> None:
        """Score the pool or a sample of it; move the cut to where the scores fall apart."""
        whole = len(self.pool) <= SCORED
        sample = torch.arange(len(self.pool))
        if not whole:
            sample = self.draw(len(self.pool), SCORED, "sample for the cut")
        scores = self._raw(self.pool[sample].float() / 255)
        self.pool_scores = scores if whole else None
        if self.config.weights == "hard":
            self.cut = otsu_cut(scores)

    def draw(self, size: int, count: int, purpose: str) -> Tensor:
        """Indices (count,) below `size`, with replacement, on the CPU."""
        return torch.randint(size, (count,), generator=self.streams[purpose])

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "cut": self.cut,
            "pool_scores": self.pool_scores,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._load_scores(state)

    def _load_scores(self, state: dict[str, Any]) -> None:
        self.cut = state["cut"]
        scores = state["pool_scores"]
        self.pool_scores = None if scores is None else scores.to(self.pool.device)


class PositiveUnlabelled(InductiveWeighting):
    """A classifier of labelled against unlabelled images (Elkan & Noto, 2008).

    Labelled images are positives, the whole pool negatives, both strongly augmented so that the
    few labelled ones are not learned by heart. The odds rank unlabelled images by how much they
    look like labelled ones. The control for learned weights: it uses no classifier and no
    hypergradient.
    """

    def update(self, classifier: Classifier) -> dict[str, float]:
        half = self.config.fit_batch // 2 or 1
        total = 0.0
        for _ in range(self.config.fit_steps):
            noise = self.streams["augmentation for the confidence network"]
            positives = self.labelled[self.draw(len(self.labelled), half, "positives")]
            negatives = self.pool[self.draw(len(self.pool), half, "negatives")]
            images = self.augmentation.strong(torch.cat([positives, negatives]), noise)
            targets = torch.arange(2 * half, device=images.device).lt(half).float()
            loss = F.binary_cross_entropy_with_logits(self.network(images), targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach())
        self.score_pool()
        return {"confidence_loss": total / self.config.fit_steps}
