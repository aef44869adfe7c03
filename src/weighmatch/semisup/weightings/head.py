"""The head on frozen features that ranks a pool between stages and rounds."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighmatch.semisup.weightings.nearness import NEIGHBOURS, REFERENCES, Nearness


class Moments(NamedTuple):
    """Sums over features by class; those of a set less those of a part are those of the rest.

    Attributes:
        counts: number of features of each class, (classes,).
        sums: sum of the features of each class, (classes, width).
        squares: Σ x xᵀ over all classes, (width, width).
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor | None = None, classes: int = 1) -> "Moments":
        """The moments of features (n, width) with labels (n,), or of a single class."""
        if labels is None:
            labels = torch.zeros(len(features), dtype=torch.long)
        counts = labels.bincount(minlength=classes).to(features.dtype)
        sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
        return cls(counts, sums, features.T @ features)

    @classmethod
    def together(cls, parts: Sequence["Moments"]) -> "Moments":
        """The moments of all parts taken together."""
        counts, sums, squares = (torch.stack(terms).sum(0) for terms in zip(*parts, strict=True))
        return cls(counts, sums, squares)

    def without(self, part: "Moments") -> "Moments":
        """The moments of what is not in `part`."""
        return Moments(*(whole - piece for whole, piece in zip(self, part, strict=True)))


# How far `RelativeMahalanobis` shrinks its covariances towards a multiple of the identity.
SHRINKAGE = 0.7


class RelativeMahalanobis(nn.Module):
    """How much more like a class than like the pool features are, (n, width) -> (n,).

    The largest over the classes of the log-ratio of two normal densities, that of the class, all
    of them with one covariance, and that of the pool (Ren et al., "A simple fix to Mahalanobis
    distance for improving near-OOD detection", 2021), up to a constant. It is estimated, not
    trained.
    """

    quadratic: Tensor
    linear: Tensor
    constant: Tensor
    centre: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("quadratic", torch.zeros(width, width))
        self.register_buffer("linear", torch.zeros(classes, width))
        self.register_buffer("constant", torch.zeros(classes))
        self.register_buffer("centre", torch.zeros(width))

    def fit(self, labelled: Tensor, labels: Tensor, pool: Tensor) -> None:
        """Estimate the densities from features (m, width), labels (m,) and the pool's features."""
        moments = Moments.of(labelled, labels, len(self.constant))
        self.fit_to_moments(moments, Moments.of(pool))

    def fit_to_moments(self, labelled: "Moments", pool: "Moments") -> None:
        """Estimate the densities.

        Args:
            labelled: moments of the features of labelled images, by class.
            pool: moments of the pool's features.
        """
        self.centre = pool.sums.sum(0) / pool.counts.sum()
        counts = labelled.counts.unsqueeze(1)
        means = labelled.sums / counts.clamp(min=1)
        inside = _precision(labelled.squares - (counts * means).T @ means, labelled.counts.sum())
        everywhere = pool.squares - pool.counts.sum() * torch.outer(self.centre, self.centre)
        self.quadratic = _precision(everywhere, pool.counts.sum()) - inside
        means = means - self.centre
        self.linear = means @ inside
        constant = -0.5 * (self.linear * means).sum(1)
        # No image is like a class of which none was seen.
        self.constant = constant.masked_fill(labelled.counts == 0, -torch.inf)

    def forward(self, features: Tensor) -> Tensor:
        centred = features - self.centre
        classes = centred @ self.linear.T + self.constant
        ratio: Tensor = 0.5 * (centred @ self.quadratic * centred).sum(1) + classes.amax(1)
        return ratio


def _precision(scatter: Tensor, count: Tensor) -> Tensor:
    """Inverse of the shrunk covariance, (width, width), from Σ (x − mean)(x − mean)ᵀ."""
    covariance = scatter / count
    level = covariance.diagonal().mean().clamp(min=1e-6)
    identity = torch.eye(len(covariance))
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * level * identity
    precision: Tensor = torch.linalg.inv(shrunk)
    return precision


# Weight of the distance in a `ConfidenceHead`'s score, where the MLPs have weight 1.
DISTANCE_WEIGHT = 2.0


