"""Weights by a truncated Gaussian of the confidence (SoftMatch; Chen et al., 2023)."""

import torch
from torch import Tensor

from weighmatch.semisup.parts.losses import PseudoLabels
from weighmatch.semisup.parts.running import RunningMean
from weighmatch.semisup.parts.state_file import State
from weighmatch.semisup.weightings.base import Context, Features, Weighting

# The Gaussian's standard deviation is that of the confidences over this (the authors' code).
SIGMAS = 2.0


def truncated_gaussian(confidence: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """1 from the mean on, exp(−(c − mean)² · `SIGMAS`²/(2 · variance)) below it, (n,).

    Chen et al. (2023) with λ_max = 1. Before any confidence was seen, at mean 0 and variance 0,
    it is 1.
    """
    below = (confidence - mean).clamp(max=0)
    spread = variance.clamp(min=torch.finfo(variance.dtype).tiny) / SIGMAS**2
    return torch.exp(-below.square() / (2 * spread))


class SoftMatch(Weighting):
    """A truncated Gaussian of the confidence in place of the threshold (Chen et al., 2023).

    Mean and variance of the confidences are running ones over the training batches from the end
    of the warm-up on. The paper starts them at 1/classes and 1 and forgets with .999 a step,
    which is slow for some thousand steps. Its uniform alignment is left out: see
    `training.distribution_alignment`.
    """

    name = "softmatch"
    masks = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.moments = RunningMean(2, context.labels.device)

    def criterion(self, images: Tensor, features: Features, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1).amax(dim=1)

    def sized(self, scores: Tensor) -> Tensor:
        mean, variance = self.moments.value.to(scores)
        return truncated_gaussian(scores, mean, variance)

    def weights(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None = None) -> Tensor:
        """Weights in [0, 1] of a training batch, (n,), which moves mean and variance first."""
        confidence = self.context.group.gather(pseudo.logits.softmax(dim=1).amax(dim=1))
        variance, mean = torch.var_mean(confidence, correction=min(1, len(confidence) - 1))
        self.moments.update(torch.stack([mean, variance]))
        return self.scores(weak, pseudo, indices)

    def state_dict(self) -> State:
        return {**super().state_dict(), "moments": self.moments.state_dict()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.moments.load_state_dict(state["moments"])
