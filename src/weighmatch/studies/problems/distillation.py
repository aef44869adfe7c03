"""Dataset distillation: ten learned images to train on (Wang et al., 2018)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from weighmatch.implicit import Parameters
from weighmatch.studies.digits import CLASSES
from weighmatch.studies.problems.contract import BilevelProblem


class Distillation(BilevelProblem):
    """φ: one image a class, (10, 64), grey at the start but for a little noise.

    The inner images of `Digits` play no part.
    """

    name = "distillation"
    outer_rate = 0.05

    @property
    def examples(self) -> int:
        """One a class."""
        return CLASSES

    def hyperparameters(self) -> Parameters:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(CLASSES, 64, generator=generator, dtype=torch.float64)
        return {"images": (0.1 * noise).to(self.digits.inner.dtype)}

    def inputs(self, hyper: Parameters, rows: Tensor | None = None) -> Tensor:
        images = hyper["images"]
        return images if rows is None else images[rows]

    def example_losses(
        self, logits: Tensor, hyper: Parameters, rows: Tensor | None = None
    ) -> Tensor:
        labels = torch.arange(CLASSES)
        return F.cross_entropy(logits, labels if rows is None else labels[rows], reduction="none")
