"""What one training of implicit meta-learning is given."""

import math
from dataclasses import dataclass
from typing import Literal

from weighmatch.checks import require_choice, require_integer, require_number
from weighmatch.studies.methods import require_method


@dataclass(frozen=True)
class Training:
    """One IML training.

    Attributes:
        method: name of a row of `weighmatch.studies.methods`.
        budget: products of an iterative method, or unrolled steps.
        curvature: which matrix is inverted.
        damping: δ/λ_max on top of what L2 adds.
        outer_steps: number of updates of φ.
        inner_steps: T.
        converge: minimise the inner loss anew for every φ instead of T steps.
        step: α·λ_max of inner gradient descent, with λ_max at the start.
        automatic_step: measure λ_max again before every T steps, and keep α·λ_max at 1 where
            `step` is larger.
        neumann_step: α of the Neumann series is that of inner training (True) or automatic.
        momentum: momentum of inner training.
        batch: number of inner images in a mini-batch; None: all.
        shared_batch: the curvature and the mixed derivative are taken on one mini-batch.
        frozen_statistics: batch normalisation is in eval mode while the hypergradient is computed.
        outer_rule: how φ moves.
        outer_rate: learning rate of φ; None: the problem's own (for Adam).
        outer_factor: multiplies `outer_rate`.
        normalise: divide every hypergradient by its norm.
        average: weight of the past in a running mean of hypergradients; 0: none.
        backtrack: share by which the outer loss, on outer images, may exceed the smallest so far
            after training on with a new φ. Beyond it θ, φ and the outer optimiser go back to
            where the update was made, and the outer rate is halved (a trust region: what moves
            φ too far is taken back rather than foreseen); None: every update stays.
        renew: number of outer steps after which λ_max and sketches are computed anew.
        dtype: precision of parameters and images.
        diagnose: every how many outer steps the hypergradient is compared with the exact one;
            0: never.
        retrain: find θ*(φ) from the initial parameters at these steps as well.
    """

    method: str = "conjugate_gradient"
    budget: int = 20
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    damping: float = 0.01
    outer_steps: int = 40
    inner_steps: int = 20
    converge: bool = False
    step: float = 1.0
    automatic_step: bool = True
    neumann_step: bool = False
    momentum: float = 0.0
    batch: int | None = None
    shared_batch: bool = True
    frozen_statistics: bool = True
    outer_rule: Literal["adam", "sgd"] = "adam"
    outer_rate: float | None = None
    outer_factor: float = 1.0
    normalise: bool = False
    average: float = 0.0
    backtrack: float | None = None
    renew: int = 1
    dtype: Literal["float64", "float32", "bfloat16"] = "float64"
    diagnose: int = 0
    retrain: bool = False

    def __post_init__(self) -> None:
        require_method("method", self.method)
        for name, choices in (
            ("curvature", ("hessian", "gauss_newton")),
            ("outer_rule", ("adam", "sgd")),
            ("dtype", ("float64", "float32", "bfloat16")),
        ):
            require_choice(name, getattr(self, name), choices)
        for name, low in (("budget", 2), ("outer_steps", 1), ("inner_steps", 1), ("diagnose", 0)):
            require_integer(name, getattr(self, name), low)
        if self.batch is not None:
            require_integer("batch", self.batch, 1)
        require_number("step", self.step, 0, math.inf, above=True)
        require_number("damping", self.damping, 0, math.inf)
        require_number("average", self.average, 0, 1)
        if self.method == "unrolled" and not self.converge and self.budget > self.inner_steps:
            raise ValueError(
                f"unrolled differentiation goes through the last inner steps: budget must be at "
                f"most inner_steps ({self.inner_steps}), got {self.budget}"
            )
        if self.backtrack is not None:
            require_number("backtrack", self.backtrack, 0, math.inf)
        if self.method == "sama" and self.converge:
            raise ValueError(
                "sama takes a mean of squared gradients over inner steps: converge must be false"
            )
        if self.method == "unrolled" and self.momentum:
            raise ValueError("unrolled differentiation is of plain descent: momentum must be 0")
