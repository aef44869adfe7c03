"""A process for each package, so that what one does to its process leaves the others alone.

This package sets the allocator of its process (`weighmatch.implicit.memory`); a peer that is
timed in the same process would gain by it as well.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.peers import MethodName, Problem, Solver, mlp
from benchmarks.timing import seconds_of
from weighmatch.implicit import Hessian, Method, Parameters, unflatten, weight_gradient
from weighmatch.implicit.memory import keep_freed_memory
from weighmatch.studies.memory import peak_memory

# "own": as the package leaves it; "default": this package does not change it either;
# "kept": freed memory is kept whatever the package.
Memory = Literal["own", "default", "kept"]
GRADIENTS = 10
WEIGHT_GRADIENTS = 5


class Worker:
    """A process that holds one problem and calls functions on it, one at a time.

    It starts with a tiny solve, for the imports.
    """

    def __init__(self, solver: Solver, memory: Memory) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, solver, memory), daemon=True)
        self._process.start()
        theirs.close()

    def hold(self, build: Callable[[], Problem], posed: Problem) -> None:
        """Build the problem there, with what `posed` found out: finding it out solves."""
        self.call(_constants, build, posed.damping, posed.step)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(problem, *arguments), of the module level as it goes through a pipe.

        Raises:
            Exception: what the function raised there.
        """
        self._connection.send((function, arguments))
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.terminate()
        self._process.join()


def serve(connection: Connection, solver: Solver, memory: Memory) -> None:
    """Answer calls until the other end is closed."""
    torch.set_num_threads(1)
    problem: Problem | None = None
    with contextlib.ExitStack() as stack:
        if memory == "kept":
            keep_freed_memory()
        elif memory == "default":
            stack.enter_context(patch("weighmatch.implicit.curvature.keep_freed_memory"))
        # Who cannot will say so again when the problem is real.
        with contextlib.suppress(ImportError, NotImplementedError):
            solver(mlp((4, 3, 10), batch=2), "CG", 2)
        while True:
            try:
                function, arguments = connection.recv()
            except EOFError:
                return
            try:
                answer = function(problem, *arguments)
            except Exception as error:
                answer = error
            if isinstance(answer, Problem):
                problem, answer = answer, None
            connection.send(answer)


def _constants(
    before: Problem | None, build: Callable[[], Problem], damping: float, step: float
) -> Problem:
    return replace(build(), damping=damping, step=step)


class Timing(NamedTuple):
    """Seconds of one gradient and of one product, whole solves with all they set up."""

    gradient: float
    product: float
    products: int


def time_solve(problem: Problem, solver: Solver, method: MethodName, products: int) -> Timing:
    """One solve, and just before it some gradients for a unit."""
    params = {name: p.requires_grad_() for name, p in problem.params.items()}

    def gradients() -> None:
        for _ in range(GRADIENTS):
            torch.autograd.grad(problem.loss(params), list(params.values()))

    unit = seconds_of(gradients) / GRADIENTS
    start = time.perf_counter()
    answer = solver(problem, method, products)
    seconds = time.perf_counter() - start
    return Timing(unit, seconds / answer.products, answer.products)


def time_weight_gradients(problem: Problem) -> tuple[float, float]:
    """Seconds of `weight_gradient` and of `double_backward`, by turns."""
    pushed = pulled = 0.0
    params = problem.params
    for _ in range(WEIGHT_GRADIENTS):
        pushed += seconds_of(lambda: weight_gradient(problem.example_losses, params, problem.rhs))
        pulled += seconds_of(lambda: double_backward(problem.example_losses, params, problem.rhs))
    return pushed / WEIGHT_GRADIENTS, pulled / WEIGHT_GRADIENTS


class WeightGradientErrors(NamedTuple):
    """Largest difference over largest entry."""

    difference: float
    pushed: float
    pulled: float


def weight_gradient_errors(problem: Problem) -> WeightGradientErrors:
    """The two beside each other, and each beside double backward in double precision."""
    params, v = problem.params, problem.rhs
    wide = replace(problem, inputs=problem.inputs.double())
    exact = double_backward(
        wide.example_losses, {name: p.double() for name, p in params.items()}, v.double()
    )
    pushed = weight_gradient(problem.example_losses, params, v)
    pulled = double_backward(problem.example_losses, params, v)

    def error(left: Tensor, right: Tensor) -> float:
        return float((left - right).abs().max() / right.abs().max())

    return WeightGradientErrors(error(pushed, pulled), error(pushed, exact), error(pulled, exact))


def double_backward(
    example_losses: Callable[[Parameters], Tensor], params: Parameters, v: Tensor
) -> Tensor:
    """−⟨∇ℓ_i, v⟩ as the derivative in weights w of −⟨∇_θ Σ w_i ℓ_i, v⟩, (B,)."""
    theta = {name: p.detach().requires_grad_() for name, p in params.items()}
    losses = example_losses(theta)
    weights = torch.ones_like(losses, requires_grad=True)
    gradient = torch.autograd.grad(weights @ losses, list(theta.values()), create_graph=True)
    (mixed,) = torch.autograd.grad(gradient, weights, list(unflatten(v, theta).values()))
    return -mixed


def solve_memory(problem: Problem, method: Method | None) -> float:
    """Peak of a solve, its operator included, in parameter vectors; None: the operator alone."""

    def solve() -> None:
        operator = Hessian(problem.loss, problem.params)
        if method is not None:
            method.solve(operator, problem.rhs)

    solve()  # what torch allocates once and keeps is not the method's
    return peak_memory(solve) / (problem.rhs.numel() * problem.rhs.element_size())
