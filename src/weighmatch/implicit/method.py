"""The contract of every inverse-Hessian-vector product (IHVP): v ≈ (C + δI)⁻¹ g."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from weighmatch.implicit.carried import Carried
from weighmatch.implicit.carried import State as State
from weighmatch.implicit.operators import LinearOperator

Status = Literal["converged", "budget", "negative_curvature", "diverged"]


@dataclass(frozen=True)
class Solution:
    """What a solve gives and what it cost.

    Attributes:
        value: the approximation of v, (P,); finite whatever `status` says.
        residual: ‖(C+δI)v − g‖/‖g‖, recomputed from the operator; above 1, which is what v = 0
            has, only for a method with `shorten=False`.
        products: vectors multiplied, spectrum probe and residual check included.
        error_bound: a bound on ‖v − v*‖/‖g‖, from residual/λ with λ a known lower bound on
            the spectrum of C+δI; None where no positive λ is known, or where the solve has met
            the negative curvature that the operator claims not to have.
        status: "converged" (residual within rtol, or a direct method that solved the system),
            "budget" (max_products spent first, or an approximation that is no solution),
            "negative_curvature" (C+δI is found not to be positive definite), "diverged" (the
            iteration grew or overflowed, or what a direct method found solves nothing; value is
            the best that was found).
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
        fallback: an earlier iterate, from before rounding could have spoilt the recursion; a
            product of the budget is left for it.
        recursed: the norm that a recursion gives for the residual of `value`; None: no recursion.
        lowest: the most negative ⟨u, C u⟩/‖u‖² that was seen, 0 if none was.
    """

    value: Tensor
    status: Status | None = None
    smallest_eigenvalue: float | None = None
    measured: float | None = None
    scale: float = 0.0
    fallback: Tensor | None = None
    recursed: float | None = None
    lowest: float = 0.0


@dataclass(frozen=True)
class _Checked:
    """An iterate with the norm of its residual, before and after the guard against worse than 0."""

    iterate: Iterate
    value: Tensor
    residual: float
    found: float


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all IHVP methods: checks the input, the output and the budget in one place.

    Attributes:
        shorten: hand back nothing that is worse than v = 0: a value whose residual is above 1 is
            shortened to a length at which it is not, by a power of two, so that its direction
            stays to the last bit; where no length helps, the value is 0. False: the value stays
            what the formula gives, and the status of one that is worse than zero is "diverged".
        damping: δ ≥ 0, added to the diagonal of C. It is 0 unless given, since only the caller
            knows the scale of C; a network with more parameters than outputs has a singular
            Gauss-Newton matrix and needs one, for example a hundredth of λ_max.
    """

    # Whether the method stays an approximation however much it spends.
    approximate: ClassVar[bool] = False
    # The key under which a `state` carries what the method has made of the curvature.
    carries: ClassVar[str | None] = None
    damping: float = 0.0
    shorten: bool = True
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
            rhs: g, (P,), finite, of the operator's dtype.
            state: what may be carried from one call to the next (a mapping that the method
                reads and writes, for example an estimate of λ_max); None: nothing is. What it
                carries is made anew where the settings differ or the solve shows that it no
                longer fits the curvature.

        Raises:
            TypeError: if `rhs` is not a tensor.
            ValueError: if `rhs` is not a finite vector of the operator's length and dtype.
        """
        self._check_rhs(op, rhs)
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
        checked = self._not_aged(op, unit, state)
        iterate, value, residual = checked.iterate, checked.value, checked.residual
        status = iterate.status
        if not math.isfinite(residual):
            value, residual, status = torch.zeros_like(unit), 1.0, "diverged"
        scaled = value * norm
        if not bool(torch.isfinite(scaled).all()):
            scaled, residual, status = torch.zeros_like(unit), 1.0, "diverged"
        rounding = 10 * torch.finfo(unit.dtype).eps
        if status is None and checked.found > 1 + rounding:
            # A length that helps is an approximation still; none, or one that is kept, is not.
            status = "diverged" if residual > 1 + rounding or not bool(value.any()) else None
        status = status or self._judge(residual)
        if status == "converged" and residual > self._solved_within(iterate, value):
            status = "diverged"
        return Solution(
            value=scaled,
            residual=residual,
            products=op.products - spent_before,
            error_bound=self._error_bound(op, residual, value, iterate, status),
            status=status,
        )

    @staticmethod
    def _check_rhs(op: LinearOperator, rhs: Tensor) -> None:
        if not isinstance(rhs, Tensor):
            raise TypeError(
                f"rhs must be a flat tensor of shape ({op.shape[0]},), got a "
                f"{type(rhs).__name__}; give flatten(rhs) for a dict of tensors"
            )
        if rhs.shape != (op.shape[0],):
            raise ValueError(
                f"rhs must have shape ({op.shape[0]},) to match the operator, "
                f"got {tuple(rhs.shape)}"
            )
        if rhs.dtype != op.dtype:
            raise ValueError(
                f"rhs is {rhs.dtype} but the operator multiplies {op.dtype}; give rhs.to(op.dtype)"
            )

    def _not_aged(self, op: LinearOperator, unit: Tensor, state: State | None) -> _Checked:
        """The solve, once more where what `state` carried no longer fits the curvature."""
        if self.carries is None or state is None:
            return self._checked(op, unit, state)
        carried = state.get(self.carries)
        checked = self._checked(op, unit, state)
        entry = state.get(self.carries)
        reused = entry is carried
        if not isinstance(entry, Carried):
            return checked
        if reused and entry.aged(checked.found):
            del state[self.carries]
            checked = self._checked(op, unit, state)
            entry = state.get(self.carries)
        if isinstance(entry, Carried) and entry.residual is None:
            entry.residual = checked.found
        return checked

    def _checked(self, op: LinearOperator, unit: Tensor, state: State | None) -> _Checked:
        """What the method gives, a finite value, (P,), and the norm of its residual."""
        restriction = op.restricted(unit) if self._polynomial() else None
        if restriction is not None:
            op, unit = restriction.operator, restriction.vector
        iterate = self._iterate(op, unit, state)
        if not bool(torch.isfinite(iterate.value).all()):
            iterate = Iterate(torch.zeros_like(unit), status="diverged", measured=1.0)
        value, residual = iterate.value, iterate.measured
        found = residual
        if residual is None:
            value, residual, found = self._no_worse_than_zero(op, unit, iterate)
        assert found is not None
        if restriction is not None:
            value = restriction.lift(value)
        return _Checked(iterate, value, residual, found)

    def _no_worse_than_zero(
        self, op: LinearOperator, unit: Tensor, iterate: Iterate
    ) -> tuple[Tensor, float, float]:
        """The better of value and fallback, shortened where it must be; both its residuals."""
        value, image = iterate.value, self._damped(op, iterate.value)
        residual = float(torch.linalg.vector_norm(image - unit))
        trusted = 1.0 if iterate.recursed is None else min(1.0, 1.1 * iterate.recursed)
        if iterate.fallback is not None and not residual <= trusted:
            other = self._damped(op, iterate.fallback)
            fallen = float(torch.linalg.vector_norm(other - unit))
            if not residual <= fallen:
                value, image, residual = iterate.fallback, other, fallen
        found = residual
        if self.shorten and residual > 1 + 10 * torch.finfo(unit.dtype).eps:
            # ‖α(C+δI)v − g‖ is smallest at this α, and below 1 from 0 to twice that.
            size, along = float(image @ image), float(image @ unit)
            shorter = along / size if size > 0 else 0.0
            factor = 2.0 ** math.floor(math.log2(shorter)) if shorter > 0 else 0.0
            value = value * factor
            residual = float(torch.linalg.vector_norm(image * factor - unit))
            if not residual <= 1:
                value, residual = torch.zeros_like(value), 1.0
        return value, residual, found

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

    def _solved_within(self, iterate: Iterate, value: Tensor) -> float:
        """The residual that rounding and the pseudo-inverse may leave of a system that is solved.

        A direct method takes the operator for a symmetric matrix; of another one it solves nothing.
        """
        eps = torch.finfo(value.dtype).eps
        return max(1e-6, 10 * float(eps**0.5)) + 10 * self._rounding(value, iterate)

    def _announce(self, op: LinearOperator) -> None:  # noqa: B027
        """Tell the operator how many single products may follow; by default nothing is known."""

    def _damped(self, op: LinearOperator, vector: Tensor) -> Tensor:
        return torch.add(op @ vector, vector, alpha=self.damping)

    def _rounding(self, value: Tensor, iterate: Iterate) -> float:
        """Of a residual: it is a difference of rounded vectors, (C + δI)v and one of norm 1."""
        norm = float(torch.linalg.vector_norm(value))
        return 10 * torch.finfo(value.dtype).eps * (1 + (iterate.scale + self.damping) * norm)

    def _error_bound(
        self, op: LinearOperator, residual: float, value: Tensor, iterate: Iterate, status: Status
    ) -> float | None:
        claimed = op.smallest_eigenvalue
        if op.positive_semidefinite:
            refuted = iterate.lowest < -1e2 * torch.finfo(value.dtype).eps * iterate.scale
            if refuted or status in ("negative_curvature", "diverged"):
                claimed = None
        known = [s for s in (iterate.smallest_eigenvalue, claimed) if s is not None]
        if not known or max(known) + self.damping <= 0:
            return None
        return (residual + self._rounding(value, iterate)) / (max(known) + self.damping)


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

    def _solved_within(self, iterate: Iterate, value: Tensor) -> float:
        return math.inf  # `rtol` has judged
