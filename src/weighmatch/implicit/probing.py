"""What methods share that need λ_max: where it comes from, and what happens when it is wrong."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weighmatch.implicit.method import State, _IterativeMethod
from weighmatch.implicit.operators import LinearOperator
from weighmatch.implicit.spectrum import lanczos

KEY = "largest_eigenvalue"


class LargestEigenvalue(float):
    """λ_max as a state carries it: a number, with the smallest Ritz value of the same probe."""

    smallest: float | None = None


@dataclass(frozen=True)
class Ends:
    """What is known of the ends of the spectrum of C.

    Attributes:
        largest: an estimate of λ_max; NaN where a product was not finite.
        smallest: the smallest Ritz value, which lies above λ_min; None where there was no probe.
    """

    largest: float
    smallest: float | None = None

    @property
    def lowest(self) -> float:
        """The smallest Ritz value if it is negative, or 0."""
        return min(0.0, self.smallest or 0.0)


@dataclass(frozen=True, kw_only=True)
class _ProbingMethod(_IterativeMethod):
    """An iterative method that needs λ_max.

    Attributes:
        probe_products: length of the Lanczos run that finds it; at most half of the budget is
            spent on it. A `state` carries it to later calls. Where an iteration grows, λ_max
            was too small: it is probed again, within the budget, and the iteration goes on.
    """

    probe_products: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe_products < 1:
            raise ValueError(f"probe_products must be at least 1, got {self.probe_products}")

    def _ends(self, op: LinearOperator, unit: Tensor, state: State | None, affordable: int) -> Ends:
        """From the state or from Lanczos."""
        if state is not None and KEY in state:
            kept = state[KEY]
            return Ends(float(kept), getattr(kept, "smallest", None))
        ends = self._probe(op, unit, max(1, affordable // 2))
        self._keep(ends, state)
        return ends

    @staticmethod
    def _keep(ends: Ends, state: State | None) -> None:
        if state is not None and math.isfinite(ends.largest):
            state[KEY] = LargestEigenvalue(ends.largest)
            state[KEY].smallest = ends.smallest

    def _probe(self, op: LinearOperator, start: Tensor, affordable: int) -> Ends:
        run = lanczos(op, start, min(self.probe_products, affordable))
        # Lanczos approaches λ_max from below; its last residual bounds what is missing.
        return Ends(float(run.eigenvalues[-1]) + run.last_residual, float(run.eigenvalues[0]))

    def _again(
        self, op: LinearOperator, grown: Tensor, before: Ends, state: State | None, left: int
    ) -> Ends | Literal["diverged", "negative_curvature"]:
        """New ends, from the residual that grew, or why the iteration cannot go on.

        What grows lies outside of the interval that was believed, so that a Lanczos run from it
        finds it at once.

        Args:
            op: the curvature.
            grown: the residual.
            before: the ends that were believed.
            state: that carries λ_max.
            left: products that are left for the probe and the iteration after it.
        """
        if state is not None:
            state.pop(KEY, None)
        if left < 3 or not bool(torch.isfinite(grown).all()):
            return "diverged"
        ends = self._probe(op, grown, max(1, left // 2))
        if not math.isfinite(ends.largest) or ends.smallest is None:
            return "diverged"
        rounding = 10 * torch.finfo(op.dtype).eps * max(abs(ends.largest), abs(ends.smallest))
        if ends.smallest + self.damping < -rounding:
            return "negative_curvature"
        if not ends.largest > 1.001 * before.largest:
            return "diverged"
        self._keep(ends, state)
        return ends