class ConfidenceHead(nn.Module):
    """One raw score an image from frozen features, (n, width) -> (n,).

    The score is a weighted sum of two parts, each divided by its spread on the pool: the mean of
    some small MLPs, and a distance: the relative Mahalanobis distance on features that were
    trained on the labels, and nearness on those of a frozen backbone. The MLPs make no assumption
    on the features; the distance cannot learn few labelled images by heart. One MLP depends much
    on its start, so there are five of them, side by side in one wide layer. The features come from
    a classifier that is no longer trained: the score is a function of the image alone, and the
    mixed derivative by one JVP stays exact.

    A head with references averages an image's score with those of its nearest images of the pool:
    images of one kind lie together, and their mean has less noise.
    """

    location: Tensor
    scale: Tensor
    references: Tensor
    reference_scores: Tensor
    distance: RelativeMahalanobis | Nearness

    def __init__(
        self,
        width: int,
        classes: int,
        seed: int,
        hidden: int = 16,
        members: int = 5,
        distance: Nearness | None = None,
        references: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(width, elementwise_affine=False)
            self.hidden = nn.Linear(width, members * hidden)
            bound = hidden**-0.5
            self.output = nn.Parameter(torch.empty(members, hidden).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.empty(members).uniform_(-bound, bound))
        self.distance = distance or RelativeMahalanobis(width, classes)
        self.register_buffer("location", torch.zeros(2))
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("references", torch.zeros(references, width, dtype=torch.float16))
        self.register_buffer("reference_scores", torch.zeros(references))

    @classmethod
    def from_state(cls, state: dict[str, Tensor], classes: int) -> "ConfidenceHead":
        """The head whose parameters and buffers these are."""
        width = state["hidden.weight"].shape[1]
        distance = None
        if "distance.references" in state:
            sizes = (len(state[f"distance.{name}"]) for name in ("examples", "references"))
            distance = Nearness(width, classes, *sizes)
        references = len(state["reference_scores"])
        head = cls(width, classes, seed=0, distance=distance, references=references)
        head.load_state_dict(state)
        return head

    def members(self, features: Tensor) -> Tensor:
        """The score of every MLP, (n, members)."""
        return self.members_of(self.norm(features))

    def members_of(self, normalised: Tensor) -> Tensor:
        """The score of every MLP for features that went through `norm` before."""
        hidden = F.relu(self.hidden(normalised)).unflatten(1, self.output.shape)
        scores: Tensor = torch.einsum("nmh,mh->nm", hidden, self.output) + self.bias
        return scores

    def fit_distance(self, features: Tensor, labels: Tensor, pool: Tensor) -> None:
        """Estimate the distance.

        Args:
            features: features of labelled images after `norm`, (m, width).
            labels: their labels, (m,).
            pool: features of the pool after `norm`, (N, width).
        """
        self.distance.fit(features, labels, pool)

    def standardise(self, parts: Tensor) -> None:
        """Give both parts mean 0 and spread 1, given those of the pool's images, (N, 2)."""
        self.location = parts.mean(0)
        self.scale = parts.std(0, correction=0).clamp(min=1e-6)

    def parts(self, features: Tensor) -> Tensor:
        """What MLPs and distance say of features (n, width): (n, 2)."""
        normalised = self.norm(features)
        return torch.stack([self.members_of(normalised).mean(1), self.distance(normalised)], dim=1)

    def refer_to(self, features: Tensor) -> None:
        """Average scores over the pool from now on; comes after `standardise`.

        Args:
            features: features of images of the pool, (N, width); the first ones are kept.
        """
        kept = features[:REFERENCES]
        self.reference_scores = self.combine(self.parts(kept))
        self.references = F.normalize(self.norm(kept)).half()

    def forward(self, features: Tensor) -> Tensor:
        return self.averaged(features, self.combine(self.parts(features)))

    def combine(self, parts: Tensor) -> Tensor:
        """The raw score of an image alone from both parts, (n, 2) -> (n,)."""
        mlps, distance = ((parts - self.location) / self.scale).unbind(1)
        scores: Tensor = mlps + DISTANCE_WEIGHT * distance
        return scores

    def averaged(self, features: Tensor, scores: Tensor) -> Tensor:
        """Scores (n,) of features (n, width), averaged with those of their nearest references."""
        if len(self.references) == 0:
            return scores
        directions = F.normalize(self.norm(features))
        count = min(NEIGHBOURS, len(self.references))
        near = (directions @ self.references.to(directions.dtype).T).topk(count, dim=1).indices
        together: Tensor = (scores + self.reference_scores[near].sum(1)) / (1 + count)
        return together
