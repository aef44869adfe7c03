"""How near do the IHVP methods come to the exact one, at what cost, and how steadily?

Every method solves (C + (λ + δ) I) v = ∇L_outer at points of a training; the hypergradient is
that of the weights of `weighmatch.studies.weighing`. C is the Hessian of the data term, or the
Gauss-Newton matrix for networks with normalisation and large ones.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.implicit import (
    GaussNewton,
    Hessian,
    LinearOperator,
    Parameters,
    Solution,
    darts_gradient,
    low_rank,
    sama_gradient,
    unrolled_gradient,
    weight_gradient,
)
from weighmatch.studies.config import StudyConfig
from weighmatch.studies.kept import finish_jobs
from weighmatch.studies.memory import peak_memory
from weighmatch.studies.methods import HypergradientMethod, all_methods
from weighmatch.studies.weighing import Point, WeighingProblem, build, gradient

T = TypeVar("T")
# Relative residual that iterative methods aim at: their budget ends them first.
RTOL = 1e-12
# A row of the table of the study: a value by the name of its column.
Row = dict[str, Any]
# Columns that say how good a solve was; those of IHVPs alone are empty for other methods.
JUDGED = (
    "products",
    "status",
    "residual",
    "ihvp_error",
    "ihvp_cosine",
    "hypergradient_error",
    "hypergradient_cosine",
    "error_bound",
    "true_error",
)


@dataclass(frozen=True)
class Cell:
    """Where and how the methods are compared.

    Attributes:
        point: the point of the training.
        damping_ratio: δ/λ_max.
        budgets: budgets of the methods that have one.
        dtype: precision of the solves; the reference is always in double precision.
        rows: inner images that the curvature is taken on; None: all.
        batch: number of the mini-batch, −1 for all images.
    """

    point: Point
    damping_ratio: float
    budgets: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    rows: Tensor | None = None
    batch: int = -1

    @property
    def is_plain(self) -> bool:
        """Whether the system is the one that the reference solves."""
        return self.rows is None and self.dtype == torch.float64


@dataclass(frozen=True)
class Reference:
    """The exact inverse of C + dI for any d, from eigenpairs: (P, k) and (k,)."""

    vectors: Tensor
    eigenvalues: Tensor
    seconds: float

    @classmethod
    def of(cls, op: Hessian | GaussNewton) -> "Reference":
        """The inverse of `op`, by eigenpairs of it or of the factor of a Gauss-Newton matrix."""
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
        """The smallest eigenvalue of C; 0 where eigenpairs were left out."""
        complete = self.vectors.shape[1] == self.vectors.shape[0]
        return float(self.eigenvalues.min()) if complete else 0.0


@dataclass(frozen=True)
class Attempt:
    """What a method gave: the hypergradient (n,) and, if it is an IHVP, the solver's account."""

    hypergradient: Tensor
    solution: Solution | None = None


