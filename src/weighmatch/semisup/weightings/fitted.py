"""Weightings whose scores come from a small network that is fitted beside the classifier."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from weighmatch.semisup.parts.networks import make_confidence_network
from weighmatch.semisup.parts.state_file import State
from weighmatch.semisup.parts.streams import derive_seed
from weighmatch.semisup.weightings.base import Context, Features, Weighting, otsu_cut


class FittedWeighting(Weighting):
    """Scores σ(f_φ(·)) of a network that Adam fits."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        seed = derive_seed(context.streams.seed, "initialisation of the confidence network")
        config = context.training.weighting
        self.network = self.make_network(seed).to(context.pool.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @abstractmethod
    def make_network(self, seed: int) -> nn.Module:
        """A freshly initialised network that gives raw scores (n,)."""

    def descend(self, loss: Tensor) -> None:
        """One step of Adam."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def state_dict(self) -> State:
        own = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


class ImageWeighting(FittedWeighting):
    """Scores of the Confidence Network, which sees the image alone.

    Sub-classes fit it, and score the pool after each fit: with scores that are far from perfect,
    weights of two sizes helped where soft ones did not.
    """

    def make_network(self, seed: int) -> nn.Module:
        stored = tuple(self.context.pool.shape[1:])
        return make_confidence_network(stored, self.context.training.weighting.width, seed)

    def criterion(self, images: Tensor, features: Features, logits: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.sigmoid(self.network(images))

    def score_pool(self) -> None:
        """Score the pool or a sample of it; move the cut to where the scores fall apart."""
        sample = self.pool_sample()
        with torch.no_grad():
            scores = self.context.group.divide(self._scores_of, sample)
        self.pool_scores = scores if len(sample) == len(self.context.pool) else None
        if self.context.training.weighting.weights == "hard":
            self.cut = otsu_cut(scores)

    def _scores_of(self, indices: Tensor) -> Tensor:
        """Scores of images of the pool as they are, (n,)."""
        return torch.sigmoid(self.network(self.context.views.plain(self.context.pool[indices])))
