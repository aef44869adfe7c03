"""Equal weights: plain FixMatch."""

import torch
from torch import Tensor

from weighmatch.semisup.parts.losses import PseudoLabels
from weighmatch.semisup.weightings.base import Features, Weighting


class Uniform(Weighting):
    """Every image counts the same."""

    name = "uniform"

    def criterion(self, images: Tensor, features: Features, pseudo: PseudoLabels) -> Tensor:
        return torch.ones_like(pseudo.confidence)
