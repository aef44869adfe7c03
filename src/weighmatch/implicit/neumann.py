"""The truncated Neumann series (Lorraine, Vicol & Duvenaud, 2020, eq. 5 and algorithm 3)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weighmatch.implicit.method import Iterate, State, _IterativeMethod
from weighmatch.implicit.operators import LinearOperator
from weighmatch.implicit.spectrum import lanczos


@dataclass(frozen=True, kw_only=True)
class Neumann(_IterativeMethod):
    """v_{k+1} = v_k + α (g − (C+δI) v_k): converges for 0 < α < 2/(λ_max+δ) and PSD C.

    Attributes:
        step: α, or "auto" for 1/(λ_max+δ) with λ_max from a short Lanczos run, which a
            `state` keeps for later calls until the iteration grows.
        probe_products: length of that run.
    """

    step: float | Literal["auto"] = "auto"
    probe_products: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step != "auto" and not (isinstance(self.step, int | float) and self.step > 0):
            raise ValueError(f'step must be "auto" or a number > 0, got {self.step!r}')
        if self.probe_products < 1:
            raise ValueError(f"probe_products must be at least 1, got {self.probe_products}")

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        budget = self.max_products - 1
        step, probed = self._step(op, unit, state, budget - 1)
        if not math.isfinite(step):
            return Iterate(torch.zeros_like(unit), status="diverged")
        value = step * unit
        best_value, best_norm = torch.zeros_like(unit), 1.0
        for _ in range(budget - probed):
            residual = unit - self._damped(op, value)
            norm = float(torch.linalg.vector_norm(residual))
            if not norm <= 1.05 * best_norm + torch.finfo(unit.dtype).eps:
                # A residual that grows means α(λ_max+δ) > 2 or negative curvature.
                if state is not None:
                    state.pop("largest_eigenvalue", None)
                return Iterate(best_value, status="diverged")
            if norm < best_norm:
                best_value, best_norm = value, norm
            if norm <= self.rtol:
                break
            value = value + step * residual
        # The last step is measured by the final check, which keeps to the best before it.
        return Iterate(value, best_measured=(best_value, best_norm))

    def _step(
        self, op: LinearOperator, unit: Tensor, state: State | None, affordable: int
    ) -> tuple[float, int]:
        """α and the products spent on finding it."""
        if self.step != "auto":
            return float(self.step), 0
        floor = torch.finfo(op.dtype).tiny
        if state is not None and "largest_eigenvalue" in state:
            return 1 / max(state["largest_eigenvalue"] + self.damping, floor), 0
        probe = min(self.probe_products, max(1, affordable // 2))
        run = lanczos(op, unit, probe)
        # Lanczos approaches λ_max from below; its last residual bounds what is missing.
        largest = float(run.eigenvalues[-1]) + run.last_residual
        if not math.isfinite(largest):
            return math.nan, run.products
        if state is not None:
            state["largest_eigenvalue"] = largest
        return 1 / max(largest + self.damping, floor), run.products
