"""The reference: all P products, then an eigendecomposition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from weighmatch.implicit.method import Iterate, Method, State
from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class Exact(Method):
    """Dense solve in O(P²) memory and O(P³) time; for P up to some thousands.

    Where C + δI is indefinite the solution is still the one of the linear system, and the
    status is "negative_curvature". Directions whose eigenvalue is zero to rounding are left
    out (the pseudo-inverse), so that the value stays finite.
    """

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        eigenvalues, vectors = torch.linalg.eigh(op.dense())
        damped = eigenvalues + self.damping
        rounding = op.shape[0] * torch.finfo(op.dtype).eps * float(damped.abs().max())
        inverse = torch.where(damped.abs() > rounding, 1 / damped, torch.zeros_like(damped))
        smallest = float(eigenvalues[0])
        return Iterate(
            vectors @ (inverse * (vectors.T @ unit)),
            status="negative_curvature" if smallest + self.damping < -rounding else "converged",
            # Within rounding of zero nothing is known of the error.
            smallest_eigenvalue=smallest if smallest + self.damping > rounding else -self.damping,
        )
