"""Chebyshev semi-iteration (Golub & Varga, 1961; Saad, 2003, algorithm 12.1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weighmatch.implicit.method import Iterate, State, _ProbingMethod
from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class Chebyshev(_ProbingMethod):
    """The best fixed polynomial of C + δI on an interval; needs no inner products.

    The upper end is λ_max + δ from a short Lanczos run. The lower end is what is known of the
    smallest eigenvalue, or, where the budget cannot resolve that anyway, the (k/2)²-th part of
    the upper end: with k products an interval of condition (k/2)² is damped to 2·e⁻⁴, and below
    it the error still falls, whereas the whole interval would hardly move.
    """

    def _polynomial(self) -> bool:
        return True

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        before = op.products
        budget = self.max_products - 1
        largest = self._largest_eigenvalue(op, unit, state, budget - 1)
        if not math.isfinite(largest):
            return Iterate(torch.zeros_like(unit), status="diverged")
        steps = budget - (op.products - before)
        upper = max(1.01 * largest + self.damping, torch.finfo(op.dtype).tiny)
        known = (op.smallest_eigenvalue or 0.0) + self.damping
        lower = min(max(known, upper / max(steps / 2, 1.5) ** 2), 0.999 * upper)
        centre, radius = (upper + lower) / 2, (upper - lower) / 2
        value = torch.zeros_like(unit)
        residual = unit.clone()
        direction = residual / centre
        ratio = radius / centre
        if steps < 1:  # the probe took all; the first step needs no product
            return Iterate(unit / upper, scale=largest)
        best, best_norm = value.clone(), 1.0
        for _ in range(steps):
            value.add_(direction)
            residual.sub_(op @ direction).sub_(direction, alpha=self.damping)
            norm = float(torch.linalg.vector_norm(residual))
            if not norm <= 1.05 + 10 * torch.finfo(unit.dtype).eps:
                # Inside the interval and below it no component grows: λ_max was too small, or
                # an eigenvalue is negative.
                self._forget(state)
                return Iterate(best, status="diverged")
            if norm < best_norm:
                best.copy_(value)
                best_norm = norm
            if norm <= max(self.rtol, torch.finfo(unit.dtype).eps):
                break
            previous, ratio = ratio, 1 / (2 * centre / radius - ratio)
            gain = 2 * ratio / radius
            if not gain <= torch.finfo(unit.dtype).max:
                return Iterate(best, status="diverged")
            direction.mul_(ratio * previous).add_(residual, alpha=gain)
        return Iterate(best, scale=largest)
