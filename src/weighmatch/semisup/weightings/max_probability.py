"""Weights from the pseudo-label's own confidence."""

from torch import Tensor

from weighmatch.semisup.parts.losses import PseudoLabels
from weighmatch.semisup.weightings.base import Features, Weighting


class MaxProbability(Weighting):
    """The weight is the confidence of the pseudo-label."""

    name = "max_probability"

    def criterion(self, images: Tensor, features: Features, pseudo: PseudoLabels) -> Tensor:
        return pseudo.confidence
