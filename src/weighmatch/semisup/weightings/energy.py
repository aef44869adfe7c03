"""Weights by the classifier's free energy (Liu et al., 2020)."""

import torch
from torch import Tensor

from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.weightings.base import Context, Features, Weighting, otsu_cut


def negative_free_energy(logits: Tensor) -> Tensor:
    """−E = logsumexp of logits (n, classes), (n,): high on what looks known (Liu et al., 2020)."""
    return logits.logsumexp(dim=1)


class Energy(Weighting):
    """Weights of two sizes by the classifier's free energy (Liu et al., 2020).

    The paper cuts where 95 % of held-out in-distribution images pass; without such images the
    cut lies where the scores of the pool fall apart (Otsu), and moves with every update. Raw
    energies are no weights, so `weighting.weights: soft` has no meaning here.
    """

    name = "energy"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.cut = float("-inf")

    def criterion(self, images: Tensor, features: Features, logits: Tensor) -> Tensor:
        return negative_free_energy(logits)

    def update(self, classifier: Classifier) -> dict[str, float]:
        context = self.context
        with torch.no_grad():
            logits = context.group.divide(
                lambda part: classifier(context.views.plain(context.pool[part])),
                self.pool_sample(),
            )
        self.cut = otsu_cut(negative_free_energy(logits))
        return {"energy_cut": -self.cut}
