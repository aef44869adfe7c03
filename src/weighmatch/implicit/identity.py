"""v = g: the curvature is taken to be the identity (T1–T2; Luketina et al., 2016; DARTS, 2019)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from weighmatch.implicit.method import Iterate, Method, State
from weighmatch.implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class Identity(Method):
    """No curvature at all; spends one product, on the check of the residual.

    Where v = g is worse than zero, it is shortened by a power of two; `shorten=False` keeps it.
    The status is "budget" unless C + δI really is the identity.
    """

    approximate: ClassVar[bool] = True

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        return Iterate(unit.clone())
