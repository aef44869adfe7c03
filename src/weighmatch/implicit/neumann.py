"""The truncated Neumann series (Lorraine, Vicol & Duvenaud, 2020, eq. 5 and algorithm 3)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weighmatch.implicit.method import Iterate, State, _ProbingMethod
from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class Neumann(_ProbingMethod):
    """v_{k+1} = v_k + α (g − (C+δI) v_k): converges for 0 < α < 2/(λ_max+δ) and PSD C.

    Attributes:
        step: α, or "auto" for 1/(λ_max+δ) with λ_max from a short Lanczos run, which a
            `state` keeps for later calls until the iteration grows.
        extrapolate: lengthen the last step to where the residual is smallest (the first order of
            reduced rank extrapolation, Sidi, 2017). It needs no product, and more than makes up
            for the one that the check of the residual takes; False: the series as published.
    """

    step: float | Literal["auto"] = "auto"
    extrapolate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step != "auto" and not (isinstance(self.step, int | float) and self.step > 0):
            raise ValueError(f'step must be "auto" or a number > 0, got {self.step!r}')

    def _polynomial(self) -> bool:
        return True

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        before = op.products
        step = self._step(op, unit, state, self.max_products - 2)
        if not math.isfinite(step):
            return Iterate(torch.zeros_like(unit), status="diverged")
        value = step * unit
        residual, previous = torch.empty_like(unit), unit.clone()
        # None: the value at hand is the best. It is kept apart only when it stops being so, since
        # a copy at every step would cost as much as the step.
        best: Tensor | None = torch.zeros_like(unit)
        best_norm = 1.0
        left = self.max_products - (op.products - before)
        while True:
            torch.sub(unit, op @ value, out=residual)
            if self.damping > 0:
                residual.sub_(value, alpha=self.damping)
            norm = float(torch.linalg.vector_norm(residual))
            if not norm <= 1.05 * best_norm + torch.finfo(unit.dtype).eps:
                # A residual that grows means α(λ_max+δ) > 2 or negative curvature.
                self._forget(state)
                if best is None:
                    best = value.sub_(previous, alpha=step)
                return Iterate(best, status="diverged", measured=best_norm, scale=1 / step)
            if norm < best_norm:
                best, best_norm = None, norm
            elif best is None:
                best = value.sub(previous, alpha=step)
            left -= 1
            if left == 0 or norm <= self.rtol:
                break
            value.add_(residual, alpha=step)
            residual, previous = previous, residual
        if self.extrapolate and norm > self.rtol:
            # value − (the value before it) = α · previous; residuals are linear in the value.
            change = residual - previous
            size = float(change @ change)
            factor = -float(residual @ change) / size if size > 0 else 0.0
            longer = residual.add(change, alpha=factor)
            shorter = float(torch.linalg.vector_norm(longer))
            # Where the residual hardly changes, its change is rounding, and so would the rest be.
            magnitude = 1 + float(torch.linalg.vector_norm(value)) / step
            rounding = factor * torch.finfo(unit.dtype).eps * magnitude
            if factor > 0 and shorter < best_norm and rounding <= 0.01 * shorter:
                best = value.add(previous, alpha=factor * step)
                best_norm = shorter
        return Iterate(value if best is None else best, measured=best_norm, scale=1 / step)

    def _step(
        self, op: LinearOperator, unit: Tensor, state: State | None, affordable: int
    ) -> float:
        if self.step != "auto":
            return float(self.step)
        largest = self._largest_eigenvalue(op, unit, state, affordable)
        return 1 / max(largest + self.damping, torch.finfo(op.dtype).tiny)
