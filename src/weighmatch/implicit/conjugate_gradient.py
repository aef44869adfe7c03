"""Conjugate gradients (Hestenes & Stiefel, 1952) for implicit differentiation (Pedregosa, 2016)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weighmatch.implicit.method import Iterate, State, _IterativeMethod
from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(_IterativeMethod):
    """The Krylov method for positive definite C + δI.

    Where a direction of non-positive curvature shows up, the iteration stops and hands back
    the iterate that it has, with status "negative_curvature".

    Attributes:
        preconditioner: M⁻¹ as a function (P,) -> (P,), symmetric positive definite.
    """

    preconditioner: Callable[[Tensor], Tensor] | None = None

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        value = torch.zeros_like(unit)
        residual = unit.clone()
        scaled = self._precondition(residual)
        direction = scaled
        inner = residual @ scaled
        # Below rounding the recursion's residual says nothing of the true one.
        enough = max(self.rtol, torch.finfo(unit.dtype).eps)
        for _ in range(self.max_products - 1):
            image = self._damped(op, direction)
            curvature = direction @ image
            if not bool(curvature > 0):
                return Iterate(self._first(value, unit), status="negative_curvature")
            length = inner / curvature
            value = value + length * direction
            residual = residual - length * image
            if float(torch.linalg.vector_norm(residual)) <= enough:
                break
            scaled = self._precondition(residual)
            previous, inner = inner, residual @ scaled
            direction = scaled + (inner / previous) * direction
        return Iterate(value)

    def _precondition(self, residual: Tensor) -> Tensor:
        return residual if self.preconditioner is None else self.preconditioner(residual)

    @staticmethod
    def _first(value: Tensor, unit: Tensor) -> Tensor:
        """The iterate, or the right-hand side where the very first direction is unusable."""
        return value if bool(value.any()) else unit.clone()
