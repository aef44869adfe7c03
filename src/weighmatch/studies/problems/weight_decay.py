"""A weight decay of its own for every parameter (Lorraine, Vicol & Duvenaud, 2020, section 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from weighmatch.implicit import Parameters
from weighmatch.studies.problems.contract import BilevelProblem


class WeightDecay(BilevelProblem):
    """φ: the logarithm of the decay of each parameter, shaped as θ."""

    name = "weight_decay"
    outer_rate = 0.2

    def hyperparameters(self) -> Parameters:
        start = torch.tensor(self.size.l2).log()
        return {name: torch.full_like(p, float(start)) for name, p in self.initial.items()}

    def decay(self, hyper: Parameters) -> Parameters:
        return {name: h.exp() for name, h in hyper.items()}

    def example_losses(
        self, logits: Tensor, hyper: Parameters, rows: Tensor | None = None
    ) -> Tensor:
        labels = self.digits.inner_labels
        return F.cross_entropy(logits, labels if rows is None else labels[rows], reduction="none")