def compare_all(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    config: StudyConfig,
    folder: Path | str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of `compare_methods` over `config.networks` and `config.seeds`, stacked.

    Args:
        images: digits, (N, 1, 8, 8).
        labels: their classes, (N,).
        config: what is compared.
        folder: keeps what is finished, so that a study started again goes on; None: nothing is.
    """
    jobs = []
    for name in reversed(config.networks):
        # What a job is known by must not change with how many there are, and at a time.
        alone = replace(config, networks=(name,), seeds=config.seeds[:1], workers=1)
        jobs += [(compare_methods, (images, labels, alone, name, s)) for s in config.seeds]
    found = finish_jobs(jobs, config.workers, folder, "IHVPs")
    tables, spectra = zip(*found, strict=True)
    return pd.concat(tables, ignore_index=True), pd.concat(spectra, ignore_index=True)


def compare_methods(
    images: NDArray[np.uint8], labels: NDArray[np.int64], config: StudyConfig, name: str, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All cells of one network and seed.

    Args:
        images: digits, (N, 1, 8, 8).
        labels: their classes, (N,).
        config: what is compared; memory is measured for the first of its seeds.
        name: name of the network.
        seed: seed of everything drawn.

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
    rows: list[Row] = []
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
            for cell in _cells(config, point, point is last, is_base_l2, seed):
                system = System(problem, config, cell, reference, operator)
                rows += system.compare(seed)
    return pd.DataFrame(rows), pd.concat(spectra, ignore_index=True)


def _cells(
    config: StudyConfig, point: Point, is_last: bool, is_base_l2: bool, seed: int
) -> Iterator[Cell]:
    base, *others = config.dampings
    yield Cell(point, base, config.budgets)
    for damping in others if config.all_combinations or (is_last and is_base_l2) else []:
        yield Cell(point, damping, config.budgets)
    if not (is_last and is_base_l2):
        return
    middle = (config.budgets[len(config.budgets) // 2],)
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
    values = reference.eigenvalues
    # The eigenvalues that a factor of low rank leaves out are zero.
    padded = torch.cat([values, values.new_zeros(problem.size - len(values))]).sort().values
    return pd.DataFrame(
        {
            "network": problem.name,
            "seed": seed,
            "stage": str(point.stage),
            "l2": problem.l2,
            "eigenvalue": padded.numpy(),
        }
    )


class System:
    """The system (C + dI) v = ∇L_outer of one cell, and every method's attempt at it.

    Args:
        problem: the bilevel problem.
        config: what is compared.
        cell: where, and how.
        reference: the exact inverse at the cell's point.
        full: the curvature at the cell's point, in double precision on all images.
    """

    def __init__(
        self,
        problem: WeighingProblem,
        config: StudyConfig,
        cell: Cell,
        reference: Reference,
        full: Hessian | GaussNewton,
    ) -> None:
        self.problem, self.config, self.cell, self.reference = problem, config, cell, reference
        self.damping = problem.l2 + cell.damping_ratio * reference.largest
        self.smallest = reference.smallest + self.damping
        self.largest = reference.largest + self.damping
        self.exact = reference.solve(problem.outer_gradient(cell.point.params), self.damping)
        self.exact_hypergradient = weight_gradient(
            problem.example_losses, cell.point.params, self.exact
        )
        self.weights = torch.ones(len(problem.labels), dtype=cell.dtype)
        self.params = {name: p.to(cell.dtype) for name, p in cell.point.params.items()}
        self._bilevel = (problem.inner, problem.outer, self.params, self.weights)
        self.rhs = problem.outer_gradient(self.params)
        self.op = full if cell.is_plain else _curvature(problem, config, self.params, cell.rows)
        if self.smallest > 0 and cell.is_plain:
            # What a certificate needs is known here; in practice it comes from `lower_bound`.
            self.op.smallest_eigenvalue = reference.smallest

    def compare(self, seed: int) -> list[Row]:
        """A row a method and budget, as `compare_methods` describes them."""
        problem, cell = self.problem, self.cell
        gradient_seconds = min(_timed(self._inner_gradient)[1] for _ in range(7))
        common = {
            "network": problem.name,
            "parameters": problem.size,
            "seed": seed,
            "curvature": "hessian" if isinstance(self.op, Hessian) else "gauss_newton",
            "stage": str(cell.point.stage),
            "progress": cell.point.progress,
            "l2": problem.l2,
            "damping_ratio": cell.damping_ratio,
            "dtype": str(cell.dtype).removeprefix("torch."),
            "batch": cell.batch,
            "condition": self.largest / self.smallest if self.smallest > 0 else np.nan,
            "inner_gradient": float(self._inner_gradient().norm()),
        }
        # Memory depends on method and budget alone.
        config = self.config
        bases = (config.seeds[0], 1.0, config.l2[0], config.dampings[0])
        here = (seed, cell.point.stage, problem.l2, cell.damping_ratio)
        measures_memory = cell.is_plain and here == bases
        vector = problem.size * cell.dtype.itemsize
        rows = []
        for method, budget, call in self._attempts():
            attempt, seconds = _timed(call)
            row = {
                **common,
                "method": method.name,
                "max_products": budget,
                **self._judge(method, attempt),
                "seconds": seconds,
                "gradients": seconds / gradient_seconds,
                "memory": peak_memory(call) / vector if measures_memory else None,
            }
            rows.append(row)
        if cell.is_plain:
            seconds = self.reference.seconds
            exact = {
                "method": "exact",
                "max_products": problem.size,
                "products": problem.size,
                "status": "converged",
                "residual": 0.0,
                **dict.fromkeys(("ihvp_error", "hypergradient_error"), 0.0),
                **dict.fromkeys(("ihvp_cosine", "hypergradient_cosine"), 1.0),
                "seconds": seconds,
                "gradients": seconds / gradient_seconds,
            }
            rows.append({**common, **exact})
        return rows

    def _judge(self, method: HypergradientMethod, attempt: Attempt) -> Row:
        """What a solver says of itself, and what the reference says of it."""
        judged: Row = {}
        if attempt.solution is not None:
            value = attempt.solution.value
            judged = {
                "products": attempt.solution.products,
                "status": attempt.solution.status,
                "residual": attempt.solution.residual,
                **_distance("ihvp", value, self.exact),
            }
            if self.cell.is_plain:
                judged["true_error"] = float((value - self.exact).norm() / self.rhs.norm())
                # A certificate is for the system that was solved; the others solve another one.
                if method.operator in ("curvature", "factors"):
                    judged["error_bound"] = attempt.solution.error_bound
        found = _distance("hypergradient", attempt.hypergradient, self.exact_hypergradient)
        return dict.fromkeys(JUDGED) | judged | found

    def _inner_gradient(self) -> Tensor:
        return gradient(lambda p: self.problem.inner(p, self.weights), self.params)

    @cached_property
    def _layers(self) -> GaussNewton:
        """The Gauss-Newton matrix, which shows the layers of the network."""
        if isinstance(self.op, GaussNewton):
            return self.op
        return self.problem.gauss_newton(self.params, self.cell.rows)

    def _attempts(self) -> Iterator[tuple[HypergradientMethod, int, Callable[[], Attempt]]]:
        """Every method with its budget, and what computes its answer."""
        budgets, methods = self.cell.budgets, all_methods()
        # The exact solve is the reference itself.
        ihvps = [m for m in methods if m.solver and m.name != "exact"]
        plain = [m for m in ihvps if m.operator == "curvature"]
        order = [(m, 1) for m in plain if not m.budgeted]
        order += [(m, budget) for budget in budgets for m in plain if m.budgeted]
        for method in ihvps:
            if method.operator == "gauss_newton" and not isinstance(self.op, Hessian):
                continue  # it would be another method once more
            if method.operator != "curvature":
                single = len(self.problem.labels) if method.operator == "fisher" else 1
                order += [(method, b) for b in (budgets if method.budgeted else (single,))]
        for method, budget in order:
            yield method, budget, partial(self._solve, method, budget)
        if self.cell.rows is not None:
            return
        for method in methods:
            if method.name == "unrolled":
                for budget in budgets:
                    yield method, budget, partial(self._unroll, budget)
            elif method.name in ("darts", "sama"):
                yield method, 1, self._darts if method.name == "darts" else self._sama

    def _solve(self, method: HypergradientMethod, budget: int) -> Attempt:
        more = {"factors": self._layers} if method.operator == "factors" else {}
        solver = method.build(self.damping, budget, rtol=RTOL, **more)
        op: LinearOperator = self.op
        if method.operator == "gauss_newton":
            op = self._layers
        elif method.operator == "fisher":
            # It is made anew: its gradients of single examples are the cost.
            op = self.problem.empirical_fisher(self.params, self.cell.rows)
        solution = solver.solve(op, self.rhs)
        hypergradient = weight_gradient(self.problem.example_losses, self.params, solution.value)
        return Attempt(hypergradient, solution)

    def _darts(self) -> Attempt:
        return Attempt(darts_gradient(*self._bilevel, learning_rate=1 / self.largest))

    def _sama(self) -> Attempt:
        moment = {name: m.to(self.cell.dtype) for name, m in self.cell.point.second_moment.items()}
        return Attempt(sama_gradient(*self._bilevel, learning_rate=1e-2, second_moment=moment))

    def _unroll(self, steps: int) -> Attempt:
        """Gradient descent from θ on the inner loss with the system's damping as proximal term."""
        extra = (self.damping - self.problem.l2) / 2
        centre = {name: p.detach() for name, p in self.params.items()}

        def step(theta: Parameters, hyper: Tensor) -> Parameters:
            pulls = [(p - centre[name]).square().sum() for name, p in theta.items()]
            loss = self.problem.inner(theta, hyper) + extra * torch.stack(pulls).sum()
            slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            return {
                name: p - g / self.largest
                for (name, p), g in zip(theta.items(), slopes, strict=True)
            }

        return Attempt(
            unrolled_gradient(step, self.params, self.weights, self.problem.outer, steps)
        )


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _distance(name: str, value: Tensor, reference: Tensor) -> dict[str, float]:
    value = value.double()
    return {
        f"{name}_error": float((value - reference).norm() / reference.norm()),
        f"{name}_cosine": float(F.cosine_similarity(value, reference, dim=0)),
    }
