"""What a finished run says of every image of its pool, and of the labelled images beside it."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.semisup.checkpoint import BATCH, CPU, TrainedRun, on_device
from weighmatch.semisup.parts.losses import mean_one
from weighmatch.semisup.parts.store import Stored, as_tensor
from weighmatch.semisup.training.config import TrainingSet
from weighmatch.semisup.weightings.base import BELOW_CUT

Arrays = dict[str, NDArray[np.generic]]
# Directions of the features that are kept, those in which the pool varies most.
DIRECTIONS = 32


def describe_pool(
    run: TrainedRun,
    data: TrainingSet,
    device: torch.device = CPU,
) -> Arrays:
    """All that a ranking table and lists of images are made of.

    Args:
        run: a run that was trained on this pool.
        data: what it was trained on.
        device: where the classifier runs.

    Returns:
        Of the pool `probabilities` (N, classes); `scores`, `weights` (mean 1) and `kept` of the
        last ranking, (N,); `influence`, NaN where none was measured, (N,); `likeness`, the
        largest cosine of its features with those of a labelled image, (N,); and `features`, the
        directions in which normalised features vary most, (N, at most 32). Of the labelled images
        `labels` and `labelled_features`. `class_names` (classes,), "" where there are none.
    """
    pool_images = data.plain_pool
    features, probabilities = _outputs(run, pool_images, device)
    labelled, _ = _outputs(run, data.labelled_images, device)
    scores, weights, kept = _ranking(run, pool_images, device)
    likeness = torch.cat([(part @ labelled.T).amax(1) for part in features.split(BATCH)])
    centre = features.mean(0)
    directions = _directions(features - centre)
    names = run.class_names or [""] * run.config.classes
    influence = np.full(len(pool_images), np.nan)
    measured = run.pool.measured
    if measured is not None:
        influence = measured.mean().masked_fill(~measured.known, np.nan).double().numpy()
    return {
        "probabilities": probabilities.double().numpy(),
        "scores": scores,
        "weights": weights,
        "kept": kept,
        "influence": influence,
        "likeness": likeness.double().numpy(),
        "features": ((features - centre) @ directions).numpy(),
        "labelled_features": ((labelled - centre) @ directions).numpy(),
        "labels": data.labels,
        "class_names": np.array(names, np.str_),
    }


def _outputs(run: TrainedRun, images: Stored, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normalised features (n, width) and probabilities (n, classes), on the CPU."""
    classifier, shown, found = on_device(run.classifier, device), run.inputs(images, device), []
    with torch.no_grad():
        for part in as_tensor(images).split(BATCH):
            features = classifier.features(shown(part.to(device)))
            probabilities = classifier.head(features).softmax(dim=1)
            found.append((F.normalize(features).cpu(), probabilities.cpu()))
    both = (torch.cat(column) for column in zip(*found, strict=True))
    normalised, likely = both
    return normalised, likely


def _ranking(
    run: TrainedRun, images: Stored, device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Scores, weights and what is kept of the last ranking."""
    pool = run.pool
    if pool.scores is not None and pool.kept is not None:
        sized = mean_one(torch.where(pool.kept, 1.0, BELOW_CUT))
        return pool.scores.double().numpy(), sized.double().numpy(), pool.kept.numpy()
    scored = run.score(images, device)
    weights = scored.weights
    if run.history.step and not run.config.row.inductive:
        weights = run.history.weights[-1].double().numpy()
    return scored.scores, weights, weights >= weights.max() / 2


def _directions(centred: Tensor) -> Tensor:
    """The principal directions of centred features, (width, at most 32)."""
    covariance = centred.T.double() @ centred.double() / len(centred)
    _, vectors = torch.linalg.eigh(covariance)
    directions: Tensor = vectors[:, -DIRECTIONS:].flip(1).float()
    return directions
