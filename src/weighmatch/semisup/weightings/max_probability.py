"""Weights from the pseudo-label's own confidence."""

from torch import Tensor

from weighmatch.semisup.weightings.base import Features, Weighting


class MaxProbability(Weighting):
    """The weight is the confidence of the pseudo-label."""

    name = "max_probability"

    def criterion(self, images: Tensor, features: Features, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1).amax(dim=1)
