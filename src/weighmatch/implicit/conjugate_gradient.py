"""Conjugate gradients (Hestenes & Stiefel, 1952) for implicit differentiation (Pedregosa, 2016)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from weighmatch.implicit.carried import WORSE, Carried
from weighmatch.implicit.method import Iterate, State, Status, _Checked, _IterativeMethod
from weighmatch.implicit.operators import LinearOperator

# Steps along curvatures below so many roundings of the largest add rounding to the residual that
# may be a tenth of it, which the recursion does not see.
DOUBTFUL = 100.0


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

    It hands back the last iterate, whose error is the smallest, or where its residual is above 1
    the iterate of the smallest residual; with `shorten=False` the last one all the same. Where a
    direction of non-positive curvature ends the iteration, it hands back the iterate of the
    smallest residual with the status "negative_curvature". That iterate is zero where the first
    direction is already one: no multiple of it that descends would lower the residual.
    Near a singular C + δI rounding spoils the recursion: the iterate from before it could is kept,
    and handed back where the check of the residual finds it to be the better one.

    Attributes:
        preconditioner: M⁻¹ as a function (P,) -> (P,), symmetric positive definite, or a method
            that makes one (`Nystrom`, `KFAC`) from at most half of the budget, or from what a
            `state` carries, which a solve that ends much worse than the first drops.
    """

    preconditioner: Callable[[Tensor], Tensor] | Preconditioner | None = None

    def _not_aged(self, op: LinearOperator, unit: Tensor, state: State | None) -> _Checked:
        """The solve; a carried preconditioner with which it was much worse is dropped."""
        key = getattr(self.preconditioner, "carries", None)
        if state is None or not isinstance(key, str):
            return super()._not_aged(op, unit, state)
        carried = state.get(key)
        checked = super()._not_aged(op, unit, state)
        entry = state.get(key)
        reused = entry is carried
        if not isinstance(entry, Carried):
            return checked
        if entry.residual is None:
            entry.residual = checked.found
        elif reused and checked.found > max(1.1 * self.rtol, WORSE * entry.residual):
            del state[key]
        return checked

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
        scale = lowest = 0.0
        # The iterate of the smallest residual; None: the one at hand, as it is almost always.
        best: Tensor | None = None
        smallest, remaining = 1.0, 1.0
        # The iterate before the first step that rounding could have spoilt.
        trusted: Tensor | None = None
        status: Status | None = None
        left = self.max_products - 1 - (op.products - before)
        while left > 0:
            image = op @ direction
            left -= 1
            undamped = float(direction @ image)
            curvature = undamped + self.damping * square
            if square > 0:
                scale = max(scale, abs(curvature) / square)
                lowest = min(lowest, undamped / square)
            # Within rounding of zero a step would be a leap to anywhere.
            # A preconditioner that is not positive definite has no length to measure in.
            if not (curvature > eps * scale * square and inner > 0):
                status = "negative_curvature"
                break
            length = inner / curvature
            if not length <= torch.finfo(unit.dtype).max:
                status = "diverged"
                break
            if trusted is None and curvature < DOUBTFUL * eps * scale * square and left > 0:
                trusted = value.clone()
                left -= 1  # for its check
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
        # Of a definite system the last iterate has the smallest error, whatever its residual;
        # where that is worse than zero or the solve went wrong, the smallest residual is better.
        if best is not None and (status is not None or (self.shorten and not remaining <= 1)):
            value, remaining = best, smallest
        return Iterate(
            value,
            status=status,
            scale=scale,
            fallback=trusted,
            recursed=remaining**0.5,
            lowest=lowest,
        )

    def _preconditioner(
        self, op: LinearOperator, state: State | None
    ) -> Callable[[Tensor], Tensor] | None:
        if self.preconditioner is None:
            return None
        if isinstance(self.preconditioner, Preconditioner):
            affordable = (self.max_products - 1) // 2
            return self.preconditioner.preconditioner(op, self.damping, state, affordable)
        return self.preconditioner
