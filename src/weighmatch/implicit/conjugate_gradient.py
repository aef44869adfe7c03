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

    Where a direction of non-positive curvature shows up, the iteration stops and hands back
    the iterate that it has, with status "negative_curvature".

    Attributes:
        preconditioner: M⁻¹ as a function (P,) -> (P,), symmetric positive definite, or a method
            that makes one (`Nystrom`, `KFAC`) from at most half of the budget, or from what a
            `state` carries.
    """

    preconditioner: Callable[[Tensor], Tensor] | Preconditioner | None = None

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        before = op.products
        precondition = self._preconditioner(op, state)
        value = torch.zeros_like(unit)
        residual = unit.clone()
        scaled = precondition(residual)
        direction = scaled
        inner = residual @ scaled
        # Below rounding the recursion's residual says nothing of the true one.
        enough = max(self.rtol, torch.finfo(unit.dtype).eps)
        scale = 0.0
        for _ in range(self.max_products - 1 - (op.products - before)):
            image = self._damped(op, direction)
            curvature = direction @ image
            square = float(direction @ direction)
            scale = max(scale, float(torch.linalg.vector_norm(image)) / max(square, 1e-300) ** 0.5)
            # Within rounding of zero a step would be a leap to anywhere.
            if not float(curvature) > torch.finfo(unit.dtype).eps * scale * square:
                return Iterate(
                    self._first(value, unit), status="negative_curvature", scale=scale
                )
            length = inner / curvature
            value = value + length * direction
            residual = residual - length * image
            if float(torch.linalg.vector_norm(residual)) <= enough:
                break
            scaled = precondition(residual)
            previous, inner = inner, residual @ scaled
            direction = scaled + (inner / previous) * direction
        return Iterate(value, scale=scale)

    def _preconditioner(
        self, op: LinearOperator, state: State | None
    ) -> Callable[[Tensor], Tensor]:
        if self.preconditioner is None:
            return lambda residual: residual
        if isinstance(self.preconditioner, Preconditioner):
            affordable = (self.max_products - 1) // 2
            return self.preconditioner.preconditioner(op, self.damping, state, affordable)
        return self.preconditioner

    @staticmethod
    def _first(value: Tensor, unit: Tensor) -> Tensor:
        """The iterate, or the right-hand side where the very first direction is unusable."""
        return value if bool(value.any()) else unit.clone()
