"""The truncated Neumann series (Lorraine, Vicol & Duvenaud, 2020, eq. 5 and algorithm 3)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weighmatch.implicit.method import Iterate, State
from weighmatch.implicit.operators import LinearOperator
from weighmatch.implicit.probing import Ends, _ProbingMethod


@dataclass(frozen=True, kw_only=True)
class Neumann(_ProbingMethod):
    """v_{k+1} = v_k + α (g − (C+δI) v_k): converges for 0 < α < 2/(λ_max+δ) and PSD C.

    Where the residual grows, an α that was given is too long, and the status is "diverged". With
    "auto" λ_max is probed again and the series goes on from its best iterate; where the probe
    meets an eigenvalue below −δ, the status is "negative_curvature".

    Attributes:
        step: α, or "auto" for 1/(λ_max+δ) with λ_max from a short Lanczos run, which a
            `state` keeps for later calls.
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
        ends = None if self.step != "auto" else self._ends(op, unit, state, self.max_products - 2)
        step = self._length(op, ends)
        if not math.isfinite(step):
            return Iterate(torch.zeros_like(unit), status="diverged")
        value = step * unit
        residual, previous = torch.empty_like(unit), unit.clone()
        # None: the value at hand is the best. It is kept apart only when it stops being so, since
        # a copy at every step would cost as much as the step.
        best: Tensor | None = torch.zeros_like(unit)
        best_norm = 1.0
        left = self.max_products - (op.products - before)
        # Whether `previous` is the residual of the value one step before.
        chained = True
        while True:
            torch.sub(unit, op @ value, out=residual)
            if self.damping > 0:
                residual.sub_(value, alpha=self.damping)
            norm = float(torch.linalg.vector_norm(residual))
            left -= 1
            if not norm <= 1.05 * best_norm + torch.finfo(unit.dtype).eps:
                # A residual that grows means α(λ_max+δ) > 2 or negative curvature.
                if best is None:
                    best = value.sub_(previous, alpha=step)
                spent = op.products
                more = "diverged" if ends is None else self._again(op, residual, ends, state, left)
                if isinstance(more, str):
                    return Iterate(best, status=more, measured=best_norm, scale=1 / step)
                ends, step = more, self._length(op, more)
                left -= op.products - spent
                value, chained = best.clone(), False
                continue
            if norm < best_norm:
                best, best_norm = None, norm
            elif best is None:
                best = value.sub(previous, alpha=step)
            if left == 0 or norm <= self.rtol:
                break
            value.add_(residual, alpha=step)
            residual, previous, chained = previous, residual, True
        if self.extrapolate and chained and norm > self.rtol:
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
        lowest = 0.0 if ends is None else ends.lowest
        found = value if best is None else best
        return Iterate(found, measured=best_norm, scale=1 / step, lowest=lowest)

    def _length(self, op: LinearOperator, ends: Ends | None) -> float:
        """The step α."""
        if ends is None:
            assert self.step != "auto"
            return float(self.step)
        return 1 / max(ends.largest + self.damping, torch.finfo(op.dtype).tiny)
