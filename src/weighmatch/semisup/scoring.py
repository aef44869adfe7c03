"""A trained run applied to images that it never saw."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.semisup.config import WeighingConfig
from weighmatch.semisup.losses import mean_one
from weighmatch.semisup.networks import Classifier, ConfidenceNetwork, build_classifier
from weighmatch.semisup.weightings import confidence_weights

BATCH = 1024


@dataclass(frozen=True)
class Scored:
    """What a run says of n images.

    Attributes:
        probabilities: of the classes, (n, classes).
        scores: what ranks the images: the Confidence Network's, the confidence, or 1, (n,).
        weights: positive, mean 1 over the n images, (n,).
    """

    probabilities: NDArray[np.float64]
    scores: NDArray[np.float64]
    weights: NDArray[np.float64]


def score_images(checkpoint: dict[str, Any], images: NDArray[np.uint8]) -> Scored:
    """Class probabilities and weights of images (n, C, H, W) uint8, without augmentation.

    Args:
        checkpoint: what `Trainer.fit` returned.
        images: any, whether or not they were in the pool.

    Raises:
        ValueError: if the images have another number of channels than those trained on.
    """
    config = checkpoint["config"]
    classifier = _load_classifier(checkpoint, images.shape[1])
    network = _load_confidence_network(checkpoint, images.shape[1])
    batches = torch.from_numpy(images).float().div(255).split(BATCH)
    with torch.no_grad():
        probabilities = torch.cat([classifier(batch).softmax(dim=1) for batch in batches])
        if network is not None:
            scores = torch.cat([torch.sigmoid(network(batch)) for batch in batches])
        elif config["arm"] == "max_prob":
            scores = probabilities.amax(dim=1)
        else:
            scores = torch.ones(len(images))
    weights = mean_one(confidence_weights(scores.double(), checkpoint["weighting"].get("cut")))
    return Scored(probabilities.double().numpy(), scores.double().numpy(), weights.numpy())


def _load_classifier(checkpoint: dict[str, Any], channels: int) -> Classifier:
    state: dict[str, Tensor] = checkpoint["classifier"]
    training, classes = checkpoint["config"]["training"], checkpoint["config"]["classes"]
    classifier = build_classifier(training["network"], channels, classes, 0, training["width"])
    trained = next(value.shape[1] for value in state.values() if value.ndim == 4)
    if trained != channels:
        raise ValueError(
            f"the classifier was trained on images with {trained} channel(s), these have {channels}"
        )
    classifier.load_state_dict(state)
    return classifier.eval()


def _load_confidence_network(checkpoint: dict[str, Any], channels: int) -> ConfidenceNetwork | None:
    if "network" not in checkpoint["weighting"]:
        return None
    weighing = WeighingConfig(**checkpoint["config"]["training"]["weighing"])
    network = ConfidenceNetwork(channels, weighing.width, seed=0)
    network.load_state_dict(checkpoint["weighting"]["network"])
    return network.eval()
