"""Spectra of curvature operators by the Lanczos process."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True)
class LanczosRun:
    """Ritz values, ascending (k,), and the residual norm of the largest one.

    `weights`, (k,), are the squared first components of their vectors: with the values, a
    quadrature rule for the spectral measure of the start vector. All NaN where a product was
    not finite. `exhausted` says that the Krylov space ended, so that the values are exact.
    """

    eigenvalues: Tensor
    weights: Tensor
    last_residual: float
    products: int
    exhausted: bool = False


def lanczos(op: LinearOperator, start: Tensor, steps: int) -> LanczosRun:
    """`steps` products of the Lanczos process with full reorthogonalisation.

    Stops early when the Krylov space is exhausted. Memory O(steps · P).
    """
    basis = [start / torch.linalg.vector_norm(start)]
    diagonal: list[Tensor] = []
    below: list[Tensor] = []
    steps = min(steps, op.shape[0])
    exhausted = False
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
            exhausted = True
            break
        basis.append(image / norm)
    tridiagonal = torch.diag(torch.stack(diagonal))
    if len(diagonal) > 1:
        off = torch.stack(below[:-1])
        tridiagonal = tridiagonal + torch.diag(off, 1) + torch.diag(off, -1)
    if not bool(torch.isfinite(tridiagonal).all()):
        unknown = torch.full_like(tridiagonal[0], torch.nan)
        return LanczosRun(unknown, unknown, float("nan"), len(diagonal))
    # Half types have no eigendecomposition.
    wide = tridiagonal.to(torch.promote_types(op.dtype, torch.float32))
    eigenvalues, vectors = torch.linalg.eigh(wide)
    last_residual = float(below[-1]) * float(vectors[-1, -1].abs())
    return LanczosRun(eigenvalues, vectors[0].square(), last_residual, len(diagonal), exhausted)


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
    run = lanczos(op, _gaussian(op, products, seed), products)
    return float(run.eigenvalues[0]), float(run.eigenvalues[-1])


def lower_bound(
    op: LinearOperator, *, products: int = 30, failure: float = 1e-3, seed: int = 0
) -> float:
    """A number below λ_min(op) with probability 1 − `failure` over the start vector.

    Every Ritz value lies inside of the spectrum. Kuczyński & Woźniakowski (1992, theorem 4.2)
    bound how far: λ_min ≥ θ_min − ε (λ_max − λ_min) except with probability
    1.648 √P exp(−√ε (2k − 1)) for k products. Set `op.smallest_eigenvalue` to it, and solves
    with a damping above its magnitude carry an `error_bound`.

    Args:
        op: the operator.
        products: k.
        failure: probability that the bound does not hold.
        seed: of the Gaussian start vector.

    Raises:
        ValueError: if `products` is below 1 or `failure` not inside (0, 1), or if `products`
            are too few to bound anything (ε would be 1/2 or more), or if a product with `op` is
            not finite.
    """
    if not 0 < failure < 1:
        raise ValueError(f"failure must be between 0 and 1, got {failure}")
    run = lanczos(op, _gaussian(op, products, seed), products)
    smallest, largest = float(run.eigenvalues[0]), float(run.eigenvalues[-1])
    if not math.isfinite(smallest + largest):
        raise ValueError("op gives products that are not finite, so that it has no spectrum")
    rounding = 10 * torch.finfo(op.dtype).eps * max(abs(smallest), abs(largest))
    # An exhausted Krylov space of a random vector holds every eigenvalue.
    if run.products >= op.shape[0] or run.exhausted:
        return smallest - rounding
    epsilon = (math.log(1.648 * math.sqrt(op.shape[0]) / failure) / (2 * run.products - 1)) ** 2
    if epsilon >= 0.5:
        raise ValueError(
            f"{products} products are too few to bound the spectrum of a matrix of this size "
            f"with failure {failure}; give more"
        )
    # Both ends may lie outside of the Ritz interval, each by ε times the true width.
    return smallest - epsilon * (largest - smallest) / (1 - 2 * epsilon) - rounding


def asymmetry(op: LinearOperator, *, seed: int = 0) -> float:
    """How far `op` is from a symmetric matrix, from two products.

    |⟨u, C v⟩ − ⟨v, C u⟩| / (‖u‖ ‖C v‖ + ‖v‖ ‖C u‖) for two Gaussian vectors: of the order of the
    machine's precision for a symmetric matrix, and of 1/√P and more for one that is not. Every
    method here takes the operator for symmetric, so that a layer with a wrong second derivative,
    or noise that is drawn anew in every product, shows here first. NaN where a product is.

    Args:
        op: the operator.
        seed: of the vectors.
    """
    u, v = _gaussian(op, 1, seed), _gaussian(op, 1, seed + 1)
    image_u, image_v = op @ u, op @ v
    difference = abs(float(u @ image_v) - float(v @ image_u))
    norm = torch.linalg.vector_norm
    size = float(norm(u) * norm(image_v) + norm(v) * norm(image_u))
    return 0.0 if size == 0 else difference / size


def spectral_density(
    op: LinearOperator,
    *,
    products: int = 50,
    probes: int = 5,
    points: int = 400,
    width: float | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The density of the eigenvalues by stochastic Lanczos quadrature.

    Args:
        op: the operator.
        products: length of each Lanczos run.
        probes: number of runs; `products * probes` products in all.
        points: of the grid.
        width: standard deviation of the Gaussian that stands for each eigenvalue; None: 1 % of
            the range of the spectrum.
        seed: of the Gaussian start vectors.

    Returns:
        Grid (points,) and density (points,) in float64; the density integrates to 1 over the
        grid, which reaches 5 widths beyond the Ritz values.

    Raises:
        ValueError: if a count is below 1 (`points`: 2), if `width` is not positive, if the
            grid is too coarse for it (more than two widths from point to point), or if a product
            with `op` is not finite.

    Source:
        Lin, Saad & Yang (2016); Ghorbani, Krishnan & Xiao (2019, algorithm 2).
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    if width is not None and not width > 0:
        raise ValueError(f"width must be a number > 0, got {width}")
    runs = [lanczos(op, _gaussian(op, products, seed + k), products) for k in range(probes)]
    nodes = torch.cat([run.eigenvalues.double() for run in runs])
    weights = torch.cat([run.weights.double() for run in runs]) / probes
    low, high = float(nodes.min()), float(nodes.max())
    if not math.isfinite(low + high):
        raise ValueError("op gives products that are not finite, so that it has no spectrum")
    if width is None:
        width = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-12) / 100
    needed = math.ceil((high - low) / (2 * width) + 5) + 1
    if points < needed:
        raise ValueError(
            f"{points} points are too few for a width of {width:.3g} over a spectrum from "
            f"{low:.3g} to {high:.3g}; give at least {needed}"
        )
    grid = torch.linspace(
        low - 5 * width, high + 5 * width, points, dtype=torch.float64, device=nodes.device
    )
    bumps = torch.exp(-0.5 * ((grid.unsqueeze(1) - nodes) / width).square()) @ weights
    return grid, bumps / torch.trapezoid(bumps, grid)


def _gaussian(op: LinearOperator, products: int, seed: int) -> Tensor:
    if products < 1:
        raise ValueError(f"products must be at least 1, got {products}")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(op.shape[0], generator=generator, dtype=op.dtype).to(op.device)
