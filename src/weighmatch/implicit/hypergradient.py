"""Hypergradients by the implicit function theorem: dL_outer/dφ = −(∂²L/∂φ∂θ)ᵀ v."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from weighmatch.implicit.calls import takes_hyper
from weighmatch.implicit.curvature import Hessian
from weighmatch.implicit.flat import Parameters, unflatten
from weighmatch.implicit.method import Method, Solution, State
from weighmatch.implicit.operators import LinearOperator

A = TypeVar("A")
Curvature = Callable[[Callable[[Parameters], Tensor], Parameters], LinearOperator]


def implicit_gradient(
    inner: Callable[..., Tensor],
    outer: Callable[..., Tensor],
    params: Parameters,
    hyper: Any,
    solver: Method,
    curvature: Curvature = Hessian,
    state: State | None = None,
) -> tuple[Any, Solution]:
    """The derivative of outer(θ*(hyper)[, hyper]) in hyper, with `params` taken as θ*.

    Layers such as dropout and BatchNorm belong in eval mode: `inner` is evaluated twice, which
    would draw two masks, and move running statistics twice.

    Args:
        inner: `inner(params, hyper) -> scalar`.
        outer: `outer(params) -> scalar` or `outer(params, hyper) -> scalar`; the direct
            dependence on `hyper` is part of the answer. A second argument with a default is
            given `hyper` if it is called so or the default is None.
        params: θ, names to tensors.
        hyper: a pytree (dict, list, tuple) of tensors.
        solver: any IHVP method.
        curvature: `curvature(loss, params) -> LinearOperator` for θ ↦ inner(θ, hyper).
        state: handed to the solver.

    Returns:
        The hypergradient, a pytree like `hyper`, and the solution of (C + δI)v = ∇_θ outer.

    Source:
        Lorraine, Vicol & Duvenaud (2020), theorem 1; Pedregosa (2016).
    """
    outer_gradient, direct = outer_gradients(outer, params, hyper)
    leaves, spec = tree_flatten(hyper)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    theta = {name: p.detach().requires_grad_() for name, p in params.items()}

    frozen = tree_unflatten([leaf.detach() for leaf in leaves], spec)
    operator = curvature(lambda p: inner(p, frozen), theta)
    solution = solver.solve(operator, outer_gradient, state)

    inner_gradient = torch.autograd.grad(
        inner(theta, tree_unflatten(leaves, spec)),
        list(theta.values()),
        create_graph=True,
        materialize_grads=True,
    )
    pieces = unflatten(solution.value, theta).values()
    coupled = [(g, v) for g, v in zip(inner_gradient, pieces, strict=True) if g.requires_grad]
    mixed = torch.autograd.grad(
        [g for g, _ in coupled],
        leaves,
        [v for _, v in coupled],
        materialize_grads=True,
        allow_unused=True,
    )
    total = [d - m for d, m in zip(direct, mixed, strict=True)]
    return tree_unflatten(total, spec), solution


def outer_gradients(
    outer: Callable[..., Tensor], params: Parameters, hyper: Any
) -> tuple[Tensor, list[Tensor]]:
    """∇_θ of the outer loss, (P,), and its direct gradient in each leaf of `hyper`."""
    leaves, spec = tree_flatten(hyper)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    theta = {name: p.detach().requires_grad_() for name, p in params.items()}
    value = outer(theta, tree_unflatten(leaves, spec)) if takes_hyper(outer) else outer(theta)
    gradients = torch.autograd.grad(
        value, [*theta.values(), *leaves], materialize_grads=True, allow_unused=True
    )
    gradient = torch.cat([g.reshape(-1) for g in gradients[: len(theta)]])
    return gradient, list(gradients[len(theta) :])


@overload
def weight_gradient(
    example_losses: Callable[[Parameters], Tensor], params: Parameters, v: Tensor
) -> Tensor: ...
@overload
def weight_gradient(
    example_losses: Callable[[Parameters], tuple[Tensor, A]],
    params: Parameters,
    v: Tensor,
    *,
    has_aux: Literal[True],
) -> tuple[Tensor, A]: ...
def weight_gradient(
    example_losses: Callable[[Parameters], Any],
    params: Parameters,
    v: Tensor,
    *,
    has_aux: bool = False,
) -> Any:
    """−⟨∇_θ ℓ_i, v⟩ for every example i, by one forward-mode pass.

    This is the hypergradient of the outer loss with respect to a weight on each ℓ_i in the
    inner loss: negative where more weight would lower the outer loss. Dropout and BatchNorm
    belong in eval mode: running statistics that are updated keep forward mode out by an error.

    Args:
        example_losses: `example_losses(params) -> (B,)`, or with `has_aux` that and a pytree of
            tensors that the same forward pass has given.
        params: θ, names to tensors.
        v: (C + δI)⁻¹ ∇_θ L_outer as a flat vector, (P,).
        has_aux: whether there is such a pytree.

    Returns:
        (B,), without a graph; with `has_aux` that and the pytree.
    """
    theta = {name: p.detach() for name, p in params.items()}
    with torch.no_grad(), warnings.catch_warnings():
        # torch's own forward-mode rules call torch.jit.script, which warns of itself.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        _, tangent, *aux = torch.func.jvp(
            example_losses, (theta,), (unflatten(v, theta),), has_aux=has_aux
        )
    return (-tangent, aux[0]) if has_aux else -tangent
