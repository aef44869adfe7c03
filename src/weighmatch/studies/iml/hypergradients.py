"""The hypergradient of one method at the end of the last T steps of inner training."""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from weighmatch.implicit import (
    Dense,
    Exact,
    LinearOperator,
    Method,
    Neumann,
    Parameters,
    State,
    darts_gradient,
    extreme_eigenvalues,
    implicit_gradient,
    sama_gradient,
    unrolled_gradient,
)
from weighmatch.implicit.exact import solve_symmetric
from weighmatch.implicit.method import Iterate
from weighmatch.studies.iml.settings import Training
from weighmatch.studies.memory import peak_memory
from weighmatch.studies.methods import get_method
from weighmatch.studies.minimise import LARGEST_NEWTON
from weighmatch.studies.problems import BilevelProblem

# Costs in gradients of the inner loss, as measured on an MLP by `benchmarks.ihvp_peers`: the same
# on every machine, so that two runs give the same table.
COST_OF_A_PRODUCT = 1.2
COST_OF_AN_OPERATOR = 1.5  # the graph that its products go through
COST_OF_THE_MIXED_PRODUCT = 3.0  # a gradient, its graph, and one pass back through it
COST_OF_AN_UNROLLED_STEP = 4.0  # the step, its graph, and the way back
PRODUCTS_OF_A_PROBE = 6  # that λ_max is found with
COST_OF_A_PROBE = COST_OF_AN_OPERATOR + PRODUCTS_OF_A_PROBE * COST_OF_A_PRODUCT
# SAMA's decay of the running mean of squared gradients is Adam's (Kingma & Ba, 2015).
SECOND_MOMENT_DECAY = 0.999


@dataclass(frozen=True)
class Estimate:
    """A hypergradient, like φ; its cost in inner gradients; the solver's residual, if any."""

    gradient: Parameters
    cost: float
    residual: float = math.nan
    status: str = ""


@dataclass
class Descent:
    """Where inner training is.

    Attributes:
        params: θ.
        velocity: momentum of θ.
        history: θ and the mini-batch of each of the last T steps.
        moment: running sum of squared gradients, weighted as Adam's; only SAMA has it.
        taken: number of steps that `moment` sums over.
    """

    params: Parameters
    velocity: Parameters
    history: list[tuple[Parameters, Tensor | None]] = field(default_factory=list)
    moment: Parameters = field(default_factory=dict)
    taken: int = 0

    @classmethod
    def begin(cls, params: Parameters) -> "Descent":
        zeros = {k: torch.zeros_like(p) for k, p in params.items()}
        return cls(params, zeros, moment=zeros)


class Hypergradients:
    """The hypergradients of one method on one problem.

    Args:
        problem: the bilevel problem.
        training: names the method, its budget, its damping and its curvature.

    Attributes:
        state: what one solve leaves to the next: λ_max and sketches.
    """

    def __init__(self, problem: BilevelProblem, training: Training) -> None:
        self.problem, self.training = problem, training
        self.method = get_method(training.method)
        self.state: State = {}

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """A mini-batch of inner examples; None for all of them."""
        size = self.training.batch
        if size is None or size >= self.problem.examples:
            return None
        return torch.randperm(self.problem.examples, generator=generator)[:size]

    def estimate(
        self, hyper: Parameters, inner: Descent, rate: float, generator: torch.Generator
    ) -> Estimate:
        """The hypergradient at θ.

        Args:
            hyper: φ.
            inner: θ, and the steps that led there.
            rate: step α of inner descent.
            generator: draws mini-batches.
        """
        problem, training, params = self.problem, self.training, inner.params
        rows = self.draw(generator)
        others = rows if training.shared_batch else self.draw(generator)
        share = 1.0 if rows is None else len(rows) / problem.examples
        outer = len(problem.digits.outer_labels) / problem.examples

        def loss(p: Parameters, h: Parameters) -> Tensor:
            return problem.inner(p, h, rows)

        if training.method == "unrolled":
            past = inner.history[-training.budget :]
            found = _unroll(problem, past, hyper, rate)
            return Estimate(found, outer + COST_OF_AN_UNROLLED_STEP * len(past) * share)
        if training.method in ("darts", "sama"):
            bilevel = (loss, problem.outer, params, hyper)
            if training.method == "darts":
                found = darts_gradient(*bilevel, learning_rate=rate)
            else:
                # What SAMA (Choe et al., 2023) takes from an inner optimiser Adam. For plain
                # descent, as here, its own adaptation is the identity, and it is "darts" but for
                # scale.
                unbiased = 1 - SECOND_MOMENT_DECAY**inner.taken
                moment = {k: m / unbiased for k, m in inner.moment.items()}
                found = sama_gradient(*bilevel, learning_rate=rate, second_moment=moment)
            return Estimate(found, outer + 2 * share)

        operator = self._operator(params, hyper, others)
        spent = operator.products
        solver = self._solver(operator, hyper, rate)
        found, solution = implicit_gradient(
            loss, problem.outer, params, hyper, solver, lambda *_: operator, self.state
        )
        products = COST_OF_A_PRODUCT * (operator.products - spent)
        cost = outer + share * (COST_OF_AN_OPERATOR + COST_OF_THE_MIXED_PRODUCT + products)
        return Estimate(found, cost, solution.residual, solution.status)

    def _operator(
        self, params: Parameters, hyper: Parameters, rows: Tensor | None
    ) -> LinearOperator:
        problem, curvature = self.problem, self.training.curvature
        if self.training.method == "exact" or self.in_closed_form():
            matrix = problem.matrix(params, hyper, rows, curvature)
            return CountedMatrix(matrix, positive_semidefinite=curvature == "gauss_newton")
        if self.method.operator == "fisher":
            return problem.fisher(params, hyper, rows)
        if self.method.operator == "factors":
            return problem.layers(params, hyper, rows)
        if curvature == "gauss_newton":
            return problem.gauss_newton(params, hyper, rows)
        return problem.hessian(params, hyper, rows)

    def in_closed_form(self) -> bool:
        """Whether the matrix takes less time than the products that a method asks for.

        The same vectors to rounding, and the same number of products to be counted.
        """
        return (
            self.method.budgeted
            and self.training.dtype == "float64"
            and not self.problem.size.normalised
            and sum(p.numel() for p in self.problem.initial.values()) <= LARGEST_NEWTON
        )

    def _solver(self, operator: LinearOperator, hyper: Parameters, rate: float) -> Method:
        """The method, with its δ."""
        training, damping = self.training, 0.0
        if training.damping:
            if "scale" not in self.state:
                self.state["scale"] = largest_eigenvalue(operator)
            damping = training.damping * max(self.state["scale"], 0.0)
        if self.method.operator != "curvature":
            damping += self.problem.mean_decay(hyper)  # these see the data term alone, not L2
        if training.method == "exact":
            return factored_exact(damping)
        if training.method == "neumann" and training.neumann_step:
            return Neumann(
                damping=damping, max_products=training.budget, step=rate, extrapolate=False
            )
        return self.method.build(damping, training.budget)


