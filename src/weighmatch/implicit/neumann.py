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
    """

    step: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step != "auto" and not (isinstance(self.step, int | float) and self.step > 0):
            raise ValueError(f'step must be "auto" or a number > 0, got {self.step!r}')

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        before = op.products
        budget = self.max_products - 1
        step = self._step(op, unit, state, budget - 1)
        if not math.isfinite(step):
            return Iterate(torch.zeros_like(unit), status="diverged")
        value = step * unit
        best_value, best_norm = torch.zeros_like(unit), 1.0
        for _ in range(budget - (op.products - before)):
            residual = unit - self._damped(op, value)
            norm = float(torch.linalg.vector_norm(residual))
            if not norm <= 1.05 * best_norm + torch.finfo(unit.dtype).eps:
                # A residual that grows means α(λ_max+δ) > 2 or negative curvature.
                self._forget(state)
                return Iterate(best_value, status="diverged")
            if norm < best_norm:
                best_value, best_norm = value, norm
            if norm <= self.rtol:
                break
            value = value + step * residual
        # The last step is measured by the final check, which keeps to the best before it.
        return Iterate(value, best_measured=(best_value, best_norm), scale=1 / step)

    def _step(
        self, op: LinearOperator, unit: Tensor, state: State | None, affordable: int
    ) -> float:
        if self.step != "auto":
            return float(self.step)
        largest = self._largest_eigenvalue(op, unit, state, affordable)
        return 1 / max(largest + self.damping, torch.finfo(op.dtype).tiny)
