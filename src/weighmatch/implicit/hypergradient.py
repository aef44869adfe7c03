"""Hypergradients by the implicit function theorem: dL_outer/dφ = −(∂²L/∂φ∂θ)ᵀ v."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from weighmatch.implicit.calls import takes_hyper
from weighmatch.implicit.curvature import Hessian
from weighmatch.implicit.evaluation import (
    differentiable,
    evaluate,
    require_dependence,
    require_scalar,
)
from weighmatch.implicit.flat import Parameters, unflatten
from weighmatch.implicit.method import Method, Solution, State
from weighmatch.implicit.operators import LinearOperator
from weighmatch.implicit.trees import check_hyper, check_vector, leaves_of, parameters

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
    """The derivative of `outer(θ*(hyper), hyper)` in `hyper`, with `params` taken as `θ*`.

    Layers such as dropout and BatchNorm belong in eval mode: `inner` is evaluated twice, which
    would draw two masks, and move running statistics twice.

    Args:
        inner: `inner(params, hyper) -> scalar`.
        outer: `outer(params) -> scalar` or `outer(params, hyper) -> scalar`; the direct
            dependence on `hyper` is part of the answer. A second argument with a default is
            given `hyper` only if it is called so.
        params: θ, names to tensors.
        hyper: a pytree (dict, list, tuple) of tensors.
        solver: any IHVP method.
        curvature: `curvature(loss, params) -> LinearOperator` for θ ↦ inner(θ, hyper).
        state: handed to the solver.

    Returns:
        The hypergradient, a pytree like `hyper`, and the solution of (C + δI)v = ∇_θ outer.

    Raises:
        TypeError: if `solver` is no method, `params` no mapping or a leaf of `hyper` no tensor.
        ValueError: if a loss is not a scalar or does not depend on what it is given, or if
            `params` or `hyper` hold what there are no gradients in.

    Source:
        Lorraine, Vicol & Duvenaud (2020), theorem 1; Pedregosa (2016).
    """
    if isinstance(solver, type):
        raise TypeError(f"solver must be a method such as {solver.__name__}(), got its class")
    outer_gradient, direct = outer_gradients(outer, params, hyper)
    leaves, spec = tree_flatten(hyper)
    theta = leaves_of(params)
    frozen = tree_unflatten([leaf.detach() for leaf in leaves], spec)
    operator = curvature(lambda p: inner(p, frozen), theta)
    solution = solver.solve(operator, outer_gradient, state)
    mixed = mixed_gradient(inner, params, hyper, solution.value)
    total = [d - m for d, m in zip(direct, mixed, strict=True)]
    return tree_unflatten(total, spec), solution


def mixed_gradient(
    inner: Callable[..., Tensor], params: Parameters, hyper: Any, v: Tensor
) -> list[Tensor]:
    """(∂²L/∂φ∂θ)ᵀ v for each leaf of `hyper`."""
    named = leaves_of(params)
    names = list(named)
    leaves, spec = tree_flatten(hyper)
    theta, phi = list(named.values()), _live(leaves)

    def call(points: Sequence[Tensor]) -> Tensor:
        given = dict(zip(names, points, strict=False))
        return inner(given, tree_unflatten(list(points[len(names) :]), spec))

    with differentiable():
        value = evaluate(call, [*theta, *phi], "inner")
        require_scalar(value, "inner")
        gradients = torch.autograd.grad(value, theta, create_graph=True, allow_unused=True)
        require_dependence(gradients, "inner")
    pieces = unflatten(v, named).values()
    coupled = [
        (g, p) for g, p in zip(gradients, pieces, strict=True) if g is not None and g.requires_grad
    ]
    if not coupled:  # linear in θ
        return [torch.zeros_like(leaf) for leaf in phi]
    found = torch.autograd.grad(
        [g for g, _ in coupled],
        phi,
        [p for _, p in coupled],
        materialize_grads=True,
        allow_unused=True,
    )
    return list(found)


def outer_gradients(
    outer: Callable[..., Tensor], params: Parameters, hyper: Any
) -> tuple[Tensor, list[Tensor]]:
    """∇_θ of the outer loss, (P,), and its direct gradient in each leaf of `hyper`."""
    check_hyper(hyper)
    named = leaves_of(params)
    names = list(named)
    leaves, spec = tree_flatten(hyper)
    points = [*named.values(), *_live(leaves)]
    both = takes_hyper(outer)

    def call(points: Sequence[Tensor]) -> Tensor:
        theta = dict(zip(names, points, strict=False))
        if not both:
            return outer(theta)
        return outer(theta, tree_unflatten(list(points[len(names) :]), spec))

    with differentiable():
        value = evaluate(call, points, "outer")
        require_scalar(value, "outer")
        found: tuple[Tensor | None, ...] = ()
        if value.requires_grad:
            found = torch.autograd.grad(value, points, allow_unused=True)
    require_dependence(found, "outer")
    gradients = [
        torch.zeros_like(p) if g is None else g for p, g in zip(points, found, strict=True)
    ]
    gradient = torch.cat([g.reshape(-1) for g in gradients[: len(names)]])
    return gradient, gradients[len(names) :]


def _live(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.detach().requires_grad_() for leaf in leaves]


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

    Raises:
        TypeError: if `params` is not a mapping or `v` not a tensor.
        ValueError: if `example_losses` does not depend on `params`, or `v` does not fit them.
    """
    theta = {name: p.detach() for name, p in parameters(params).items()}
    direction = unflatten(check_vector(v, theta), theta)
    with differentiable(grad=False), warnings.catch_warnings():
        # torch's own forward-mode rules call torch.jit.script, which warns of itself.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        try:
            _, tangent, *aux = torch.func.jvp(
                example_losses, (theta,), (direction,), has_aux=has_aux, strict=True
            )
        except RuntimeError as error:
            if "independent of" in str(error):
                require_dependence([], "example_losses")
            raise
    return (-tangent, aux[0]) if has_aux else -tangent
