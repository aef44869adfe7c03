"""Weights from the classifier's own confidence."""

from torch import Tensor

from weighmatch.semisup.weightings.base import Features, Weighting


class MaxProbability(Weighting):
    """The weight is the classifier's confidence, before any alignment of the pseudo-label."""

    name = "max_probability"

    def criterion(self, images: Tensor, features: Features, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1).amax(dim=1)