def _unroll(
    problem: BilevelProblem,
    past: list[tuple[Parameters, Tensor | None]],
    hyper: Parameters,
    rate: float,
) -> Parameters:
    """The hypergradient through the steps that the training took itself."""

    def step(p: Parameters, h: Parameters, t: int) -> Parameters:
        value = problem.inner(p, h, past[t][1])
        slopes = torch.autograd.grad(value, list(p.values()), create_graph=True)
        return {k: q - rate * s for (k, q), s in zip(p.items(), slopes, strict=True)}

    found: Parameters = unrolled_gradient(step, past[0][0], hyper, problem.outer, len(past))
    return found


def largest_eigenvalue(operator: LinearOperator) -> float:
    """λ_max, by `PRODUCTS_OF_A_PROBE` products."""
    return extreme_eigenvalues(operator, products=PRODUCTS_OF_A_PROBE)[1]


def gradient_memory(problem: BilevelProblem, training: Training) -> int:
    """Peak of the bytes that one hypergradient takes, at the initial parameters."""
    hyper, generator = problem.hyperparameters(), torch.Generator().manual_seed(0)
    steps = min(training.budget, training.inner_steps)
    history: list[tuple[Parameters, Tensor | None]] = [(problem.initial, None)] * steps
    inner = replace(Descent.begin(problem.initial), history=history, taken=1)

    def call(budget: int) -> object:
        made = Hypergradients(problem, replace(training, budget=budget))
        made.state["scale"] = 1.0  # what finds λ_max is no part of the method
        return made.estimate(hyper, inner, 1e-3, generator)

    call(min(training.budget, 4))  # what torch allocates once and keeps is not the method's
    return peak_memory(partial(call, training.budget))


@dataclass(frozen=True, kw_only=True)
class _FactoredExact(Exact):  # a name with an underscore registers no method
    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        matrix = op.dense()
        damped = matrix.double().clone()
        damped.diagonal().add_(self.damping)
        factor, indefinite = torch.linalg.cholesky_ex(damped)
        pivots = factor.diagonal()
        if not indefinite and float(pivots.min()) > 1e-5 * float(pivots.max()):
            value = torch.cholesky_solve(unit.double().unsqueeze(1), factor).squeeze(1)
            return Iterate(value.to(unit.dtype), status="converged")
        value, singular = torch.linalg.solve_ex(damped, unit.double())
        # Near singularity Exact leaves directions out.
        if singular or not float((damped @ value - unit).norm()) < 1e-8:
            return solve_symmetric(matrix, unit, self.damping)
        return Iterate(value.to(unit.dtype), status="negative_curvature")


def factored_exact(damping: float = 0.0) -> Exact:
    """`Exact`, but by triangular factors where they say enough: a tenth to a third of the time."""
    return _FactoredExact(damping=damping)


class CountedMatrix(Dense):
    """A matrix whose products cost what they cost where it is not known, the matrix itself P."""

    @property
    def smallest_eigenvalue(self) -> float | None:
        """What is known of it without its spectrum; may be set."""
        return 0.0 if self.positive_semidefinite else self._smallest_eigenvalue

    @smallest_eigenvalue.setter
    def smallest_eigenvalue(self, value: float | None) -> None:
        self._smallest_eigenvalue = value

    def dense(self, block_size: int = 128) -> Tensor:
        self.products += len(self.matrix)
        return self.matrix
