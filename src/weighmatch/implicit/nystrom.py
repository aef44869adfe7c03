"""Randomised Nyström approximation of the curvature (Frangella, Tropp & Udell, 2023).

As an IHVP: Hataya & Yamada (2023). They sample columns; a Gaussian sketch is more accurate for
the same rank, and unlike theirs this form needs neither damping nor an invertible core: it is
computed by an eigendecomposition of the core and a QR.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from weighmatch.implicit import low_rank
from weighmatch.implicit.carried import carry, find, fingerprint
from weighmatch.implicit.method import Iterate, Method, State, Status
from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True)
class Sketch:
    """Eigenvectors (P, k) and eigenvalues (k,) of the approximation, descending.

    Attributes:
        rank: columns that were drawn; fewer vectors are kept where the curvature's rank is less.
        negative: the most negative Ritz value of the curvature on the sketch, 0 if none is.
    """

    vectors: Tensor
    eigenvalues: Tensor
    rank: int
    negative: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Nystrom(Method):
    """(U Λ Uᵀ + δI)⁻¹ g on the span of the sketch, one scalar outside of it.

    rank + 3 products, O(rank · P) memory. As a preconditioner for conjugate gradients:
    `ConjugateGradient(preconditioner=Nystrom(rank=…))`.

    Attributes:
        rank: columns of the Gaussian sketch, at most P. A `state` carries the sketch from call to
            call, until a solve with it is much worse than it was when the sketch was new; one of
            another seed or of a lower rank is drawn anew.
        complement: what inverts the part u of g outside of the sketch. "measured" takes the
            scalar that minimises the error in the norm of C + δI, from two products;
            "damping" is 1/δ as in Hataya & Yamada, which takes the curvature there for zero.
        seed: of the sketch.
    """

    approximate: ClassVar[bool] = True
    carries: ClassVar[str | None] = "sketch"
    rank: int = 20
    complement: Literal["measured", "damping"] = "measured"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.complement not in ("measured", "damping"):
            raise ValueError(f'complement must be "measured" or "damping", got {self.complement!r}')

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        sketch = self._sketch(op, state)
        if sketch is None:
            return Iterate(torch.zeros_like(unit), status="diverged")
        coordinates, rest = low_rank.split(sketch.vectors, unit)
        # Without damping, an eigenvalue that is only rounding must not be divided by.
        inside = sketch.vectors @ (coordinates / (sketch.eigenvalues + self.damping))
        inside, rest = inside.to(unit.dtype), rest.to(unit.dtype)
        value = inside + self._outside(op, unit, inside, rest) * rest
        indefinite = sketch.negative + self.damping < 0
        scale = float(sketch.eigenvalues[0]) if len(sketch.eigenvalues) else 0.0
        status: Status | None = "negative_curvature" if indefinite else None
        return Iterate(value, status=status, scale=scale, lowest=sketch.negative)

    def _outside(self, op: LinearOperator, unit: Tensor, inside: Tensor, rest: Tensor) -> float:
        """The factor of the part outside of the sketch."""
        size = float(rest.square().sum())
        if size <= (10 * torch.finfo(unit.dtype).eps) ** 2:
            return 0.0
        if self.complement == "damping":
            return 1 / self.damping if self.damping > 0 else 0.0
        curvature = float(rest @ self._damped(op, rest))
        slope = float(rest @ (unit - self._damped(op, inside)))
        if not curvature > torch.finfo(unit.dtype).eps * size:
            return 1 / self.damping if self.damping > 0 else 0.0
        return slope / curvature

    def preconditioner(
        self, op: LinearOperator, damping: float, state: State | None, affordable: int
    ) -> Callable[[Tensor], Tensor]:
        """M⁻¹ r = (λ_k + δ) U (Λ + δ)⁻¹ Uᵀ r + (r − U Uᵀ r), with λ_k the smallest kept.

        Args:
            op: the curvature.
            damping: δ of the system.
            state: as in `solve`.
            affordable: products that a new sketch may spend; a larger rank is cut to it.
        """
        if affordable < 1 and find(state, "sketch", fingerprint(op, self.seed)) is None:
            return lambda r: r
        cut = replace(self, rank=max(1, min(self.rank, affordable)))
        sketch = cut._sketch(op, state)
        if sketch is None or not len(sketch.eigenvalues):
            return lambda r: r
        vectors = sketch.vectors
        damped = sketch.eigenvalues + damping
        gain = damped[-1] / damped - 1

        def apply(r: Tensor) -> Tensor:
            wide = r.to(vectors.dtype)
            return (wide + vectors @ (gain * (vectors.T @ wide))).to(r.dtype)

        return apply

    def _sketch(self, op: LinearOperator, state: State | None) -> Sketch | None:
        """From the state, or new; None where a product is not finite."""
        settings = fingerprint(op, self.seed)
        entry = find(state, "sketch", settings)
        wanted = min(self.rank, op.shape[0])
        if state is not None and entry is not None and entry.content.rank < wanted:
            del state["sketch"]
        return carry(state, "sketch", settings, lambda: self._draw(op))

    def _draw(self, op: LinearOperator) -> Sketch | None:
        size = op.shape[0]
        rank = min(self.rank, size)
        generator = torch.Generator().manual_seed(self.seed)
        gaussian = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        test, _ = torch.linalg.qr(gaussian.to(op.device))
        images = (op @ test.to(op.dtype)).double()
        if not bool(torch.isfinite(images).all()):
            return None
        # The core ΩᵀCΩ may be singular or indefinite: its positive part is what a positive
        # approximation can use. Eigenvalues within rounding of zero would be divided by.
        core = test.T @ images
        values, rotation = torch.linalg.eigh((core + core.T) / 2)
        precision = torch.finfo(op.dtype).eps
        rounding = 10 * rank * precision * float(values.abs().max())
        kept = values > rounding
        negative = float(values[0]) if float(values[0]) < -rounding else 0.0
        if not bool(kept.any()):
            nothing = torch.zeros(size, 0, dtype=torch.float64, device=op.device)
            return Sketch(nothing, values[:0], rank, negative)
        factor = images @ (rotation[:, kept] / values[kept].sqrt())
        vectors, eigenvalues = low_rank.eigenpairs(factor)
        return Sketch(vectors, eigenvalues, rank, negative)
