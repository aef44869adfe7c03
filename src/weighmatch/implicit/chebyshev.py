"""Chebyshev semi-iteration (Golub & Varga, 1961; Saad, 2003, algorithm 12.1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weighmatch.implicit.method import Iterate, State
from weighmatch.implicit.operators import LinearOperator
from weighmatch.implicit.probing import Ends, _ProbingMethod


@dataclass(frozen=True, kw_only=True)
class Chebyshev(_ProbingMethod):
    """The best fixed polynomial of C + δI on an interval; needs no inner products.

    The upper end of the interval is λ_max + δ from a short Lanczos run. The lower end is what is
    known of the smallest eigenvalue, or lies between two numbers if that is more: the probe's
    smallest Ritz value, and the (k/2)²-th part of the upper end, as k products damp an interval of
    condition (k/2)² to 2·e⁻⁴ and a wider one would hardly move. An eigenvalue below the interval
    is safe: its part of the error falls, only more slowly. Where such parts are all that is left,
    the iteration starts again from where it is on a wider interval, so that the error falls for as
    long as products are spent. An eigenvalue above the interval makes the residual grow: then
    λ_max is probed again and the iteration goes on from its best iterate; where the probe meets an
    eigenvalue below −δ, the status is "negative_curvature".
    """

    def _polynomial(self) -> bool:
        return True

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        before = op.products
        budget = self.max_products - 1
        ends = self._ends(op, unit, state, budget - 1)
        if not math.isfinite(ends.largest):
            return Iterate(torch.zeros_like(unit), status="diverged")
        left = budget - (op.products - before)
        if left < 1:  # the probe took all; the first step needs no product
            return Iterate(unit / self._upper(op, ends), scale=ends.largest)
        eps = torch.finfo(unit.dtype).eps
        cycle = _Cycle(self._interval(op, ends, left), 1.0)
        value, residual = torch.zeros_like(unit), unit.clone()
        direction = residual / cycle.centre
        best, best_norm = value.clone(), 1.0
        while left > 0:
            value.add_(direction)
            residual.sub_(op @ direction).sub_(direction, alpha=self.damping)
            left -= 1
            norm = float(torch.linalg.vector_norm(residual))
            inside = cycle.step()
            # No more than this can be left of what lies in the interval and below it.
            if not norm <= 1.05 * min(cycle.start, best_norm + inside) + 10 * eps:
                spent = op.products
                found = self._again(op, residual, ends, state, left)
                if isinstance(found, str):
                    return Iterate(best, status=found, scale=ends.largest)
                ends = found
                left -= op.products - spent + 1
                value.copy_(best)
                torch.sub(unit, self._damped(op, value), out=residual)
                cycle = _Cycle(self._interval(op, ends, left), best_norm)
                direction = residual / cycle.centre
                continue
            if norm < best_norm:
                best.copy_(value)
                best_norm = norm
            if norm <= max(self.rtol, eps):
                break
            wider = self._wider(cycle, left) if norm > 4 * inside else None
            if wider is not None:
                cycle = _Cycle(wider, norm)
                direction = residual / cycle.centre
                continue
            ratio, gain = cycle.coefficients()
            if not gain <= torch.finfo(unit.dtype).max:
                return Iterate(best, status="diverged")
            direction.mul_(ratio).add_(residual, alpha=gain)
        return Iterate(best, scale=ends.largest, recursed=best_norm, lowest=ends.lowest)

    def _upper(self, op: LinearOperator, ends: Ends) -> float:
        return max(1.01 * ends.largest + self.damping, torch.finfo(op.dtype).tiny)

    def _interval(self, op: LinearOperator, ends: Ends, left: int) -> tuple[float, float]:
        upper = self._upper(op, ends)
        known = (op.smallest_eigenvalue or 0.0) + self.damping
        seen = 0.0 if ends.smallest is None else ends.smallest + self.damping
        lower = max(known, _between(seen, upper, left))
        return min(lower, 0.999 * upper), upper

    def _wider(self, cycle: "_Cycle", left: int) -> tuple[float, float] | None:
        """An interval for what the old one does not hold; None where the budget ends before."""
        if cycle.damped > 0.05:
            return None
        lower = _between(cycle.lower, cycle.upper, left)
        return (lower, cycle.upper) if lower < 0.9 * cycle.lower else None


def _between(seen: float, upper: float, left: int) -> float:
    """The geometric mean of what was seen and of the lowest end that `left` products can serve.

    The smallest Ritz value lies above λ_min, nobody knows how far: where it is not much above the
    lowest end either, it says nothing.
    """
    lowest = upper / max(left / 2, 1.5) ** 2
    return lowest if seen <= 8 * lowest else math.sqrt(seen * lowest)


class _Cycle:
    """The recursion of the Chebyshev polynomials T_j on one interval.

    Attributes:
        start: norm of the residual at its beginning.
        damped: 1 / T_j(centre/radius), the largest value of the polynomial in the interval.
    """

    def __init__(self, interval: tuple[float, float], start: float) -> None:
        self.lower, self.upper = interval
        self.centre, self.radius = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2
        self.start, self.damped = start, 1.0
        self._ratio = self.radius / self.centre
        self._rate, self._steps = math.acosh(self.centre / self.radius), 0

    def step(self) -> float:
        """Count a step; a bound on what is left in the interval after it."""
        self._steps += 1
        self.damped = 1 / math.cosh(min(self._rate * self._steps, 700.0))
        return self.start * self.damped

    def coefficients(self) -> tuple[float, float]:
        """Of the last direction and of the residual in the next direction."""
        previous = self._ratio
        self._ratio = 1 / (2 * self.centre / self.radius - previous)
        return self._ratio * previous, 2 * self._ratio / self.radius
