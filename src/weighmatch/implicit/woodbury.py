"""The inverse of a low-rank matrix plus damping by the Woodbury identity (Woodbury, 1950)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from weighmatch.implicit import low_rank
from weighmatch.implicit.method import Iterate, Method, State
from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class Woodbury(Method):
    """(F Fᵀ + δI)⁻¹ g through an n×n problem, for C = F Fᵀ with F (P, n).

    Made for `EmpiricalFisher`, where n is the number of examples (Singh & Alistarh, 2020,
    WoodFisher): n products, O(nP) memory. Any other operator is factored densely, from P
    products. Without damping, what of g lies outside of the range of F has no solution:
    it is left out, and the status is "negative_curvature". So it is where C itself has negative
    eigenvalues, whatever the damping: F Fᵀ cannot hold them.
    """

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        factor, left_out = op.factor()
        if not bool(torch.isfinite(factor).all()):
            return Iterate(torch.zeros_like(unit), status="diverged")
        vectors, eigenvalues = low_rank.eigenpairs(factor)
        coordinates, rest = low_rank.split(vectors, unit)
        solved = vectors @ (coordinates / (eigenvalues + self.damping))
        precision = max(factor.shape) * torch.finfo(op.dtype).eps
        unsolved = False
        if self.damping > 0:
            solved = solved + rest / self.damping
        else:
            unsolved = float(torch.linalg.vector_norm(rest)) > precision**0.5
        scale = float(eigenvalues[0]) if len(eigenvalues) else 0.0
        indefinite = left_out < -precision * max(scale, -left_out)
        return Iterate(
            solved.to(unit.dtype),
            status="negative_curvature" if indefinite or unsolved else "converged",
            scale=max(scale, -left_out),
            lowest=left_out,
        )
