"""The classifier on a frozen backbone: a linear head on its stored features."""

import math

import torch
from torch import Tensor, nn

from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.parts.networks import Classifier, build_classifier
from weighmatch.semisup.parts.store import ImageStore

# Images whose features say where these lie and how far they spread.
FITTED_IMAGES = 4096
# Below it a feature counts as constant, and is not blown up.
SMALLEST_SPREAD = 1e-4


class Standardise(nn.Module):
    """Features (n, width) with mean 0 and spread 1 on the data, divided by √width."""

    location: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("location", torch.zeros(width))
        self.register_buffer("scale", torch.full((width,), math.sqrt(width)))

    def fit(self, features: Tensor) -> None:
        """Take mean and spread of features (n, width)."""
        self.location.copy_(features.mean(0))
        spread = features.std(0, correction=0).clamp(min=SMALLEST_SPREAD)
        self.scale.copy_(spread * math.sqrt(features.shape[1]))

    def forward(self, features: Tensor) -> Tensor:
        standard: Tensor = (features - self.location) / self.scale
        return standard


class FeatureClassifier(Classifier):
    """A linear head on standardised features: logits (n, classes) from features (n, width).

    Only the head is trained. Its loss is convex, and its Gauss-Newton matrix is the Hessian.
    """

    trunk: Standardise

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(Standardise(width), width, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(images)


def make_classifier(
    training: TrainingConfig, stored: tuple[int, ...], classes: int, seed: int
) -> Classifier:
    """A freshly initialised classifier for what a run stores, the same for the same seed.

    Args:
        training: says which network.
        stored: the shape of a stored image: (C, H, W), or (views, width) of features.
        classes: number of logits.
        seed: decides the initial parameters.
    """
    if len(stored) == 3:
        return build_classifier(training.network, stored[0], classes, seed, training.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FeatureClassifier(stored[1], classes)


def fit_to_data(classifier: Classifier, pool: ImageStore) -> None:
    """Set what a new classifier takes from the pool's features, where it is one of features."""
    if isinstance(classifier, FeatureClassifier):
        rows = torch.arange(min(len(pool), FITTED_IMAGES))
        classifier.trunk.fit(pool[rows][:, 0].float())
