"""What may be handed in as parameters and as hyperparameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from weighmatch.implicit.flat import Parameters


def parameters(params: Any, name: str = "params") -> Parameters:
    """The tensors themselves, once they have been found to be what derivatives are taken in.

    Raises:
        TypeError: if `params` is not a mapping of names to tensors.
        ValueError: if it is empty, holds anything but floating-point tensors of one dtype and
            device, or holds frozen parameters beside others.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"{name} must map names to tensors, got a {type(params).__name__}; "
            f"give dict(module.named_parameters())"
        )
    if not params:
        raise ValueError(f"{name} is empty; give dict(module.named_parameters())")
    first = next(iter(params.values()))
    for key, leaf in params.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}[{key!r}] must be a tensor, got a {type(leaf).__name__}")
        if not leaf.is_floating_point():
            raise ValueError(
                f"{name}[{key!r}] is {leaf.dtype}, in which there is no curvature; leave it out "
                f"(named_parameters() has no buffers, state_dict() has)"
            )
        if (leaf.dtype, leaf.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name} mixes {first.dtype} on {first.device} with {leaf.dtype} on "
                f"{leaf.device} ({key!r}); give one dtype and one device"
            )
    # Copies without gradients are as good as parameters; a mixture is a network partly frozen.
    frozen = [key for key, leaf in params.items() if not leaf.requires_grad]
    if frozen and len(frozen) < len(params):
        raise ValueError(
            f"{name} holds frozen parameters beside others ({', '.join(map(str, frozen[:3]))}"
            f"{', …' if len(frozen) > 3 else ''} have requires_grad=False); leave them out"
        )
    if sum(leaf.numel() for leaf in params.values()) == 0:
        raise ValueError(f"{name} holds no numbers; give tensors with entries")
    return dict(params)


def leaves_of(params: Any, name: str = "params") -> Parameters:
    """Detached tensors that require gradients, in place of `params`."""
    found = parameters(params, name)
    with torch.inference_mode(False):  # in which no leaf could require a gradient
        return {
            key: (leaf.clone() if leaf.is_inference() else leaf).detach().requires_grad_()
            for key, leaf in found.items()
        }


def check_hyper(hyper: Any) -> None:
    """Refuse hyperparameters that are not a pytree of floating-point tensors.

    Raises:
        TypeError: if a leaf of `hyper` is not a tensor.
        ValueError: if it is not of a floating-point type, or there is none.
    """
    if isinstance(hyper, nn.Module):
        raise TypeError(
            "hyper must be a pytree of tensors, got a module; give "
            "dict(module.named_parameters()) and call it by torch.func.functional_call"
        )
    found, _ = tree_flatten_with_path(hyper)
    if not found:
        raise ValueError("hyper is empty; give a tensor or a pytree of tensors")
    for path, leaf in found:
        where = f"hyper{keystr(path)}"
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{where} must be a tensor, got a {type(leaf).__name__}; "
                f"give torch.tensor(…) for a number and leave the rest out"
            )
        if not (leaf.is_floating_point() and leaf.layout == torch.strided):
            raise ValueError(
                f"{where} is {leaf.dtype}, in which there is no gradient; leave it out"
            )


def check_vector(v: Any, params: Parameters, name: str = "v") -> Tensor:
    """`v`, if it is a flat vector for these parameters."""
    if not isinstance(v, Tensor):
        raise TypeError(
            f"{name} must be a flat tensor, got a {type(v).__name__}; "
            f"give flatten({name}) for a dict of tensors"
        )
    first = next(iter(params.values()))
    if v.dtype != first.dtype:
        raise ValueError(f"{name} is {v.dtype} but params are {first.dtype}; give one dtype")
    return v
