"""Between the named parameters of a network and one flat vector."""

from collections.abc import Mapping

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


def flatten(tree: Mapping[str, Tensor]) -> Tensor:
    """Concatenate the tensors of `tree`, in its order, into one vector of shape (P,)."""
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Parameters:
    """Cut a vector (P,) into views shaped and named as the tensors of `like`.

    Raises:
        ValueError: if the length of `vector` is not the number of entries of `like`.
    """
    sizes = [leaf.numel() for leaf in like.values()]
    if vector.shape != (sum(sizes),):
        raise ValueError(
            f"a vector of shape ({sum(sizes)},) is needed for these parameters, "
            f"got {tuple(vector.shape)}"
        )
    pieces = vector.split(sizes)
    return {
        name: piece.view_as(leaf) for (name, leaf), piece in zip(like.items(), pieces, strict=True)
    }
