"""Minimum residual for symmetric systems, definite or not (Paige & Saunders, 1975)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from weighmatch.implicit.method import Iterate, State, _IterativeMethod
from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class MinRes(_IterativeMethod):
    """The smallest residual in the Krylov space, by Lanczos and Givens rotations.

    It goes through negative curvature and solves the indefinite system itself; its status
    is "converged" then too. A small residual says little of the error where C + δI is nearly
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
        scale = 0.0
        for _ in range(self.max_products - 1):
            image = self._damped(op, basis) - off_diagonal * previous_basis
            diagonal = float(basis @ image)
            image = image - diagonal * basis
            # Against the two before it: what rounding lets through is largest there.
            image = image - (basis @ image) * basis - (previous_basis @ image) * previous_basis
            next_off_diagonal = float(torch.linalg.vector_norm(image))
            if not (diagonal == diagonal and next_off_diagonal < float("inf")):
                return Iterate(value, status="diverged")
            scale = max(scale, abs(diagonal), next_off_diagonal)
            # The column (…, subdiagonal, diagonal, next_off_diagonal) of the tridiagonal matrix,
            # turned by the last rotation.
            above = cosine * subdiagonal + sine * diagonal
            turned = sine * subdiagonal - cosine * diagonal
            second_above, below = below, sine * next_off_diagonal
            subdiagonal = -cosine * next_off_diagonal
            pivot = (turned**2 + next_off_diagonal**2) ** 0.5
            if not pivot > 10 * eps * scale:
                # The Krylov space is exhausted, and C + δI singular on it.
                return Iterate(value, status="negative_curvature", scale=scale)
            cosine, sine = turned / pivot, next_off_diagonal / pivot
            new_direction = (basis - second_above * previous_direction - above * direction) / pivot
            previous_direction, direction = direction, new_direction
            value = value + (cosine * residual) * direction
            residual = sine * residual
            off_diagonal = next_off_diagonal
            if abs(residual) <= max(self.rtol, eps) or not off_diagonal > eps * scale:
                break
            previous_basis, basis = basis, image / off_diagonal
        return Iterate(value, scale=scale)
