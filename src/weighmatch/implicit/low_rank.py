"""(U diag(λ) Uᵀ + δI)⁻¹ from the eigenpairs of a low-rank matrix."""

import torch
from torch import Tensor


def eigenpairs(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (P, k) and eigenvalues (k,), descending, of F Fᵀ for `factor` F (P, n).

    By QR and a small SVD in double precision: the Gram matrix would square the condition
    number. Eigenvalues that are zero to rounding are left out.
    """
    wide = factor.double()
    if wide.shape[1] == 0:
        return wide, wide.new_zeros(0)
    if wide.shape[0] < wide.shape[1]:
        vectors, singular, _ = torch.linalg.svd(wide, full_matrices=False)
    else:
        basis, triangle = torch.linalg.qr(wide)
        rotation, singular, _ = torch.linalg.svd(triangle)
        vectors = basis @ rotation
    eigenvalues = singular.square()
    rounding = max(wide.shape) * torch.finfo(torch.float64).eps * singular[0]
    kept = singular > rounding
    return vectors[:, kept], eigenvalues[kept]


def split(vectors: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (k,) of `rhs` in the span of `vectors` and the rest of it, (P,)."""
    wide = rhs.to(vectors.dtype)
    coordinates = vectors.T @ wide
    rest = wide - vectors @ coordinates
    # Once more: the rest is often small beside what was taken off.
    correction = vectors.T @ rest
    return coordinates + correction, rest - vectors @ correction
