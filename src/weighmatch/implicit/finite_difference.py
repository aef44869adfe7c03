"""Hypergradients without second derivatives: DARTS and SAMA.

Both take v = s ⊙ ∇_θ L_outer for the IHVP and a central difference of first derivatives in φ for
the mixed product. Two weaknesses, which the studies show: curvature enters through s alone, and
the difference loses about half of the digits (in single precision it may keep none).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from weighmatch.implicit.evaluation import (
    differentiable,
    reaches,
    require_dependence,
    require_scalar,
)
from weighmatch.implicit.flat import Parameters, flatten, unflatten
from weighmatch.implicit.hypergradient import outer_gradients


def darts_gradient(
    inner: Callable[..., Tensor],
    outer: Callable[..., Tensor],
    params: Parameters,
    hyper: Any,
    *,
    learning_rate: float,
    radius: float = 0.01,
) -> Any:
    """Second-order DARTS (Liu, Simonyan & Yang, 2019, equations 7 and 8).

    The derivative of outer after one SGD step of the inner loss, up to where it is taken: v =
    ξ ∇_θ L_outer, and ε = radius/‖v‖ in the difference.

    Args:
        inner: `inner(params, hyper) -> scalar`.
        outer: `outer(params) -> scalar` or `outer(params, hyper) -> scalar`.
        params: θ.
        hyper: a pytree of tensors.
        learning_rate: ξ, the inner step, by which the identity is scaled.
        radius: norm of the perturbation of θ; 0.01 in the paper.

    Returns:
        A pytree like `hyper`, with the direct dependence of `outer` on it.

    Raises:
        ValueError: if `learning_rate` or `radius` is not positive, or a loss is not a scalar that
            depends on what it is given.
    """
    _require_positive(learning_rate=learning_rate, radius=radius)
    gradient, direct = outer_gradients(outer, params, hyper)
    return _difference(inner, params, hyper, learning_rate * gradient, direct, radius)


def sama_gradient(
    inner: Callable[..., Tensor],
    outer: Callable[..., Tensor],
    params: Parameters,
    hyper: Any,
    *,
    learning_rate: float,
    second_moment: Parameters,
    eps: float = 1e-8,
    radius: float = 0.01,
) -> Any:
    """SAMA-like (Choe et al., 2023): the identity scaled as Adam scales a step.

    v = η ∇_θ L_outer / (√m₂ + eps), with m₂ Adam's running mean of squared inner gradients.
    SAMA itself differentiates Adam's update; near convergence of the moments that is this.

    Args:
        inner: `inner(params, hyper) -> scalar`.
        outer: `outer(params) -> scalar` or `outer(params, hyper) -> scalar`.
        params: θ.
        hyper: a pytree of tensors.
        learning_rate: η.
        second_moment: m₂, bias-corrected, named as `params`.
        eps: as in Adam.
        radius: norm of the perturbation of θ.

    Returns:
        A pytree like `hyper`, with the direct dependence of `outer` on it.

    Raises:
        ValueError: if `learning_rate`, `eps` or `radius` is not positive, a second moment is
            missing, or a loss is not a scalar that depends on what it is given.
    """
    _require_positive(learning_rate=learning_rate, eps=eps, radius=radius)
    missing = sorted(set(params) - set(second_moment))
    if missing:
        raise ValueError(f"second_moment lacks {', '.join(missing)}; give one tensor a parameter")
    gradient, direct = outer_gradients(outer, params, hyper)
    moments = flatten({name: second_moment[name] for name in params})
    direction = learning_rate * gradient / (moments.sqrt() + eps)
    return _difference(inner, params, hyper, direction, direct, radius)


def _require_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be a number > 0, got {number}")


def _difference(
    inner: Callable[..., Tensor],
    params: Parameters,
    hyper: Any,
    direction: Tensor,
    direct: list[Tensor],
    radius: float,
) -> Any:
    """Direct term − (∇_φ inner(θ + εv) − ∇_φ inner(θ − εv)) / 2ε."""
    leaves, spec = tree_flatten(hyper)
    norm = float(torch.linalg.vector_norm(direction))
    if norm == 0.0:
        return tree_unflatten(direct, spec)
    epsilon = radius / norm
    shift = unflatten(direction * epsilon, params)
    sides = []
    for sign in (1, -1):
        moved = {name: p.detach() + sign * shift[name] for name, p in params.items()}
        live = [leaf.detach().requires_grad_() for leaf in leaves]
        points = [p.requires_grad_() for p in moved.values()]
        with differentiable():
            value = inner(moved, tree_unflatten(live, spec))
            require_scalar(value, "inner")
            if not any(reaches(value, points)):
                require_dependence([], "inner")
            found = torch.autograd.grad(value, live, materialize_grads=True, allow_unused=True)
        sides.append(found)
    return tree_unflatten(
        [d - (up - down) / (2 * epsilon) for d, up, down in zip(direct, *sides, strict=True)], spec
    )
