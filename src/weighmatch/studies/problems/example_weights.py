"""A free weight on every example whose label may be wrong (Ren et al., 2018)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from weighmatch.implicit import Parameters
from weighmatch.studies.problems.contract import BilevelProblem


class ExampleWeights(BilevelProblem):
    """φ: one number an example; its weight is 2σ(φ_i), 1 at the start."""

    name = "example_weights"
    noisy = True
    outer_rate = 0.2

    def hyperparameters(self) -> Parameters:
        return {"raw": torch.zeros(self.examples, dtype=self.digits.inner.dtype)}

    def example_losses(
        self, logits: Tensor, hyper: Parameters, rows: Tensor | None = None
    ) -> Tensor:
        labels, raw = self.digits.inner_labels, hyper["raw"]
        if rows is not None:
            labels, raw = labels[rows], raw[rows]
        return 2 * raw.sigmoid() * F.cross_entropy(logits, labels, reduction="none")
