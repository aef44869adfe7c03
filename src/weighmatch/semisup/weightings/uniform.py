"""Equal weights: plain FixMatch."""

import torch
from torch import Tensor

from weighmatch.semisup.weightings.base import Features, Weighting


class Uniform(Weighting):
    """Every image counts the same."""

    name = "uniform"

    def criterion(self, images: Tensor, features: Features, logits: Tensor) -> Tensor:
        return torch.ones(len(images), device=images.device)
