"""Classifiers and the Confidence Network.

All of them normalise with GroupNorm (Wu & He, 2018): an image's output does not depend on the
batch that it is in, which curvature products and per-image losses rely on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighmatch.semisup.config import NETWORKS, NetworkName


class Classifier(nn.Module):
    """A trunk and a linear head: logits (B, classes) from images (B, C, H, W) in [0, 1]."""

    def __init__(self, trunk: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, (B, width)."""
        features: Tensor = self.trunk(images - 0.5)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


class WithFeatures(nn.Module):
    """A classifier that gives logits and features by one pass, for `torch.func`.

    Its parameters have the classifier's names with "classifier." before them.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.features(images)
        return self.classifier.head(features), features


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=False)


class _PoolTo2x2(nn.Module):
    """Average a map (B, C, H, W) to 2×2 and flatten it, (B, 4C)."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # On 8×8 images the map is 2×2 already, and pooling it would still take time.
        if (height, width) != (2, 2):
            if height % 2 or width % 2:
                x = F.adaptive_avg_pool2d(x, 2)
            else:  # the same, with a repeatable backward pass on a GPU
                x = F.avg_pool2d(x, (height // 2, width // 2))
        return x.flatten(1)


def small_cnn_trunk(channels: int, width: int) -> nn.Sequential:
    """Three 3×3 convolutions for images of about 8×8, (B, C, H, W) -> (B, 16·width).

    The last map is pooled to 2×2 and flattened rather than averaged away: on 8×8 digits, where
    a stroke lies matters.
    """
    return nn.Sequential(
        _conv(channels, width),
        nn.GroupNorm(4, width),
        nn.ReLU(),
        _conv(width, 2 * width, stride=2),
        nn.GroupNorm(4, 2 * width),
        nn.ReLU(),
        _conv(2 * width, 4 * width, stride=2),
        nn.GroupNorm(4, 4 * width),
        nn.ReLU(),
        _PoolTo2x2(),
    )


class _Block(nn.Module):
    """Pre-activation residual block (Zagoruyko & Komodakis, 2016, figure 1b)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = _conv(inputs, outputs, stride)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = _conv(outputs, outputs)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.leaky_relu(self.norm1(x), 0.1)
        residual = self.conv1(active)
        residual = self.conv2(F.leaky_relu(self.norm2(residual), 0.1))
        # Where the shape changes, the shortcut starts from the activation, as in the paper.
        skipped = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(active)
        total: Tensor = skipped + residual
        return total


def wide_resnet_trunk(channels: int, depth: int = 28, widen: int = 2) -> nn.Sequential:
    """WRN-depth-widen for 32×32 (Zagoruyko & Komodakis, 2016), (B, C, H, W) -> (B, 64·widen).

    Raises:
        ValueError: if depth − 4 is not a multiple of 6.
    """
    if (depth - 4) % 6:
        raise ValueError(f"depth must be 6n + 4, got {depth}")
    layers: list[nn.Module] = [_conv(channels, 16)]
    inputs = 16
    for stage, outputs in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for position in range((depth - 4) // 6):
            layers.append(_Block(inputs, outputs, 2 if stage > 0 and position == 0 else 1))
            inputs = outputs
    layers += [nn.GroupNorm(8, inputs), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


def build_classifier(
    name: NetworkName, channels: int, classes: int, seed: int, width: int = 16
) -> Classifier:
    """A freshly initialised classifier, the same for the same seed.

    Args:
        name: "small_cnn" for images of about 8×8, "wrn_28_2" for 32×32.
        channels: of the images.
        classes: number of logits.
        seed: of the initialisation.
        width: channels of the first layer of "small_cnn".

    Raises:
        ValueError: if the name is none of `NETWORKS`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "small_cnn":
            return Classifier(small_cnn_trunk(channels, width), 16 * width, classes)
        if name == "wrn_28_2":
            return Classifier(wide_resnet_trunk(channels), 128, classes)
    raise ValueError(f"unknown network {name!r}; choose from {', '.join(NETWORKS)}")


class ConfidenceNetwork(nn.Module):
    """One raw score an image, (B, C, H, W) in [0, 1] -> (B,): a small CNN of its own.

    It never sees the classifier's features: with an input that depended on θ, the mixed
    derivative by one JVP would no longer be exact.
    """

    def __init__(self, channels: int, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = small_cnn_trunk(channels, width)
            self.head = nn.Linear(16 * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.trunk(images - 0.5)).squeeze(1)
        return scores


class Moments(NamedTuple):
    """Sums over features by class; those of a set less those of a part are those of the rest.

    Attributes:
        counts: features of each class, (classes,).
        sums: of these, (classes, width).
        squares: Σ x xᵀ over all classes, (width, width).
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor | None = None, classes: int = 1) -> "Moments":
        """Of features (n, width) with labels (n,), or of a single class."""
        if labels is None:
            labels = torch.zeros(len(features), dtype=torch.long)
        counts = labels.bincount(minlength=classes).to(features.dtype)
        sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
        return cls(counts, sums, features.T @ features)

    @classmethod
    def together(cls, parts: Sequence["Moments"]) -> "Moments":
        """Of all parts."""
        counts, sums, squares = (torch.stack(terms).sum(0) for terms in zip(*parts, strict=True))
        return cls(counts, sums, squares)

    def without(self, part: "Moments") -> "Moments":
        """Of what is not in `part`."""
        return Moments(*(whole - piece for whole, piece in zip(self, part, strict=True)))


# Of the covariances of `RelativeMahalanobis`, towards a multiple of the identity.
SHRINKAGE = 0.7


class RelativeMahalanobis(nn.Module):
    """How much more like a class than like the pool features are, (n, width) -> (n,).

    The largest over the classes of the log-ratio of two normal densities, that of the class, all
    of them with one covariance, and that of the pool (Ren et al., "A simple fix to Mahalanobis
    distance for improving near-OOD detection", 2021), up to a constant. Nothing is descended.
    """

    quadratic: Tensor
    linear: Tensor
    constant: Tensor
    centre: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("quadratic", torch.zeros(width, width))
        self.register_buffer("linear", torch.zeros(classes, width))
        self.register_buffer("constant", torch.zeros(classes))
        self.register_buffer("centre", torch.zeros(width))

    def fit(self, labelled: "Moments", pool: "Moments") -> None:
        """Estimate the densities.

        Args:
            labelled: of the features of labelled images, by class.
            pool: of the pool's.
        """
        self.centre = pool.sums.sum(0) / pool.counts.sum()
        counts = labelled.counts.unsqueeze(1)
        means = labelled.sums / counts.clamp(min=1)
        inside = _precision(labelled.squares - (counts * means).T @ means, labelled.counts.sum())
        everywhere = pool.squares - pool.counts.sum() * torch.outer(self.centre, self.centre)
        self.quadratic = _precision(everywhere, pool.counts.sum()) - inside
        means = means - self.centre
        self.linear = means @ inside
        constant = -0.5 * (self.linear * means).sum(1)
        # No image is like a class of which none was seen.
        self.constant = constant.masked_fill(labelled.counts == 0, -torch.inf)

    def forward(self, features: Tensor) -> Tensor:
        centred = features - self.centre
        classes = centred @ self.linear.T + self.constant
        ratio: Tensor = 0.5 * (centred @ self.quadratic * centred).sum(1) + classes.amax(1)
        return ratio


def _precision(scatter: Tensor, count: Tensor) -> Tensor:
    """Inverse of the shrunk covariance, (width, width), from Σ (x − mean)(x − mean)ᵀ."""
    covariance = scatter / count
    level = covariance.diagonal().mean().clamp(min=1e-6)
    identity = torch.eye(len(covariance))
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * level * identity
    precision: Tensor = torch.linalg.inv(shrunk)
    return precision


# Of the distance, in the sum that is a `ConfidenceHead`'s score; that of the MLPs is 1.
DISTANCE_WEIGHT = 2.0


class ConfidenceHead(nn.Module):
    """One raw score an image from frozen features, (n, width) -> (n,).

    The weighted sum of what some small MLPs say, which are descended, and of the relative
    Mahalanobis distance, each over its spread on the pool: the one makes no assumption, the other
    cannot learn few labelled images by heart. One MLP alone depends much on its start; so there are
    five, side by side in one wide layer, so that fitting all takes little longer than fitting
    one. The features are those of a classifier that is no longer trained, so that the score is a
    function of the image alone and the mixed derivative by one JVP stays exact.
    """

    location: Tensor
    scale: Tensor

    def __init__(
        self, width: int, classes: int, seed: int, hidden: int = 16, members: int = 5
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(width, elementwise_affine=False)
            self.hidden = nn.Linear(width, members * hidden)
            bound = hidden**-0.5
            self.output = nn.Parameter(torch.empty(members, hidden).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.empty(members).uniform_(-bound, bound))
        self.distance = RelativeMahalanobis(width, classes)
        self.register_buffer("location", torch.zeros(2))
        self.register_buffer("scale", torch.ones(2))

    def members(self, features: Tensor) -> Tensor:
        """The score of every MLP, (n, members)."""
        return self.members_of(self.norm(features))

    def members_of(self, normalised: Tensor) -> Tensor:
        """`members` of features that went through `norm` before."""
        hidden = F.relu(self.hidden(normalised)).unflatten(1, self.output.shape)
        scores: Tensor = torch.einsum("nmh,mh->nm", hidden, self.output) + self.bias
        return scores

    def fit_distance(self, features: Tensor, labels: Tensor, pool: Tensor) -> None:
        """Estimate the distance.

        Args:
            features: of labelled images, through `norm`, (m, width).
            labels: of these, (m,).
            pool: features of the pool, through `norm`, (N, width).
        """
        labelled = Moments.of(features, labels, len(self.distance.constant))
        self.distance.fit(labelled, Moments.of(pool))

    def standardise(self, pool: Tensor) -> None:
        """Give both parts mean 0 and spread 1 on features of the pool, (N, width)."""
        parts = self._parts(pool)
        self.location = parts.mean(0)
        self.scale = parts.std(0, correction=0).clamp(min=1e-6)

    def _parts(self, features: Tensor) -> Tensor:
        """What MLPs and distance say, (n, 2)."""
        normalised = self.norm(features)
        return torch.stack([self.members_of(normalised).mean(1), self.distance(normalised)], dim=1)

    def forward(self, features: Tensor) -> Tensor:
        mlps, distance = ((self._parts(features) - self.location) / self.scale).unbind(1)
        scores: Tensor = mlps + DISTANCE_WEIGHT * distance
        return scores
