"""What a curvature product costs in gradients, one way beside the other."""

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.peers import Problem
from benchmarks.tables import markdown
from benchmarks.timing import seconds_of
from weighmatch.implicit import GaussNewton, Hessian, unflatten
from weighmatch.implicit.operators import LinearOperator


class ProductCosts(NamedTuple):
    """In gradients: what is spent once, and one product (a column, where there are many)."""

    once: float
    product: float


COLUMNS = 16


def product_costs(problem: Problem, rounds: int) -> dict[str, ProductCosts]:
    """Every way to multiply by the Hessian and by the Gauss-Newton matrix, by turns; medians."""
    params, v = problem.params, problem.rhs
    live = {name: p.detach().requires_grad_() for name, p in params.items()}
    tangent = {name: t.detach() for name, t in unflatten(v, params).items()}

    def hessian() -> Hessian:
        return Hessian(problem.loss, params)

    def gauss_newton() -> GaussNewton:
        return GaussNewton(problem.outputs, problem.output_loss, params)

    def of_torch(build: Callable[[], LinearOperator]) -> LinearOperator:
        """On a graph of torch's own layers."""
        with patch(
            "weighmatch.implicit.curvature.CheapSecondOrder", lambda **_: contextlib.nullcontext()
        ):
            return build()

    def gradient() -> object:
        return torch.autograd.grad(problem.loss(live), list(live.values()))

    block = v.unsqueeze(1).expand(-1, COLUMNS).contiguous()
    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
        "Hessian": (hessian, lambda op: op @ v),
        "Hessian, torch's layers": (lambda: of_torch(hessian), lambda op: op @ v),
        "Hessian, torch.func.linearize": (
            lambda: torch.func.linearize(torch.func.grad(problem.loss), dict(params))[1],
            lambda push: push(tangent),
        ),
        f"Hessian, {COLUMNS} columns": (hessian, lambda op: op @ block),
        "Gauss-Newton": (gauss_newton, lambda op: op @ v),
        "Gauss-Newton, torch's layers": (lambda: of_torch(gauss_newton), lambda op: op @ v),
        "Gauss-Newton's push, torch.func.linearize": (
            lambda: torch.func.linearize(problem.outputs, dict(params))[1],
            lambda push: push(tangent),
        ),
    }
    gradient()
    unit = statistics.median(seconds_of(gradient) for _ in range(3 * rounds))
    built: dict[str, Any] = {}
    once: dict[str, float] = {}
    for name, (build, multiply) in ways.items():
        start = time.perf_counter()
        built[name] = build()
        once[name] = (time.perf_counter() - start) / unit
        multiply(built[name])
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        unit = seconds_of(gradient)
        for name, (_build, multiply) in ways.items():
            columns = COLUMNS if "columns" in name else 1
            seconds = seconds_of(lambda m=multiply, b=built[name]: m(b))  # type: ignore[misc]
            ratios[name].append(seconds / unit / columns)
    return {name: ProductCosts(once[name], statistics.median(ratios[name])) for name in ways}


def product_table(costs: dict[str, ProductCosts]) -> list[str]:
    """A row a way to multiply."""
    rows = [[way, f"{c.product:.2f}", f"{c.once:.1f}"] for way, c in costs.items()]
    return markdown(["product", "gradients a product", "gradients spent once"], rows)
