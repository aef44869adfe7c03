"""Hypergradients through the trajectory of the inner optimiser: what the implicit one replaces."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from weighmatch.implicit.calls import takes_hyper
from weighmatch.implicit.evaluation import differentiable, require_dependence, require_scalar
from weighmatch.implicit.trees import check_hyper


def unrolled_gradient(
    step: Callable[..., Any],
    init: Any,
    hyper: Any,
    outer: Callable[..., Tensor],
    steps: int,
    truncation: int | None = None,
) -> Any:
    """The derivative of outer(θ_steps(hyper)[, hyper]) in hyper by reverse mode.

    Memory grows with the number of steps that are differentiated through.

    Args:
        step: one update, `step(params, hyper) -> params` or `step(params, hyper, t) -> params`
            with t from 0, which a third argument with a default is given too; it must not
            modify its arguments. Parameters may be any pytree of tensors, an optimiser's
            momentum included. They require gradients, for a step that differentiates a loss.
        init: θ_0.
        hyper: a pytree of tensors.
        outer: `outer(params) -> scalar` or `outer(params, hyper) -> scalar`.
        steps: number of updates.
        truncation: differentiate through the last so many updates only (Shaban et al., 2019);
            None: through all.

    Returns:
        The gradient, a pytree like `hyper`, the direct dependence of `outer` on it included.

    Raises:
        TypeError: if a leaf of `hyper` is not a tensor.
        ValueError: if `steps` is negative, or `truncation` is, or if `outer` is not a scalar that
            depends on what it is given.

    Source:
        Maclaurin, Duvenaud & Adams (2015); Franceschi et al. (2017).
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if truncation is not None and truncation < 0:
        raise ValueError(f"truncation must be at least 0, or None for all steps, got {truncation}")
    check_hyper(hyper)
    leaves, spec = tree_flatten(hyper)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    live = tree_unflatten(leaves, spec)
    frozen = tree_unflatten([leaf.detach() for leaf in leaves], spec)
    counted = _counts(step)
    with differentiable():
        params = _detached(init)
        first = 0 if truncation is None else max(0, steps - truncation)
        for t in range(steps):
            seen = live if t >= first else frozen
            params = step(params, seen, t) if counted else step(params, seen)
            if t < first:
                params = _detached(params)
        value = outer(params, live) if takes_hyper(outer) else outer(params)
        require_scalar(value, "outer")
        last = [p for p in tree_flatten(params)[0] if isinstance(p, Tensor) and p.requires_grad]
        found: tuple[Tensor | None, ...] = ()
        if value.requires_grad:
            # The last parameters, too: that costs nothing, and shows whether they matter.
            found = torch.autograd.grad(value, [*leaves, *last], allow_unused=True)
    require_dependence(found, "outer")
    gradients = [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=False)
    ]
    return tree_unflatten(gradients, spec)


def _detached(params: Any) -> Any:
    """Leaves without a past, in which a step may differentiate a loss of its own."""
    return tree_map(lambda p: p.detach().requires_grad_(p.is_floating_point()), params)


def _counts(step: Callable[..., Any]) -> bool:
    """Whether `step` wants the number of the update: a third argument, optional only as `t`."""
    try:
        third = list(inspect.signature(step).parameters.values())[2]
    except (IndexError, ValueError):
        return False
    if third.kind not in (third.POSITIONAL_ONLY, third.POSITIONAL_OR_KEYWORD):
        return False
    return third.default is third.empty or third.name == "t"
