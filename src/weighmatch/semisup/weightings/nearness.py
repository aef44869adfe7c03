"""How near an image lies to the labelled ones, by features that were not trained on these.

On features of a frozen backbone the relative Mahalanobis distance has more directions than there
are labelled images. Cosines need no covariance. An image's nearness is averaged with that of its
neighbours in the pool: images of one kind lie together, and their mean has less noise.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Labelled images whose cosines count, and neighbours in the pool that nearness is averaged over.
NEAREST, NEIGHBOURS = 5, 15
# Images of the pool that neighbours are looked for among.
REFERENCES = 1024
# Parts of the labelled images when each is judged by the others.
FOLDS = 5
# Quantiles of the labelled images' nearness at which the useful share is estimated.
QUANTILES = (0.3, 0.5, 0.7)


class Nearness(nn.Module):
    """The nearness of features (n, width) to labelled images, averaged over the pool, (n,).

    The nearness of one image is its largest cosine with the mean of a class, and its mean cosine
    with the five nearest labelled images.

    Args:
        width: of the features.
        classes: number of classes.
        labelled: number of labelled images.
        references: number of images of the pool that are kept.
    """

    examples: Tensor
    means: Tensor
    references: Tensor
    nearness: Tensor

    def __init__(self, width: int, classes: int, labelled: int = 0, references: int = 0) -> None:
        super().__init__()
        self.register_buffer("examples", torch.zeros(labelled, width, dtype=torch.float16))
        self.register_buffer("means", torch.zeros(classes, width))
        self.register_buffer("references", torch.zeros(references, width, dtype=torch.float16))
        self.register_buffer("nearness", torch.zeros(references))

    def fit(self, labelled: Tensor, labels: Tensor, pool: Tensor) -> None:
        """Keep what images are compared with.

        Args:
            labelled: features of the labelled images, (m, width).
            labels: their classes, (m,).
            pool: features of images of the pool, (N, width); the first ones are kept.
        """
        examples, references = F.normalize(labelled), F.normalize(pool[:REFERENCES])
        self.means = class_means(examples, labels, len(self.means))
        self.examples, self.references = examples.half(), references.half()
        self.nearness = nearness_of(references, examples, self.means)

    def forward(self, features: Tensor) -> Tensor:
        directions = F.normalize(features)
        own = nearness_of(directions, self.examples.to(directions.dtype), self.means)
        count = min(NEIGHBOURS, len(self.references))
        near = (directions @ self.references.to(directions.dtype).T).topk(count, dim=1).indices
        together: Tensor = (own + self.nearness[near].sum(1)) / (1 + count)
        return together


def class_means(examples: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Directions of the classes' means, (classes, width); 0 for a class without an example."""
    sums = examples.new_zeros(classes, examples.shape[1]).index_add_(0, labels, examples)
    return F.normalize(sums)


def nearness_of(directions: Tensor, examples: Tensor, means: Tensor) -> Tensor:
    """The nearness of unit vectors (n, width) to examples (m, width) and class means, (n,)."""
    count = min(NEAREST, len(examples))
    nearest = (directions @ examples.T).topk(count, dim=1).values.mean(1)
    together: Tensor = (directions @ means.T).amax(1) + nearest
    return together


def judge_pool(
    labelled: Tensor, labels: Tensor, pool: Tensor, classes: int
) -> tuple[float | None, float]:
    """Whether a pool is like the labelled images, and how much of it is.

    The labelled images of a fold and the pool are compared with the labelled images of the other
    folds, which hold as many of each class. Features that were not trained on the labels cannot
    tell a labelled image from an image of a clean pool, so that Mann and Whitney's statistic,
    summed over the folds (van Elteren, 1960), has its usual distribution there. The folds share
    most of their examples and the whole pool, which makes p approximate.

    Where a share π of the pool is useful and the rest lies lower than the q-quantile of labelled
    images, π (1 − q) of the pool lies above it. The estimate is the mean over folds and three q.

    Args:
        labelled: features of the labelled images, (n, width).
        labels: their classes, (n,).
        pool: features of images of the pool, (N, width).
        classes: number of classes.

    Returns:
        One-sided p of the pool lying so much lower than the labelled images if it were clean, or
        None where a class has a single labelled image; and the useful share of the pool.
    """
    sizes = labels.bincount()
    count = min(FOLDS, int(sizes[sizes > 0].min()))
    if count < 2:
        return None, 1.0
    folds = torch.empty_like(labels)
    for label in labels.unique():
        folds[labels == label] = torch.arange(int(sizes[label])) % count
    directions, examples = F.normalize(pool[:REFERENCES]), F.normalize(labelled)
    neighbours = min(NEIGHBOURS, len(directions))
    among = (directions @ directions.T).topk(neighbours, dim=1).indices
    beside = (examples @ directions.T).topk(neighbours, dim=1).indices
    excess, variance, shares = 0.0, 0.0, []
    for fold in range(count):
        out = folds == fold
        means = class_means(examples[~out], labels[~out], classes)
        own = nearness_of(directions, examples[~out], means)
        theirs = (own + own[among].sum(1)) / (1 + neighbours)
        mine = nearness_of(examples[out], examples[~out], means) + own[beside[out]].sum(1)
        mine = mine / (1 + neighbours)
        n, m = len(mine), len(theirs)
        excess += float((mine[:, None] > theirs).float().sum()) - n * m / 2
        variance += n * m * (n + m + 1) / 12
        for q in QUANTILES:
            shares.append(float((theirs > mine.quantile(q)).float().mean()) / (1 - q))
    p_clean = 0.5 * math.erfc(excess / math.sqrt(2 * variance))
    return p_clean, min(1.0, sum(shares) / len(shares))
