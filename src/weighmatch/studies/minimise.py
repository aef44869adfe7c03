"""The minimum of an inner problem: L-BFGS, and Newton's method for the last digits."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weighmatch.implicit import Parameters, flatten, unflatten

if TYPE_CHECKING:
    from weighmatch.studies.problems import BilevelProblem

# Newton's method, and what else has the whole matrix, is for so many parameters at most.
LARGEST_NEWTON = 2000
NEWTON_STEPS = 100


def minimise(
    problem: "BilevelProblem",
    hyper: Parameters,
    start: Parameters,
    iterations: int = 300,
    tolerance: float = 1e-6,
) -> tuple[Parameters, int]:
    """θ*(φ) from `start` on all examples, and the gradients that it took.

    L-BFGS first; where it is not there yet, as with decays that are far apart, Newton's method
    in double precision on up to 2,000 parameters (Levenberg-Marquardt damping after Nielsen,
    1999). A Hessian counts as P gradients.

    Args:
        problem: the problem whose inner loss is minimised. A loss that is not the integral of its
            gradient, as with a weight that is a constant of the inner problem, is not brought to
            the same precision.
        hyper: φ.
        start: where to start.
        iterations: the most iterations of L-BFGS.
        tolerance: largest entry of the gradient at which it stops.
    """
    found, calls = descend(
        lambda theta: problem.inner_gradient(theta, hyper),
        start,
        tolerance,
        (iterations, 2 * iterations),
        history=50,
    )
    if not all(bool(torch.isfinite(p).all()) for p in found.values()):
        return {k: p.detach().clone() for k, p in start.items()}, calls
    size = sum(p.numel() for p in found.values())
    if size <= LARGEST_NEWTON and next(iter(found.values())).dtype == torch.float64:
        found, more = _newton(problem, hyper, found, tolerance)
        calls += more
    return found, calls


def descend(
    loss_and_slopes: Callable[[Parameters], tuple[Tensor, Sequence[Tensor]]],
    start: Parameters,
    tolerance: float,
    most: tuple[int, int],
    history: int,
) -> tuple[Parameters, int]:
    """L-BFGS from `start`: where it ends, and the number of gradients that it took.

    Args:
        loss_and_slopes: gives the loss at θ and its gradient in each parameter.
        start: where it begins.
        tolerance: largest entry of the gradient at which it stops.
        most: the most iterations, and the most gradients.
        history: number of past gradients that it keeps.
    """
    calls = 0
    theta = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    optimizer = torch.optim.LBFGS(
        theta.values(),
        max_iter=most[0],
        max_eval=most[1],
        history_size=history,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        nonlocal calls
        calls += 1
        loss, slopes = loss_and_slopes(theta)
        for leaf, slope in zip(theta.values(), slopes, strict=True):
            leaf.grad = slope
        return float(loss)

    optimizer.step(closure)
    return {name: p.detach() for name, p in theta.items()}, calls


def _newton(
    problem: "BilevelProblem", hyper: Parameters, start: Parameters, tolerance: float
) -> tuple[Parameters, int]:
    """`minimise` from near a minimum."""

    def at(params: Parameters) -> tuple[float, Tensor]:
        loss, slopes = problem.inner_gradient(params, hyper)
        return float(loss), flatten(dict(zip(params, slopes, strict=True)))

    params, damping, growth, calls = start, 1e-6, 2.0, 1
    loss, gradient = at(params)
    for _ in range(NEWTON_STEPS):
        if not float(gradient.abs().max()) > tolerance:
            break
        matrix = problem.matrix(params, hyper)
        calls += len(matrix)
        while damping < 1e8:
            damped = matrix.clone()
            damped.diagonal().add_(damping)
            factor, indefinite = torch.linalg.cholesky_ex(damped)
            if not indefinite:
                step = torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
                moved = unflatten(flatten(params) - step, params)
                new_loss, new_gradient = at(moved)
                calls += 1
                promised = float(gradient @ step - step @ (matrix @ step) / 2)
                # What is promised below rounding cannot be measured.
                tiny = 1e-13 * abs(loss)
                ratio = 1.0 if promised < tiny else (loss - new_loss) / promised
                if ratio > 1e-3 and new_loss <= loss + tiny:
                    break
            damping, growth = damping * growth, 2 * growth
        else:
            break
        params, loss, gradient = moved, new_loss, new_gradient
        damping, growth = damping * max(0.1, 1 - (2 * min(ratio, 1.0) - 1) ** 3), 2.0
    return params, calls
