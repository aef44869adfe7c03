"""Weights under label noise from a small network on an example's loss (Meta-Weight-Net).

Shu et al. (2019). The loss that goes into the network is a constant of the inner problem: its own
dependence on θ is left out of the curvature and of the mixed derivative. (Finite differences,
DARTS and SAMA, move it nevertheless.) So the inner gradient is not that of one loss, and there is
no minimum to converge to: this problem is for online training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from weighmatch.implicit import Parameters
from weighmatch.studies.problems.contract import BilevelProblem

HIDDEN = 16


class WeighingNetwork(BilevelProblem):
    """φ: the parameters of loss → 16 → weight in (0, 2), 1 everywhere at the start."""

    name = "weighing_network"
    noisy = True
    outer_rate = 0.05

    def hyperparameters(self) -> Parameters:
        dtype = self.digits.inner.dtype
        return {
            # Kinks of the hidden units spread over the losses that occur.
            "slope": torch.ones(HIDDEN, 1, dtype=dtype),
            "shift": -torch.linspace(0, 5, HIDDEN, dtype=dtype),
            "out": torch.zeros(1, HIDDEN, dtype=dtype),
            "bias": torch.zeros(1, dtype=dtype),
        }

    def example_losses(
        self, logits: Tensor, hyper: Parameters, rows: Tensor | None = None
    ) -> Tensor:
        labels = self.digits.inner_labels
        losses = F.cross_entropy(logits, labels if rows is None else labels[rows], reduction="none")
        hidden = F.linear(losses.detach().unsqueeze(1), hyper["slope"], hyper["shift"]).relu()
        weights = 2 * F.linear(hidden, hyper["out"], hyper["bias"]).sigmoid()
        return weights.squeeze(1) * losses
