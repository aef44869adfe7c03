"""How near do the IHVP methods come to the exact one, at what cost, and how steadily?

Every method solves (C + (λ + δ) I) v = ∇L_outer at points of a training; the hypergradient is
that of the weights of `weighmatch.studies.weighing`. C is the Hessian of the data term, or the
Gauss-Newton matrix for networks with normalisation and large ones.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.implicit import (
    KFAC,
    Chebyshev,
    ConjugateGradient,
    Diagonal,
    GaussNewton,
    Hessian,
    Identity,
    Method,
    MinRes,
    Neumann,
    Nystrom,
    Parameters,
    Solution,
    Woodbury,
    darts_gradient,
    low_rank,
    sama_gradient,
    unrolled_gradient,
    weight_gradient,
)
from weighmatch.studies.config import StudyConfig
from weighmatch.studies.memory import peak_memory
from weighmatch.studies.weighing import Point, WeighingProblem, build, gradient

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """Where and how the methods are compared.

    Attributes:
        point: of training.
        damping_ratio: δ/λ_max.
        dtype: of the solve; the reference is always in double precision.
        rows: of the inner images that the curvature is taken on; None: all.
        batch: number of the mini-batch, −1 for all images.
        budgets: of the methods.
    """

    point: Point
    damping_ratio: float
    budgets: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    rows: Tensor | None = None
    batch: int = -1


@dataclass(frozen=True)
class Reference:
    """The exact inverse of C + dI for any d, from eigenpairs: (P, k) and (k,)."""

    vectors: Tensor
    eigenvalues: Tensor
    seconds: float

    @classmethod
    def of(cls, op: Hessian | GaussNewton) -> "Reference":
        """By a dense eigendecomposition, or from the factor of a Gauss-Newton matrix."""
        started = time.perf_counter()
        if isinstance(op, GaussNewton):
            vectors, eigenvalues = low_rank.eigenpairs(op.factor()[0])
        else:
            eigenvalues, vectors = torch.linalg.eigh(op.dense())
        return cls(vectors, eigenvalues, time.perf_counter() - started)

    def solve(self, rhs: Tensor, damping: float) -> Tensor:
        coordinates, rest = low_rank.split(self.vectors, rhs)
        solved = self.vectors @ (coordinates / (self.eigenvalues + damping))
        if self.vectors.shape[1] < len(rhs):
            solved = solved + rest / damping
        return solved

    @property
    def largest(self) -> float:
        return float(self.eigenvalues.max())

    @property
    def smallest(self) -> float:
        """Of C; 0 where eigenpairs were left out."""
        complete = self.vectors.shape[1] == self.vectors.shape[0]
        return float(self.eigenvalues.min()) if complete else 0.0


@dataclass(frozen=True)
class Attempt:
    """What a method gave: v if it computes one, the hypergradient (n,), the solver's account."""

    hypergradient: Tensor
    value: Tensor | None = None
    solution: Solution | None = None


