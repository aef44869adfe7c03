"""The diagonal of the curvature by Hutchinson's probes (Bekas, Kokiopoulou & Saad, 2007)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weighmatch.implicit.carried import carry, fingerprint
from weighmatch.implicit.method import Iterate, Method, State
from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class Diagonal(Method):
    """v = g / (|d| + δ), d = the mean of z ⊙ C z over Rademacher vectors z.

    The absolute value is AdaHessian's (Yao et al., 2021): with few probes an entry of d can be
    negative even where C is positive. Status "budget" unless the residual is small.

    Attributes:
        probes: number of z, one product each. A `state` carries d from call to call, until a
            solve with it is much worse than it was when d was new.
        seed: of the probes.
    """

    approximate: ClassVar[bool] = True
    carries: ClassVar[str | None] = "diagonal"
    probes: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, got {self.probes}")

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        settings = fingerprint(op, self.probes, self.seed)
        diagonal = carry(state, "diagonal", settings, lambda: self._probe(op))
        magnitude = diagonal.abs()
        # An entry that is zero to rounding would blow its coordinate up without δ.
        floor = torch.finfo(unit.dtype).eps * magnitude.max()
        damped = torch.maximum(magnitude, floor) + self.damping
        return Iterate(torch.where(damped > 0, unit / damped, unit))

    def _probe(self, op: LinearOperator) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        total = torch.zeros(op.shape[0], dtype=op.dtype, device=op.device)
        for start in range(0, self.probes, 16):
            count = min(16, self.probes - start)
            signs = torch.randint(0, 2, (op.shape[0], count), generator=generator)
            block = (2 * signs - 1).to(op.device, op.dtype)
            total = total + (block * (op @ block)).sum(dim=1)
        return total / self.probes
