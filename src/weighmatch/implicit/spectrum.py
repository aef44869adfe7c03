"""Spectra of curvature operators by the Lanczos process."""

from dataclasses import dataclass

import torch
from torch import Tensor

from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True)
class LanczosRun:
    """Ritz values, ascending (k,), and the residual norm of the largest one.

    All NaN where a product was not finite.
    """

    eigenvalues: Tensor
    last_residual: float
    products: int


def lanczos(op: LinearOperator, start: Tensor, steps: int) -> LanczosRun:
    """`steps` products of the Lanczos process with full reorthogonalisation.

    Stops early when the Krylov space is exhausted. Memory O(steps · P).
    """
    basis = [start / torch.linalg.vector_norm(start)]
    diagonal: list[Tensor] = []
    below: list[Tensor] = []
    steps = min(steps, op.shape[0])
    for _ in range(steps):
        image = op @ basis[-1]
        diagonal.append(basis[-1] @ image)
        span = torch.stack(basis, dim=1)
        for _ in range(2):  # twice is enough (Parlett, 1998, section 6.9)
            image = image - span @ (span.T @ image)
        norm = torch.linalg.vector_norm(image)
        below.append(norm)
        scale = max(float(d.abs()) for d in diagonal)
        if not float(norm) > 10 * torch.finfo(op.dtype).eps * max(scale, 1e-30):
            break
        basis.append(image / norm)
    tridiagonal = torch.diag(torch.stack(diagonal))
    if len(diagonal) > 1:
        off = torch.stack(below[:-1])
        tridiagonal = tridiagonal + torch.diag(off, 1) + torch.diag(off, -1)
    if not bool(torch.isfinite(tridiagonal).all()):
        unknown = torch.full_like(tridiagonal[0], torch.nan)
        return LanczosRun(unknown, float("nan"), len(diagonal))
    # Half types have no eigendecomposition.
    wide = tridiagonal.to(torch.promote_types(op.dtype, torch.float32))
    eigenvalues, vectors = torch.linalg.eigh(wide)
    last_residual = float(below[-1]) * float(vectors[-1, -1].abs())
    return LanczosRun(eigenvalues, last_residual, len(diagonal))


def extreme_eigenvalues(
    op: LinearOperator, *, products: int = 50, seed: int = 0
) -> tuple[float, float]:
    """Smallest and largest eigenvalue (λ_min, λ_max) of `op`, from inside the spectrum.

    Args:
        op: the operator.
        products: length of the Lanczos run; exact, to rounding, when it reaches P.
        seed: of the Gaussian start vector.

    Raises:
        ValueError: if `products` is below 1.
    """
    if products < 1:
        raise ValueError(f"products must be at least 1, got {products}")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(op.shape[0], generator=generator, dtype=op.dtype).to(op.device)
    run = lanczos(op, start, products)
    return float(run.eigenvalues[0]), float(run.eigenvalues[-1])
