"""Classifiers and the Confidence Network.

All of them normalise with GroupNorm (Wu & He, 2018): an image's output does not depend on the
batch that it is in, which curvature products and per-image losses rely on.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighmatch.checks import require_choice


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


def build_classifier(
    name: str, channels: int, classes: int, seed: int, width: int = 16
) -> Classifier:
    """A freshly initialised classifier, the same for the same seed.

    Args:
        name: the network's.
        channels: channels of the images.
        classes: number of logits.
        seed: decides the initial parameters.
        width: channels of the first layer, where a network has a choice.

    Raises:
        ValueError: if there is no network of that name.
    """
    require_choice("training.network", name, network_names())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
