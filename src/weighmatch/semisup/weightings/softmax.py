"""Weights from the classifier's softmax vector, by one-step hypergradients (DS3L-like)."""

import torch
from torch import Tensor, nn

from weighmatch.semisup.parts.losses import mean_one
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.weightings.base import Context, Features
from weighmatch.semisup.weightings.fitted import FittedWeighting
from weighmatch.semisup.weightings.meter import InfluenceMeter, require_finite


class SoftmaxNetwork(nn.Module):
    """One raw score an image from its softmax vector, (B, classes) -> (B,): one hidden layer."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(classes, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, probabilities: Tensor) -> Tensor:
        scores: Tensor = self.layers(probabilities).squeeze(1)
        return scores


class SoftmaxWeights(FittedWeighting):
    """Weights from the classifier's softmax vector, by one-step hypergradients (DS3L-like).

    Guo et al. (2020) take one step of the classifier and differentiate the loss on labelled
    images through it: the hypergradient with v = ∇_θ L_outer, no curvature, here taken before the
    step. s_i = ⟨∇_θ m_i CE_i, v⟩ of one batch, a dot product, with no memory of earlier batches,
    moves a small network on p(u_i). Unlike theirs, weights have mean 1 and are pulled towards 1,
    the outer images are strongly augmented, and φ takes `fit_steps` Adam steps every `interval`
    steps. The weights are soft, whatever `weighting.weights` says.
    """

    name = "softmax"
    lowers_outer_loss = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.meter = InfluenceMeter(context, self.weights)

    def make_network(self, seed: int) -> nn.Module:
        return SoftmaxNetwork(self.context.classes, seed)

    def criterion(self, images: Tensor, features: Features, logits: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.sigmoid(self.network(logits.softmax(dim=1)))

    def update(self, classifier: Classifier) -> dict[str, float]:
        assert self.meter is not None
        views = self.meter.draw_views(classifier)
        direction = self.meter.outer_gradient(classifier)
        influence = require_finite(self.meter.influence(classifier, views, direction, cosine=False))
        target = influence / influence.square().mean().sqrt().clamp(min=1e-12)
        config = self.context.training.weighting
        probabilities = self.context.group.gather(views.pseudo.logits.softmax(dim=1))
        spread = 0.0
        for _ in range(config.fit_steps):
            weights = mean_one(torch.sigmoid(self.network(probabilities)))
            pull = config.proximity / 2 * (weights - 1).square().mean()
            self.descend(pull - (target * weights).mean())
            spread = float(weights.detach().std())
        return {"weight_spread": spread}
