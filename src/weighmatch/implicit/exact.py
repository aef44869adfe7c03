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
    out (the pseudo-inverse), so that the value stays finite; where the right-hand side lies in
    them too, the status is "negative_curvature" as well.
    """

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        matrix = op.dense()
        if not bool(torch.isfinite(matrix).all()):
            return Iterate(torch.zeros_like(unit), status="diverged")
        # Half types have no eigendecomposition.
        wide = torch.promote_types(op.dtype, torch.float32)
        eigenvalues, vectors = torch.linalg.eigh(matrix.to(wide))
        damped = eigenvalues + self.damping
        precision = op.shape[0] * torch.finfo(op.dtype).eps
        rounding = precision * float(damped.abs().max())
        usable = damped.abs() > rounding
        inverse = torch.where(usable, 1 / damped, torch.zeros_like(damped))
        components = vectors.T @ unit.to(wide)
        unsolved = float(components[~usable].norm()) > precision
        smallest = float(eigenvalues[0])
        indefinite = smallest + self.damping < -rounding
        return Iterate(
            (vectors @ (inverse * components)).to(unit.dtype),
            status="negative_curvature" if indefinite or unsolved else "converged",
            # Within rounding of zero nothing is known of the error.
            smallest_eigenvalue=smallest if smallest + self.damping > rounding else -self.damping,
        )
