"""Classifiers and the Confidence Network.

An image's output does not depend on the batch that it is in, which curvature products and
per-image losses rely on: networks that are trained from scratch normalise with GroupNorm (Wu & He,
2018), and pretrained ones with the statistics of their weights.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighmatch.checks import find_nearest
from weighmatch.extras import UnfitNetworkError, family_of
from weighmatch.semisup.parts.backbones import (
    Backbone,
    empty_backbone,
    load_backbone,
    torchvision_names,
)

# Blocks that are trained where the last ones are fine-tuned, and what the learning rate is
# multiplied by from one block to the one before it.
LAST_BLOCKS, RATE_DECAY = 2, 0.75
# Below it a feature counts as constant, and is not blown up.
SMALLEST_SPREAD = 1e-4


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

    def rates(self) -> dict[str, float]:
        """What the learning rate of each parameter that is trained is multiplied by, by name."""
        return {name: 1.0 for name, p in self.named_parameters() if p.requires_grad}


class Standardise(nn.Module):
    """Features (n, width) with mean 0 and spread 1 on the data, divided by √width."""

    location: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("location", torch.zeros(width))
        self.register_buffer("scale", torch.full((width,), math.sqrt(width)))

    def fit(self, features: Tensor, together: bool = False) -> None:
        """Take mean and spread of features.

        Args:
            features: (n, width).
            together: whether they share one spread: a feature that hardly varies is not blown up
                then, nor is its gradient in what computes it.
        """
        self.location.copy_(features.mean(0))
        spread = features.std(0, correction=0)
        if together:
            spread = spread.square().mean().sqrt().expand_as(spread)
        self.scale.copy_(spread.clamp(min=SMALLEST_SPREAD) * math.sqrt(features.shape[1]))

    def forward(self, features: Tensor) -> Tensor:
        standard: Tensor = (features - self.location) / self.scale
        return standard


class BackboneClassifier(Classifier):
    """A trunk that normalises images by itself, and a linear head; all of it is trained."""

    trunk: Backbone

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__(backbone, backbone.width, classes)
        self.requires_grad_(True)

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.trunk(images)
        return features


class PretrainedClassifier(BackboneClassifier):
    """A backbone with weights and a linear head on its standardised features.

    The learning rate falls from the head to the images, block by block (Howard & Ruder, 2018,
    section 3.2), by the factor of He et al. (2022, table 9). Features that are not standardised
    are so long that the head diverges at the learning rates of other networks.

    Args:
        backbone: the trunk.
        classes: number of logits.
        fine_tune: what is trained of the trunk; see `TrainingConfig`.
    """

    def __init__(self, backbone: Backbone, classes: int, fine_tune: str) -> None:
        super().__init__(backbone, classes)
        self.standardise = Standardise(backbone.width)
        blocks = backbone.blocks()
        trained = {"none": 0, "last": LAST_BLOCKS, "all": len(blocks)}[fine_tune]
        self._depths = {
            f"trunk.{name}": depth
            for depth, block in enumerate(reversed(blocks), 1)
            for name in block
        }
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self._depths.get(name, 0) <= trained)

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.standardise(self.trunk(images))
        return features

    def rates(self) -> dict[str, float]:
        return {name: RATE_DECAY ** self._depths.get(name, 0) for name in super().rates()}


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


Builder = Callable[[int, int, int], Classifier]
_NETWORKS: dict[str, Builder] = {}


def network(name: str) -> Callable[[Builder], Builder]:
    """Register a function (channels, classes, width) -> `Classifier` as a network of that name."""

    def add(builder: Builder) -> Builder:
        _NETWORKS[name] = builder
        return builder

    return add


@network("small_cnn")
def small_cnn(channels: int, classes: int, width: int) -> Classifier:
    """For images of about 8×8; `width` is that of its first layer."""
    return Classifier(small_cnn_trunk(channels, width), 16 * width, classes)


@network("wrn_28_2")
def wrn_28_2(channels: int, classes: int, width: int) -> Classifier:
    """For images of 32×32; its width is fixed."""
    return Classifier(wide_resnet_trunk(channels), 128, classes)


def network_names() -> tuple[str, ...]:
    """The names of all networks."""
    return tuple(_NETWORKS)


def require_network(name: str) -> None:
    """Raise an UnfitNetworkError unless there is such a network; timm's are not looked up."""
    if name in _NETWORKS or family_of(name) in ("efficientnet_lite0", "timm"):
        return
    known = [*network_names(), "efficientnet_lite0", *torchvision_names()]
    if name not in known:
        near = find_nearest(name, known)
        own = ", ".join(network_names())
        cure = f"choose from {own}, efficientnet_lite0, torchvision/<name> or timm/<name>"
        raise UnfitNetworkError(
            f"training.network {name!r} is unknown; {f'did you mean {near}?' if near else cure}"
        )


def build_classifier(
    name: str,
    channels: int,
    classes: int,
    seed: int,
    width: int = 16,
    weights: str = "none",
    fine_tune: str = "none",
    filled: bool = True,
) -> Classifier:
    """A classifier before its training, the same for the same seed.

    Args:
        name: the network's.
        channels: channels of the images.
        classes: number of logits.
        seed: decides the parameters that have no weights to start from.
        width: channels of the first layer, where a network has a choice.
        weights: see `TrainingConfig`; with "none" all parameters are trained.
        fine_tune: see `TrainingConfig`.
        filled: whether weights are read; a state dict will replace them otherwise.

    Raises:
        ValueError: if there is no network of that name, or its weights cannot be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family_of(name) is not None:
            load = load_backbone if filled else empty_backbone
            # The one with weights is shared by all who ask for it.
            backbone = copy.deepcopy(load(name, weights))
            if weights == "none":
                return BackboneClassifier(backbone, classes)
            return PretrainedClassifier(backbone, classes, fine_tune)
        require_network(name)
        return _NETWORKS[name](channels, classes, width)


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


class FeatureConfidenceNetwork(nn.Module):
    """One raw score an image from features of a frozen backbone, (n, width) -> (n,)."""

    def __init__(self, features: int, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            norm = nn.LayerNorm(features, elementwise_affine=False)
            self.trunk = nn.Sequential(norm, nn.Linear(features, 4 * width), nn.ReLU())
            self.head = nn.Linear(4 * width, 1)

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.head(self.trunk(features)).squeeze(1)
        return scores


def make_confidence_network(stored: tuple[int, ...], width: int, seed: int) -> nn.Module:
    """A fresh Confidence Network for stored images: pixels (C, H, W) or (views, features)."""
    if len(stored) == 3:
        return ConfidenceNetwork(stored[0], width, seed)
    return FeatureConfidenceNetwork(stored[1], width, seed)