def compare_methods(
    images: NDArray[np.uint8], labels: NDArray[np.int64], config: StudyConfig, name: str, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All cells of one network and seed.

    Args:
        images: digits, (N, 1, 8, 8).
        labels: theirs, (N,).
        config: what is compared.
        name: of the network.
        seed: of everything drawn.

    Returns:
        A row a solve: `network`, `parameters` (P), `seed`, `curvature`, `stage`, `progress`, `l2`,
        `damping_ratio` (δ/λ_max), `dtype`, `batch` (−1: all inner images), `method`,
        `max_products`, `products`, `status`, `residual`, `ihvp_error`, `ihvp_cosine`,
        `hypergradient_error`, `hypergradient_cosine` (relative errors and cosines, against the
        exact solve in double precision on all images), `error_bound` and `true_error` (against
        the exact solve of the same system, both relative to ‖∇L_outer‖), `seconds`,
        `gradients` (seconds over those of one inner gradient, same run), `memory` (peak of the
        solve in parameter vectors, where it was measured), `condition` (of the exact system) and
        `inner_gradient` (norm).
        And the spectra: `network`, `seed`, `stage`, `l2`, `eigenvalue` (of C), one row each.
    """
    rows: list[dict[str, Any]] = []
    spectra: list[pd.DataFrame] = []
    for l2 in config.l2:
        problem = build(name, images, labels, config, l2, seed)
        is_base_l2 = l2 == config.l2[0]
        points = problem.train(config)
        last = max(points, key=lambda point: (point.stage == 1.0, point.progress))
        if not (is_base_l2 or config.all_combinations):
            points = [last]
        for point in points:
            operator = _curvature(problem, config, point.params, None)
            reference = Reference.of(operator)
            if is_base_l2:
                spectra.append(_spectrum(problem, point, reference, seed))
            for cell in _cells(problem, config, point, point is last, is_base_l2, seed):
                rows += _solve_cell(problem, config, cell, reference, operator, seed)
    return pd.DataFrame(rows), pd.concat(spectra, ignore_index=True)


def _cells(
    problem: WeighingProblem,
    config: StudyConfig,
    point: Point,
    is_last: bool,
    is_base_l2: bool,
    seed: int,
) -> Iterator[Cell]:
    base, *others = config.dampings
    cross = config.all_combinations
    middle = (config.budgets[len(config.budgets) // 2],)
    yield Cell(point, base, config.budgets)
    for damping in others if cross or (is_last and is_base_l2) else []:
        yield Cell(point, damping, config.budgets)
    if not (is_last and is_base_l2):
        return
    yield Cell(point, base, middle, dtype=torch.float32)
    rng = np.random.default_rng([seed, 7])
    for batch in range(config.batches):
        drawn = rng.choice(config.inner, config.batch_size, replace=False)
        yield Cell(point, base, middle, rows=torch.from_numpy(drawn), batch=batch)


def _curvature(
    problem: WeighingProblem, config: StudyConfig, params: Parameters, rows: Tensor | None
) -> Hessian | GaussNewton:
    if problem.has_minimum and problem.size <= config.largest_dense:
        return problem.hessian(params, rows)
    return problem.gauss_newton(params, rows)


def _spectrum(
    problem: WeighingProblem, point: Point, reference: Reference, seed: int
) -> pd.DataFrame:
    values = reference.eigenvalues.flip(0) if reference.smallest < 0 else reference.eigenvalues
    # The eigenvalues that a factor of low rank leaves out are zero.
    missing = problem.size - len(values)
    padded = torch.cat([values, values.new_zeros(missing)]).sort().values
    return pd.DataFrame(
        {
            "network": problem.name,
            "seed": seed,
            "stage": str(point.stage),
            "l2": problem.l2,
            "eigenvalue": padded.numpy(),
        }
    )


def _solve_cell(
    problem: WeighingProblem,
    config: StudyConfig,
    cell: Cell,
    reference: Reference,
    full: Hessian | GaussNewton,
    seed: int,
) -> list[dict[str, Any]]:
    point = cell.point
    damping = problem.l2 + cell.damping_ratio * reference.largest
    exact = reference.solve(problem.outer_gradient(point.params), damping)
    exact_hyper = weight_gradient(problem.example_losses, point.params, exact)
    weights = torch.ones(len(problem.labels), dtype=cell.dtype)
    params = {name: p.to(cell.dtype) for name, p in point.params.items()}
    rhs = problem.outer_gradient(params)
    plain = cell.rows is None and cell.dtype == torch.float64
    op = full if plain else _curvature(problem, config, params, cell.rows)
    smallest, largest = reference.smallest + damping, reference.largest + damping

    def inner_gradient() -> Tensor:
        return gradient(lambda p: problem.inner(p, weights), params)

    gradient_seconds = min(_timed(inner_gradient)[1] for _ in range(7))
    common = {
        "network": problem.name,
        "parameters": problem.size,
        "seed": seed,
        "curvature": "hessian" if isinstance(op, Hessian) else "gauss_newton",
        "stage": str(point.stage),
        "progress": point.progress,
        "l2": problem.l2,
        "damping_ratio": cell.damping_ratio,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "batch": cell.batch,
        "condition": largest / smallest if smallest > 0 else np.nan,
        "inner_gradient": float(inner_gradient().norm()),
    }
    if smallest > 0 and plain:
        # What a certificate needs is known here; in practice it comes from `lower_bound`.
        op.smallest_eigenvalue = reference.smallest
    # It depends on method and budget alone.
    bases = (config.seeds[0], 1.0, config.l2[0], config.dampings[0])
    measure_memory = plain and (seed, point.stage, problem.l2, cell.damping_ratio) == bases
    rows = []
    for method, budget, call in _attempts(problem, cell, op, rhs, params, damping, largest):
        attempt, seconds = _timed(call)
        # A certificate is for the system that was solved, and these two solve another one.
        certified = plain and method not in ("gauss_newton_cg", "woodbury_fisher")
        solution = attempt.solution
        value = attempt.value
        row = {
            **common,
            "method": method,
            "max_products": budget,
            "products": solution.products if solution else None,
            "status": solution.status if solution else None,
            "residual": solution.residual if solution else None,
            "ihvp_error": None if value is None else _relative_error(value, exact),
            "ihvp_cosine": None if value is None else _cosine(value, exact),
            "hypergradient_error": _relative_error(attempt.hypergradient, exact_hyper),
            "hypergradient_cosine": _cosine(attempt.hypergradient, exact_hyper),
            "error_bound": solution.error_bound if solution and certified else None,
            "true_error": float((value - exact).norm() / rhs.norm())
            if value is not None and plain
            else None,
            "seconds": seconds,
            "gradients": seconds / gradient_seconds,
            "memory": peak_memory(call) / (problem.size * cell.dtype.itemsize)
            if measure_memory
            else None,
        }
        rows.append(row)
    if plain:
        rows.append(
            {
                **common,
                "method": "exact",
                "max_products": problem.size,
                "products": problem.size,
                "status": "converged",
                "residual": 0.0,
                "ihvp_error": 0.0,
                "ihvp_cosine": 1.0,
                "hypergradient_error": 0.0,
                "hypergradient_cosine": 1.0,
                "seconds": reference.seconds,
                "gradients": reference.seconds / gradient_seconds,
            }
        )
    return rows


def _attempts(
    problem: WeighingProblem,
    cell: Cell,
    op: Hessian | GaussNewton,
    rhs: Tensor,
    params: Parameters,
    damping: float,
    largest: float,
) -> Iterator[tuple[str, int, Callable[[], Attempt]]]:
    """Name, budget and what computes it, for every method."""

    def ihvp(method: Method, operator: Hessian | GaussNewton = op) -> Callable[[], Attempt]:
        def call() -> Attempt:
            solution = method.solve(operator, rhs)
            return _attempt(problem, params, solution)

        return call

    yield "identity", 1, ihvp(Identity(damping=damping))
    for budget in cell.budgets:
        for name, method in iterative_methods(damping, budget):
            yield name, budget, ihvp(method)
    yield (
        "woodbury_fisher",
        len(problem.labels),
        lambda: _on_fisher(problem, cell, params, rhs, damping),
    )
    needs_layers = op if isinstance(op, GaussNewton) else problem.gauss_newton(params, cell.rows)
    yield "kfac", 1, ihvp(KFAC(damping=damping, factors=needs_layers))
    yield "ekfac", 1, ihvp(KFAC(damping=damping, factors=needs_layers, eigenvalue_corrected=True))
    if isinstance(op, Hessian):
        for budget in cell.budgets:
            method = ConjugateGradient(damping=damping, max_products=budget, rtol=1e-12)
            yield "gauss_newton_cg", budget, ihvp(method, needs_layers)
    if cell.rows is not None:
        return
    weights = torch.ones(len(problem.labels), dtype=cell.dtype)
    yield (
        "darts",
        1,
        lambda: Attempt(
            darts_gradient(problem.inner, problem.outer, params, weights, learning_rate=1 / largest)
        ),
    )
    moment = {name: m.to(cell.dtype) for name, m in cell.point.second_moment.items()}
    yield (
        "sama",
        1,
        lambda: Attempt(
            sama_gradient(
                problem.inner,
                problem.outer,
                params,
                weights,
                learning_rate=1e-2,
                second_moment=moment,
            )
        ),
    )
    for budget in cell.budgets:
        yield "unrolled", budget, _unrolled(problem, params, weights, damping, largest, budget)


def iterative_methods(damping: float, budget: int) -> list[tuple[str, Method]]:
    """Those that spend up to `budget` products, under the names of the tables."""
    shared: dict[str, Any] = {"damping": damping, "max_products": budget, "rtol": 1e-12}
    rank = max(1, budget - 3)
    sketch = Nystrom(rank=max(1, budget // 2))
    return [
        ("neumann", Neumann(**shared, extrapolate=False)),
        ("neumann_extrapolated", Neumann(**shared)),
        ("chebyshev", Chebyshev(**shared)),
        ("conjugate_gradient", ConjugateGradient(**shared)),
        ("minres", MinRes(**shared)),
        ("nystrom", Nystrom(damping=damping, rank=rank)),
        ("nystrom_plain", Nystrom(damping=damping, rank=rank + 2, complement="damping")),
        ("nystrom_cg", ConjugateGradient(**shared, preconditioner=sketch)),
        ("diagonal", Diagonal(damping=damping, probes=budget - 1)),
    ]


def _attempt(problem: WeighingProblem, params: Parameters, solution: Solution) -> Attempt:
    hyper = weight_gradient(problem.example_losses, params, solution.value)
    return Attempt(hyper, solution.value, solution)


def _on_fisher(
    problem: WeighingProblem, cell: Cell, params: Parameters, rhs: Tensor, damping: float
) -> Attempt:
    """The empirical Fisher is made anew: its gradients of single examples are the cost."""
    op = problem.empirical_fisher(params, cell.rows)
    return _attempt(problem, params, Woodbury(damping=damping).solve(op, rhs))


def _unrolled(
    problem: WeighingProblem,
    params: Parameters,
    weights: Tensor,
    damping: float,
    largest: float,
    steps: int,
) -> Callable[[], Attempt]:
    """Gradient descent from θ on the inner loss with the system's damping as proximal term."""
    extra = (damping - problem.l2) / 2
    centre = {name: p.detach() for name, p in params.items()}

    def loss(theta: Parameters, hyper: Tensor) -> Tensor:
        pull = torch.stack([(p - centre[name]).square().sum() for name, p in theta.items()]).sum()
        return problem.inner(theta, hyper) + extra * pull

    def step(theta: Parameters, hyper: Tensor) -> Parameters:
        gradients = torch.autograd.grad(loss(theta, hyper), list(theta.values()), create_graph=True)
        return {
            name: p - g / largest for (name, p), g in zip(theta.items(), gradients, strict=True)
        }

    return lambda: Attempt(unrolled_gradient(step, params, weights, problem.outer, steps))


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def _cosine(value: Tensor, reference: Tensor) -> float:
    return float(F.cosine_similarity(value.double(), reference, dim=0))
