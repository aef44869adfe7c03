"""Conjugate gradients (Hestenes & Stiefel, 1952) for implicit differentiation (Pedregosa, 2016)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from weighmatch.implicit.method import Iterate, State, _IterativeMethod
from weighmatch.implicit.operators import LinearOperator


@runtime_checkable
class Preconditioner(Protocol):
    """A method whose approximate inverse can be used as a preconditioner."""

    def preconditioner(
        self, op: LinearOperator, damping: float, state: State | None, affordable: int
    ) -> Callable[[Tensor], Tensor]:
        """M⁻¹ for C + `damping`·I, for at most `affordable` products."""


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(_IterativeMethod):
    """The Krylov method for positive definite C + δI.

    Where a direction of non-positive curvature shows up, the iteration stops and hands back the
    iterate of the smallest residual, with status "negative_curvature". That is zero where the
    first direction is already one: no multiple of it that descends would lower the residual.

    Attributes:
        preconditioner: M⁻¹ as a function (P,) -> (P,), symmetric positive definite, or a method
            that makes one (`Nystrom`, `KFAC`) from at most half of the budget, or from what a
            `state` carries.
    """

    preconditioner: Callable[[Tensor], Tensor] | Preconditioner | None = None

    def _polynomial(self) -> bool:
        return self.preconditioner is None

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        before = op.products
        precondition = self._preconditioner(op, state)
        # In place throughout: new memory for every step takes longer than the arithmetic.
        value = torch.zeros_like(unit)
        residual = unit.clone()
        scaled = residual if precondition is None else precondition(residual)
        direction = scaled.clone()
        inner = square = float(residual @ scaled)
        if precondition is not None:
            square = float(scaled @ scaled)
        eps = torch.finfo(unit.dtype).eps
        # Below rounding the recursion's residual says nothing of the true one.
        enough = max(self.rtol, eps)
        scale = 0.0
        # The iterate of the smallest residual; None: the one at hand, as it is almost always.
        best: Tensor | None = None
        smallest = 1.0
        for _ in range(self.max_products - 1 - (op.products - before)):
            image = op @ direction
            curvature = float(direction @ image) + self.damping * square
            if square > 0:
                scale = max(scale, abs(curvature) / square)
            # Within rounding of zero a step would be a leap to anywhere.
            # A preconditioner that is not positive definite has no length to measure in.
            if not (curvature > eps * scale * square and inner > 0):
                value = value if best is None else best
                return Iterate(value, status="negative_curvature", scale=scale)
            length = inner / curvature
            if not length <= torch.finfo(unit.dtype).max:
                return Iterate(value, status="diverged", scale=scale)
            value.add_(direction, alpha=length)
            residual.sub_(image, alpha=length)
            if self.damping > 0:
                residual.sub_(direction, alpha=length * self.damping)
            remaining = float(residual @ residual)
            if not remaining > enough**2:
                break
            if remaining <= smallest:
                best, smallest = None, remaining
            elif best is None:
                best = value.sub(direction, alpha=length)
            scaled = residual if precondition is None else precondition(residual)
            previous = inner
            inner = remaining if precondition is None else float(residual @ scaled)
            ratio = inner / previous
            direction.mul_(ratio).add_(scaled)
            square = float(direction @ direction)
        return Iterate(value, scale=scale)

    def _preconditioner(
        self, op: LinearOperator, state: State | None
    ) -> Callable[[Tensor], Tensor] | None:
        if self.preconditioner is None:
            return None
        if isinstance(self.preconditioner, Preconditioner):
            affordable = (self.max_products - 1) // 2
            return self.preconditioner.preconditioner(op, self.damping, state, affordable)
        return self.preconditioner
