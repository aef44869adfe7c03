"""A trained run applied to images that it never saw."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.checks import require_images
from weighmatch.semisup.config import WeighingConfig
from weighmatch.semisup.controls import (
    SoftmaxNetwork,
    inlier_probability,
    negative_free_energy,
    truncated_gaussian,
)
from weighmatch.semisup.parts.losses import mean_one
from weighmatch.semisup.parts.networks import (
    Classifier,
    ConfidenceHead,
    ConfidenceNetwork,
    build_classifier,
)
from weighmatch.semisup.weightings import confidence_weights

BATCH = 1024
CPU = torch.device("cpu")
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scored:
    """What a run says of n images.

    Attributes:
        probabilities: of the classes, (n, classes).
        scores: what ranks the images: the arm's own criterion (the Confidence Network's score,
            the confidence, the negative free energy, …), or 1 where it has none, (n,).
        weights: positive, mean 1 over the n images, (n,).
    """

    probabilities: NDArray[np.float64]
    scores: NDArray[np.float64]
    weights: NDArray[np.float64]


def score_images(
    checkpoint: dict[str, Any],
    images: NDArray[np.uint8],
    device: torch.device = CPU,
) -> Scored:
    """Class probabilities and weights of images (n, C, H, W) uint8, without augmentation.

    Args:
        checkpoint: what `Trainer.fit` returned.
        images: any, whether or not they were in the pool.
        device: where the classifier runs.

    Raises:
        ValueError: if the images are of another type or shape than those trained on.
    """
    images = require_images("images", images)
    trained = checkpoint.get("image_shape")
    if trained is not None and list(images.shape[1:]) != list(trained):
        raise ValueError(
            f"the classifier was trained on images of {trained[0]} channel(s), {trained[1]} by "
            f"{trained[2]}, these are of {images.shape[1]}, {images.shape[2]} by "
            f"{images.shape[3]}; convert or resize them"
        )
    classifier = load_classifier(checkpoint, images.shape[1]).to(device)
    criterion = _load_criterion(checkpoint, images.shape[1], device)
    found = []
    with torch.no_grad():
        for part in torch.from_numpy(images).split(BATCH):
            batch = part.to(device).float() / 255
            features = classifier.features(batch)
            logits = classifier.head(features)
            scored = criterion(batch, features, logits)
            found.append((logits.softmax(dim=1).cpu(), scored.cpu().double()))
    probabilities, scores = (torch.cat(column) for column in zip(*found, strict=True))
    state = checkpoint["weighting"]
    if checkpoint["config"]["arm"] == "softmatch" and "ranker" not in checkpoint:
        mean, variance = state["moments"]["value"].cpu().double()
        weights = truncated_gaussian(scores, mean, variance)
    else:
        weights = confidence_weights(scores, state.get("cut"))
    return Scored(probabilities.double().numpy(), scores.numpy(), mean_one(weights).numpy())


def load_classifier(checkpoint: dict[str, Any], channels: int) -> Classifier:
    """The averaged classifier of a checkpoint, for images with that many channels."""
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


def _load_criterion(checkpoint: dict[str, Any], channels: int, device: torch.device) -> Criterion:
    """What ranks images: scores (n,) from images, features (n, width) and logits (n, classes)."""
    if "ranker" in checkpoint:
        return _load_ranker(checkpoint["ranker"], channels, device)
    arm, state = checkpoint["config"]["arm"], checkpoint["weighting"]
    if arm in ("max_prob", "softmatch"):
        return lambda images, features, logits: logits.softmax(dim=1).amax(dim=1)
    if arm == "energy":
        return lambda images, features, logits: negative_free_energy(logits)
    if arm == "inlier":
        weight, bias = (state["heads"][name].to(device) for name in ("weight", "bias"))
        return lambda images, features, logits: inlier_probability(
            F.linear(features, weight, bias), logits.argmax(dim=1)
        )
    if arm == "ds3l":
        softmax_network = SoftmaxNetwork(checkpoint["config"]["classes"], seed=0)
        softmax_network.load_state_dict(state["network"])
        softmax_network.to(device)
        return lambda images, features, logits: softmax_network(logits.softmax(dim=1)).sigmoid()
    if "network" in state:
        weighing = WeighingConfig(**checkpoint["config"]["training"]["weighing"])
        network = ConfidenceNetwork(channels, weighing.width, seed=0)
        network.load_state_dict(state["network"])
        network.to(device)
        return lambda images, features, logits: torch.sigmoid(network(images))
    return lambda images, features, logits: torch.ones(len(images))


def _load_ranker(ranker: dict[str, Any], channels: int, device: torch.device) -> Criterion:
    """What ranks images in stages: a classifier and what is ranked by with it."""
    classifier = load_classifier(ranker, channels).to(device)
    head = None
    if ranker["head"] is not None:
        head = ConfidenceHead(classifier.head.in_features, ranker["config"]["classes"], seed=0)
        head.load_state_dict(ranker["head"])
        head.to(device)
    criterion = _load_criterion(ranker, channels, device)

    def score(images: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        frozen = classifier.features(images)
        if head is not None:
            return torch.sigmoid(head(frozen))
        return criterion(images, frozen, classifier.head(frozen))

    return score
