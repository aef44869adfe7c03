"""Minimum residual for symmetric systems, definite or not (Paige & Saunders, 1975)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from weighmatch.implicit.method import Iterate, State, Status, _IterativeMethod
from weighmatch.implicit.operators import LinearOperator

# Rounding that may be so large a part of the residual makes the recursion's doubtful.
DOUBTFUL = 0.1


@dataclass(frozen=True, kw_only=True)
class MinRes(_IterativeMethod):
    """The smallest residual in the Krylov space, by Lanczos and Givens rotations.

    It goes through negative curvature and solves the indefinite system itself; its status
    is "converged" then too. Where A = C + δI is singular to rounding and g is not in its range, it
    stops as soon as ‖A r‖ ≤ ε ‖A‖ ‖r‖ with ε the smaller of `rtol` and the root of the machine's
    precision (Choi, Paige & Saunders, 2011): the value then solves the least-squares problem, and
    the status is "negative_curvature". A small residual says little of the error where A is nearly
    singular.
    """

    def _polynomial(self) -> bool:
        return True

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        eps = torch.finfo(unit.dtype).eps
        value = torch.zeros_like(unit)
        basis, previous_basis = unit, torch.zeros_like(unit)
        direction, previous_direction = torch.zeros_like(unit), torch.zeros_like(unit)
        off_diagonal = 0.0
        cosine, sine = -1.0, 0.0
        subdiagonal, below = 0.0, 0.0
        residual = 1.0
        scale = lowest = 0.0
        # In rounded arithmetic ‖A r‖ may stop at the root of eps, and grow again.
        stationary = max(100 * eps, min(self.rtol, eps**0.5))
        # Each step rounds by eps ‖A‖ times its length, which the recursion does not see; in the
        # worst case the condition of the triangular factor multiplies it (Sleijpen et al., 2000).
        best, smallest, way = value, 1.0, 0.0
        flattest, steepest = float("inf"), 0.0
        trusted: Tensor | None = None
        status: Status | None = None
        left = self.max_products - 1
        while left > 0:
            left -= 1
            image = self._damped(op, basis) - off_diagonal * previous_basis
            diagonal = float(basis @ image)
            image = image - diagonal * basis
            # Against the two before it: what rounding lets through is largest there.
            image = image - (basis @ image) * basis - (previous_basis @ image) * previous_basis
            next_off_diagonal = float(torch.linalg.vector_norm(image))
            if not (diagonal == diagonal and next_off_diagonal < float("inf")):
                status = "diverged"
                break
            scale = max(scale, abs(diagonal), next_off_diagonal)
            lowest = min(lowest, diagonal - self.damping)
            # The column (…, subdiagonal, diagonal, next_off_diagonal) of the tridiagonal matrix,
            # turned by the last rotation.
            above = cosine * subdiagonal + sine * diagonal
            turned = sine * subdiagonal - cosine * diagonal
            second_above, below = below, sine * next_off_diagonal
            subdiagonal = -cosine * next_off_diagonal
            # ‖A r‖/‖r‖ for the residual r of the value at hand; one step more may still help.
            last = not (turned**2 + subdiagonal**2) ** 0.5 > stationary * scale
            pivot = (turned**2 + next_off_diagonal**2) ** 0.5
            if not pivot > 10 * eps * scale:
                # The Krylov space is exhausted, and C + δI singular on it.
                status = "negative_curvature"
                break
            cosine, sine = turned / pivot, next_off_diagonal / pivot
            new_direction = (basis - second_above * previous_direction - above * direction) / pivot
            previous_direction, direction = direction, new_direction
            step = cosine * residual
            flattest, steepest = min(flattest, pivot), max(steepest, pivot)
            worst = eps * scale * way * steepest / flattest
            if trusted is None and left > 0 and worst > DOUBTFUL * abs(sine * residual):
                trusted = best
                left -= 1  # for its check
            value = value + step * direction
            way += abs(step) * float(torch.linalg.vector_norm(direction))
            residual = sine * residual
            off_diagonal = next_off_diagonal
            likely = abs(residual) + eps * scale * way
            if likely <= smallest:
                best, smallest = value, likely
            if abs(residual) <= max(self.rtol, eps) or not off_diagonal > eps * scale:
                break
            if last:
                status = "negative_curvature"
                break
            previous_basis, basis = basis, image / off_diagonal
        return Iterate(
            best, status=status, scale=scale, fallback=trusted, recursed=smallest, lowest=lowest
        )
