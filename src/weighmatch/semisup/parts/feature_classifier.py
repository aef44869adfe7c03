"""The classifier on a frozen backbone: a linear head on its stored features."""

import torch
from torch import Tensor

from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.parts.networks import (
    Classifier,
    PretrainedClassifier,
    Standardise,
    build_classifier,
)
from weighmatch.semisup.parts.store import ImageStore

# Images whose features say where these lie and how far they spread: stored features, or those
# that a backbone computes first.
FITTED_IMAGES, PASSED_IMAGES = 4096, 256


class FeatureClassifier(Classifier):
    """A linear head on standardised features: logits (n, classes) from features (n, width).

    Only the head is trained. Its loss is convex, and its Gauss-Newton matrix is the Hessian.
    """

    trunk: Standardise

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(Standardise(width), width, classes)

    def features(self, images: Tensor) -> Tensor:
        standard: Tensor = self.trunk(images)
        return standard


def make_classifier(
    training: TrainingConfig,
    stored: tuple[int, ...],
    classes: int,
    seed: int,
    filled: bool = True,
) -> Classifier:
    """A classifier before its training for what a run stores, the same for the same seed.

    Args:
        training: says which network.
        stored: the shape of a stored image: (C, H, W), or (views, width) of features.
        classes: number of logits.
        seed: decides the initial parameters.
        filled: see `build_classifier`.
    """
    if len(stored) == 3:
        return build_classifier(
            training.network,
            stored[0],
            classes,
            seed,
            training.width,
            training.weights,
            training.fine_tune,
            filled,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FeatureClassifier(stored[1], classes)


def fit_to_data(classifier: Classifier, pool: ImageStore) -> None:
    """Set what a new classifier takes from the pool, where it standardises features."""
    if isinstance(classifier, FeatureClassifier):
        dtype = torch.get_default_dtype()
        classifier.trunk.fit(pool[_spread_out(len(pool), FITTED_IMAGES)][:, 0].to(dtype))
    if isinstance(classifier, PretrainedClassifier):
        images = pool[_spread_out(len(pool), PASSED_IMAGES)] / 255
        with torch.no_grad():
            classifier.standardise.fit(classifier.trunk(images), together=True)


def _spread_out(size: int, count: int) -> Tensor:
    """Up to `count` of `size` positions, evenly."""
    count = min(size, count)
    return torch.arange(count) * size // count
