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
        return solve_symmetric(op.dense(), unit, self.damping)


def solve_symmetric(matrix: Tensor, rhs: Tensor, damping: float, positive: bool = False) -> Iterate:
    """(A + δI)⁻¹ `rhs` by the eigendecomposition of `matrix` A, (n, n), pseudo-inverse at zero.

    With `positive`, |λ + δ| is inverted, which gives a positive definite map.
    """
    if not bool(torch.isfinite(matrix).all()):
        return Iterate(torch.zeros_like(rhs), status="diverged")
    # In double: what is rounded in the matrix is enough.
    eigenvalues, vectors = torch.linalg.eigh(matrix.double())
    damped = eigenvalues + damping
    precision = max(torch.finfo(matrix.dtype).eps, len(matrix) * torch.finfo(torch.float64).eps)
    scale = float(damped.abs().max())
    rounding = precision * scale
    usable = damped.abs() > rounding
    inverse = torch.where(usable, 1 / damped, torch.zeros_like(damped))
    if positive:
        inverse = inverse.abs()
    components = vectors.T @ rhs.double()
    unsolved = float(components[~usable].norm()) > precision**0.5
    smallest = float(eigenvalues[0])
    indefinite = smallest + damping < -rounding
    return Iterate(
        (vectors @ (inverse * components)).to(rhs.dtype),
        status="negative_curvature" if indefinite or unsolved else "converged",
        # Within rounding of zero nothing is known of the error.
        smallest_eigenvalue=smallest if smallest + damping > rounding else -damping,
        scale=scale,
        lowest=min(0.0, smallest),
    )
