"""The contract of every inverse-Hessian-vector product (IHVP): v ≈ (C + δI)⁻¹ g."""

import math
from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from weighmatch.implicit.operators import LinearOperator
from weighmatch.implicit.spectrum import lanczos

Status = Literal["converged", "budget", "negative_curvature", "diverged"]
State = MutableMapping[str, Any]


@dataclass(frozen=True)
class Solution:
    """What a solve gives and what it cost.

    Attributes:
        value: the approximation of v, (P,); finite whatever `status` says.
        residual: ‖(C+δI)v − g‖/‖g‖, recomputed from the operator.
        products: vectors multiplied, spectrum probe and residual check included.
        error_bound: a bound on ‖v − v*‖/‖g‖, from residual/λ with λ a known lower bound on
            the spectrum of C+δI; None where no positive λ is known.
        status: "converged" (residual within rtol, or a direct method that worked), "budget"
            (max_products spent first), "negative_curvature" (C+δI is found not to be positive
            definite), "diverged" (the iteration grew or overflowed; value is the best iterate).
    """

    value: Tensor
    residual: float
    products: int
    error_bound: float | None
    status: Status


@dataclass(frozen=True)
class Iterate:
    """What a method hands back to `Method.solve`.

    Attributes:
        value: for a right-hand side of norm 1.
        status: None where `Method.solve` is to judge by the residual.
        smallest_eigenvalue: of C, where the method found it.
        measured: norm of the residual of `value`, where products with the operator already
            gave it; None: `Method.solve` spends a product on it.
        scale: an estimate of ‖C‖ from what was seen of it: what rounding is relative to.
    """

    value: Tensor
    status: Status | None = None
    smallest_eigenvalue: float | None = None
    measured: float | None = None
    scale: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all IHVP methods: checks the input, the output and the budget in one place.

    Attributes:
        damping: δ ≥ 0, added to the diagonal of C.
    """

    # Whether the method stays an approximation however much it spends.
    approximate: ClassVar[bool] = False
    damping: float = 0.0
    registry: ClassVar[dict[str, type["Method"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            Method.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping must be a finite number ≥ 0, got {self.damping}")

    def solve(self, op: LinearOperator, rhs: Tensor, state: State | None = None) -> Solution:
        """Approximate (C + δI)⁻¹ `rhs`.

        Args:
            op: the curvature C, (P, P).
            rhs: g, (P,), finite.
            state: what may be carried from one call to the next (a mapping that the method
                reads and writes, for example an estimate of λ_max); None: nothing is.

        Raises:
            ValueError: if `rhs` is not a finite vector of the operator's length.
        """
        if rhs.shape != (op.shape[0],):
            raise ValueError(
                f"rhs must have shape ({op.shape[0]},) to match the operator, "
                f"got {tuple(rhs.shape)}"
            )
        rhs = rhs.detach()
        # The largest entry comes first: squares overflow or vanish long before the entries do.
        peak = float(rhs.abs().max())
        if not math.isfinite(peak):
            raise ValueError("rhs holds NaN or Inf; nothing was solved")
        if peak == 0.0:
            return Solution(torch.zeros_like(rhs), 0.0, 0, 0.0, "converged")
        unit = rhs / peak
        length = float(torch.linalg.vector_norm(unit))
        norm = peak * length
        spent_before = op.products
        self._announce(op)
        # Solving for g/‖g‖ keeps half- and single-precision dot products in range.
        unit = unit / length
        iterate, value, residual = self._checked(op, unit, state)
        status = iterate.status
        if not math.isfinite(residual):
            value, residual, status = torch.zeros_like(unit), 1.0, "diverged"
        scaled = value * norm
        if not bool(torch.isfinite(scaled).all()):
            scaled, residual, status = torch.zeros_like(unit), 1.0, "diverged"
        return Solution(
            value=scaled,
            residual=residual,
            products=op.products - spent_before,
            error_bound=self._error_bound(op, residual, value, iterate),
            status=status or self._judge(residual),
        )

    def _checked(
        self, op: LinearOperator, unit: Tensor, state: State | None
    ) -> tuple[Iterate, Tensor, float]:
        """What the method gives, a finite value, (P,), and the norm of its residual."""
        restriction = op.restricted(unit) if self._polynomial() else None
        if restriction is not None:
            op, unit = restriction.operator, restriction.vector
        iterate = self._iterate(op, unit, state)
        if not bool(torch.isfinite(iterate.value).all()):
            iterate = Iterate(torch.zeros_like(unit), status="diverged", measured=1.0)
        value, residual = iterate.value, iterate.measured
        if residual is None:
            residual = float(torch.linalg.vector_norm(self._damped(op, value) - unit))
        return iterate, value if restriction is None else restriction.lift(value), residual

    def _polynomial(self) -> bool:
        """Whether every iterate is a polynomial of C times g, so that it stays in any space that
        holds g and that C maps to itself.
        """
        return False

    @abstractmethod
    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        """The method itself, for a right-hand side of norm 1."""

    def _judge(self, residual: float) -> Status:
        """Status of a method that did not set one: a direct method is done."""
        return "converged" if not self.approximate or residual <= 1e-6 else "budget"

    def _announce(self, op: LinearOperator) -> None:  # noqa: B027
        """Tell the operator how many single products may follow; by default nothing is known."""

    def _damped(self, op: LinearOperator, vector: Tensor) -> Tensor:
        return torch.add(op @ vector, vector, alpha=self.damping)

    def _error_bound(
        self, op: LinearOperator, residual: float, value: Tensor, iterate: Iterate
    ) -> float | None:
        candidates = (iterate.smallest_eigenvalue, op.smallest_eigenvalue)
        known = [s for s in candidates if s is not None]
        if not known or max(known) + self.damping <= 0:
            return None
        # The residual is a difference of rounded vectors, (C + δI)v and one of norm 1.
        norm = float(torch.linalg.vector_norm(value))
        magnitude = 1 + (iterate.scale + self.damping) * norm
        rounding = 10 * torch.finfo(value.dtype).eps * magnitude
        return (residual + rounding) / (max(known) + self.damping)


@dataclass(frozen=True, kw_only=True)
class _IterativeMethod(Method):
    """A method that stops at a residual or at a budget.

    Attributes:
        max_products: bounds everything spent in a solve: probes, iterations and the final
            check of the residual.
        rtol: stop when the recursion's residual is at most rtol·‖g‖.
    """

    max_products: int = 20
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_products < 2:
            raise ValueError(
                f"max_products must be at least 2 (one product and one check of the residual), "
                f"got {self.max_products}"
            )
        if not self.rtol >= 0:
            raise ValueError(f"rtol must be ≥ 0, got {self.rtol}")

    def _announce(self, op: LinearOperator) -> None:
        op.expect(self.max_products)

    def _judge(self, residual: float) -> Status:
        # The recomputed residual may differ from the recursion's by rounding.
        return "converged" if residual <= 1.1 * self.rtol else "budget"


@dataclass(frozen=True, kw_only=True)
class _ProbingMethod(_IterativeMethod):
    """An iterative method that needs λ_max.

    Attributes:
        probe_products: length of the Lanczos run that finds it; at most half of the budget is
            spent on it. A `state` carries λ_max to later calls until an iteration grows.
    """

    probe_products: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe_products < 1:
            raise ValueError(f"probe_products must be at least 1, got {self.probe_products}")

    def _largest_eigenvalue(
        self, op: LinearOperator, unit: Tensor, state: State | None, affordable: int
    ) -> float:
        """From the state or from Lanczos; NaN where a product is not finite."""
        if state is not None and "largest_eigenvalue" in state:
            return float(state["largest_eigenvalue"])
        run = lanczos(op, unit, min(self.probe_products, max(1, affordable // 2)))
        # Lanczos approaches λ_max from below; its last residual bounds what is missing.
        largest = float(run.eigenvalues[-1]) + run.last_residual
        if state is not None and math.isfinite(largest):
            state["largest_eigenvalue"] = largest
        return largest

    @staticmethod
    def _forget(state: State | None) -> None:
        if state is not None:
            state.pop("largest_eigenvalue", None)
