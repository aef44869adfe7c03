"""Conjugate gradients and Neumann series beside those of other packages.

    uv run --group peers python -m benchmarks.ihvp_peers [--quick]

Everybody solves (H + δI) v = g on the same problem with the same number k of products; ours
spends one of its k on recomputing the residual. Products are counted where the peer makes them.
Peers that know no damping (betty, hypergrad) get it as L2 in the loss, and their products go
through it, which tells on a small network.
A peer that is not installed is left out, and a line says so.
"""

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weighmatch.implicit import (
    ConjugateGradient,
    Hessian,
    Method,
    Neumann,
    Parameters,
    extreme_eigenvalues,
    flatten,
    unflatten,
)
from weighmatch.semisup.networks import Classifier, wide_resnet_trunk

MethodName = Literal["CG", "Neumann"]
METHODS: tuple[MethodName, ...] = ("CG", "Neumann")


class _Point(nn.Module):
    """A model that is its own parameter vector (P,), whatever goes in."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.theta


class _Quadratic(nn.Module):
    """½ θᵀAθ − bᵀθ as a criterion of "outputs" θ and "targets" b."""

    reduction = "sum"

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, theta: Tensor, b: Tensor) -> Tensor:
        return theta @ (self.get_buffer("matrix") @ theta / 2 - b)


@dataclass(frozen=True)
class Problem:
    """(H + δI) v = g with H the Hessian of a loss at the model's parameters.

    Attributes:
        name: for the tables.
        model: a module, as most peers ask for one.
        criterion: criterion(model(inputs), targets) is the loss.
        inputs: of the model.
        targets: of the criterion.
        rhs: g, (P,).
        damping: δ.
        step: α of the Neumann series, the same for everybody.
    """

    name: str
    model: nn.Module
    criterion: nn.Module
    inputs: Tensor
    targets: Tensor
    rhs: Tensor
    damping: float = 0.0
    step: float = 1.0

    @property
    def params(self) -> Parameters:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def loss(self, params: Parameters) -> Tensor:
        outputs = functional_call(self.model, params, (self.inputs,))
        value: Tensor = self.criterion(outputs, self.targets)
        return value

    def damped_loss(self, params: Parameters) -> Tensor:
        """The loss plus ½ δ‖θ‖²: for peers that know no damping."""
        squares = torch.stack([p.square().sum() for p in params.values()])
        total: Tensor = self.loss(params) + self.damping / 2 * squares.sum()
        return total

    def tree(self, vector: Tensor) -> tuple[Tensor, ...]:
        """A vector (P,) as tensors shaped like the parameters."""
        return tuple(unflatten(vector, self.params).values())

    def exact(self) -> Tensor:
        """The solution by a dense solve that shares no curvature code with anybody here."""
        point = flatten(self.params)
        hessian = torch.func.hessian(lambda flat: self.loss(unflatten(flat, self.params)))(point)
        damped = hessian + self.damping * torch.eye(len(point), dtype=point.dtype)
        solution: Tensor = torch.linalg.solve(damped, self.rhs)
        return solution


def _posed(problem: Problem) -> Problem:
    """With the step of the Neumann series that fits, and a check of definiteness."""
    smallest, largest = extreme_eigenvalues(Hessian(problem.loss, problem.params))
    if smallest + problem.damping <= 0:
        raise ValueError(
            f"{problem.name} is not positive definite: λ_min = {smallest:.3g} with damping "
            f"{problem.damping:.3g}"
        )
    return replace(problem, step=1 / (largest + problem.damping))


def quadratic(size: int = 100, condition: float = 1e3) -> Problem:
    """A random positive definite matrix with eigenvalues log-spaced over `condition`."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(gaussian).Q
    eigenvalues = torch.logspace(0, -torch.tensor(condition).log10().item(), size).double()
    matrix = (axes * eigenvalues) @ axes.T
    b, rhs = torch.randn(2, size, generator=generator, dtype=torch.float64)
    criterion = _Quadratic((matrix + matrix.T) / 2)
    name = f"quadratic, P = {size}, κ = {condition:.0e}, float64"
    return _posed(Problem(name, _Point(size), criterion, torch.zeros(1, 1), b, rhs))


def _network(
    name: str, build: Callable[[], nn.Module], shape: Sequence[int], dtype: torch.dtype
) -> Problem:
    """Cross-entropy on a seeded random batch of `shape`; g is the gradient on another one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().to(dtype)
        batches = torch.randn(2, *shape, dtype=dtype)
        labels = torch.randint(10, (2, shape[0]))
    size = sum(p.numel() for p in model.parameters())
    name = f"{name}, P = {size:,}, batch {shape[0]}, {str(dtype).removeprefix('torch.')}"
    here, there = (
        Problem(name, model, nn.CrossEntropyLoss(), *batch, rhs=torch.zeros(size, dtype=dtype))
        for batch in zip(batches, labels, strict=True)
    )
    return replace(here, rhs=flatten(torch.func.grad(there.loss)(there.params)))


def _untrained(problem: Problem) -> Problem:
    """At the initialisation, damped until it is positive definite: enough to take times on."""
    smallest, largest = extreme_eigenvalues(Hessian(problem.loss, problem.params))
    return _posed(replace(problem, damping=0.1 * largest + 1.1 * max(0.0, -smallest)))


def _trained(problem: Problem, damping: float) -> Problem:
    """At a minimum of the damped loss, where the implicit function theorem holds."""
    problem = replace(problem, damping=damping)
    params: Parameters = dict(problem.model.named_parameters())
    optimiser = torch.optim.LBFGS(
        params.values(), max_iter=2000, line_search_fn="strong_wolfe", tolerance_change=0.0
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = problem.damped_loss(params)
        loss.backward()
        return loss

    optimiser.step(closure)
    return _posed(problem)


def _tanh_mlp(widths: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def small_mlp() -> Problem:
    """A trained MLP that a dense solve can still check."""
    problem = _network(
        "trained MLP 64-16-10", lambda: _tanh_mlp((64, 16, 10)), (128, 64), torch.float64
    )
    return _trained(problem, damping=1e-3)


def large_mlp() -> Problem:
    """An MLP in single precision."""
    widths = (784, 300, 100, 10)
    return _untrained(
        _network("MLP 784-300-100-10", lambda: _tanh_mlp(widths), (128, 784), torch.float32)
    )


def wide_resnet() -> Problem:
    """WRN-10-1 on 32×32 colour images, in single precision."""
    return _untrained(
        _network(
            "WRN-10-1",
            lambda: Classifier(wide_resnet_trunk(3, depth=10, widen=1), 64, 10),
            (32, 3, 32, 32),
            torch.float32,
        )
    )


@dataclass(frozen=True)
class Answer:
    """v, (P,), and the products that it took."""

    value: Tensor
    products: int


class _Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def ours(problem: Problem, method: MethodName, products: int) -> Answer:
    """This package: products on the retained graph of the gradient."""
    solver: Method
    if method == "CG":
        solver = ConjugateGradient(damping=problem.damping, max_products=products, rtol=0.0)
    else:
        solver = Neumann(
            damping=problem.damping, step=problem.step, max_products=products, rtol=0.0
        )
    solution = solver.solve(Hessian(problem.loss, problem.params), problem.rhs)
    return Answer(solution.value, solution.products)


def betty(problem: Problem, method: MethodName, products: int) -> Answer:
    """betty-ml: products on the retained graph of the gradient.

    It hands back the hypergradient only, so a hyperparameter λ enters as ⟨θ, λ⟩: its mixed
    derivative is the identity and costs nothing. betty makes two more calls of `grad`: the
    gradient and that mixed derivative.
    """
    from betty.configs import Config
    from betty.hypergradient import cg, neumann

    leaves = {name: p.requires_grad_() for name, p in problem.params.items()}
    hyper = [torch.zeros_like(p, requires_grad=True) for p in leaves.values()]

    def loss(batch: None) -> Tensor:
        terms = [(p * h).sum() for p, h in zip(leaves.values(), hyper, strict=True)]
        return problem.damped_loss(leaves) + torch.stack(terms).sum()

    lower = SimpleNamespace(
        config=Config(
            cg_iterations=products, neumann_iterations=products, neumann_alpha=problem.step
        ),
        paths=[],
        cur_batch=None,
        training_step_exec=loss,
        parameters=lambda: list(leaves.values()),
        trainable_parameters=lambda: list(leaves.values()),
    )
    upper = SimpleNamespace(trainable_parameters=lambda: hyper)
    solve = cg if method == "CG" else neumann
    with patch.object(torch.autograd, "grad", _Counted(torch.autograd.grad)) as grad:
        hypergradient = solve(problem.tree(problem.rhs), lower, upper, sync=False)
    return Answer(-_flat(hypergradient), grad.calls - 2)


def curvlinops(problem: Problem, method: MethodName, products: int) -> Answer:
    """curvlinops: forward over reverse, rebuilt for every product.

    Its conjugate gradients spend a product on the start at zero, and stop at a residual of 1
    unless told otherwise.
    """
    from curvlinops import (
        CGInverseLinearOperator,
        HessianLinearOperator,
        NeumannInverseLinearOperator,
    )
    from curvlinops.examples import IdentityLinearOperator

    params = list(problem.model.parameters())
    data = [(problem.inputs, problem.targets)]
    hessian = HessianLinearOperator(
        problem.model, problem.criterion, params, data, check_deterministic=False
    )
    hessian._matmat = counted = _Counted(hessian._matmat)
    identity = IdentityLinearOperator([p.shape for p in params], params[0].device, params[0].dtype)
    damped = hessian + problem.damping * identity
    if method == "CG":
        inverse = CGInverseLinearOperator(
            damped, max_iter=products - 1, max_tridiag_iter=0, tolerance=0.0
        )
    else:
        inverse = NeumannInverseLinearOperator(damped, num_terms=products, scale=problem.step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tolerance of zero is not reached
        return Answer(inverse @ problem.rhs, counted.calls)


def hypergrad(problem: Problem, method: MethodName, products: int) -> Answer:
    """hypergrad: forward over reverse, rebuilt for every product; without its mixed derivative."""
    from hypergrad import approx_hypergrad

    names, rhs = list(problem.params), problem.tree(problem.rhs)

    def inner(theta: tuple[Tensor, ...], hyper: tuple[Tensor, ...]) -> Tensor:
        return problem.damped_loss(dict(zip(names, theta, strict=True)))

    def outer(theta: tuple[Tensor, ...], hyper: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([(g * t).sum() for g, t in zip(rhs, theta, strict=True)]).sum()

    if method == "CG":
        solve, rate = approx_hypergrad.conjugate_gradient, 1.0
    else:
        solve, rate = approx_hypergrad.neumann, problem.step
    theta, hyper = tuple(problem.params.values()), (problem.rhs.new_zeros(()),)
    with patch.object(approx_hypergrad, "hvp", _Counted(approx_hypergrad.hvp)) as hvp:
        value, _ = solve.__wrapped__(inner, outer, theta, hyper, num_iters=products, lr=rate)
    return Answer(_flat(value), hvp.calls)


def torchopt(problem: Problem, method: MethodName, products: int) -> Answer:
    """TorchOpt: products by `torch.func.vjp` of the gradient, as its `custom_root` makes them.

    Its conjugate gradients spend a product on the start at zero.
    """
    from torchopt.linear_solve import solve_cg, solve_inv

    _, vjp, *_ = torch.func.vjp(torch.func.grad(problem.loss), problem.params)
    product = _Counted(lambda vector: vjp(vector)[0])
    if method == "CG":
        solve = solve_cg(maxiter=products - 1, rtol=0.0, ridge=problem.damping)
    else:
        solve = solve_inv(ns=True, maxiter=products, alpha=problem.step, ridge=problem.damping)
    value = solve(product, unflatten(problem.rhs, problem.params))
    return Answer(flatten(value), product.calls)


Solver = Callable[[Problem, MethodName, int], Answer]
# By the name of the distribution; ours comes first and is what the others are compared with.
SOLVERS: dict[str, Solver] = {
    "weighmatch": ours,
    "betty-ml": betty,
    "curvlinops-for-pytorch": curvlinops,
    "hypergrad": hypergrad,
    "torchopt": torchopt,
}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _usable(problem: Problem, solvers: dict[str, Solver]) -> dict[str, Solver]:
    """Those that are installed and can differentiate this problem; says which cannot and why."""
    found = {}
    for name, solver in solvers.items():
        try:
            solver(problem, "CG", 2)
        except (ImportError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            print(f"{name} is left out of {problem.name.split(',')[0]}: {reason}\n")
        else:
            found[name] = solver
    return found


def accuracy(problem: Problem, solvers: dict[str, Solver], budgets: Sequence[int]) -> list[str]:
    """Relative error to the dense solve; in brackets the products where they are not k."""
    exact = problem.exact()
    rows = []
    for method in METHODS:
        for name, solver in solvers.items():
            cells = []
            for budget in budgets:
                answer = solver(problem, method, budget)
                error = float((answer.value - exact).norm() / exact.norm())
                spent = "" if answer.products == budget else f" ({answer.products})"
                cells.append(f"{error:.1e}{spent}")
            rows.append([method, name, *cells])
    return _table(["method", "package", *(f"k = {k}" for k in budgets)], rows)


def speed(problem: Problem, solvers: dict[str, Solver], products: int, rounds: int) -> list[str]:
    """Time of whole solves, graphs and operators included, interleaved in rounds."""
    params = {name: p.requires_grad_() for name, p in problem.params.items()}

    def gradients() -> None:
        for _ in range(products):
            torch.autograd.grad(problem.loss(params), list(params.values()))

    calls: dict[tuple[str, str], Callable[[], object]] = {("", "gradient"): gradients}
    for method in METHODS:
        for name, solver in solvers.items():
            calls[method, name] = partial(solver, problem, method, products)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[key].append((time.perf_counter() - start) / products)
    kept = {key: times[1:] for key, times in seconds.items()}  # the first round warms up

    rows = []
    for (label, name), times in kept.items():
        in_gradients = [t / g for t, g in zip(times, kept["", "gradient"], strict=True)]
        row = [label, name, f"{1e3 * statistics.median(times):.3g}", _spread(in_gradients)]
        if label:
            own = kept[label, "weighmatch"]
            row.append(f"{products * statistics.median(in_gradients):.0f}")
            row.append(_spread([o / t for o, t in zip(own, times, strict=True)]))
        rows.append(row + [""] * (6 - len(row)))
    header = ["method", "package", "ms a product", "in gradients", f"solve, k = {products}"]
    return _table([*header, "ours / theirs"], rows)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _conditions(solvers: Iterable[str]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in solvers)
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}), {torch.get_num_threads()} torch thread, "
        f"torch {torch.__version__}, {versions}"
    )


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description="IHVPs beside other packages'.")
    parser.add_argument("--quick", action="store_true", help="seconds: two rounds, no WRN")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing after a warm-up")
    parser.add_argument("--products", type=int, default=20, help="k of the timed solves")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # functorch and TorchScript, in the peers
    rounds, products = arguments.rounds, arguments.products
    budgets = [5, 10, 20, 40]
    if arguments.quick:
        rounds, products, budgets = 2, 5, [5, 20]

    solvers = _usable(quadratic(size=3), SOLVERS)
    print(_conditions(solvers))
    for problem in (quadratic(), small_mlp()):
        print(f"\n### Relative error at k products: {problem.name}\n")
        print("\n".join(accuracy(problem, _usable(problem, solvers), budgets)))
    timed = [large_mlp()]
    if not arguments.quick:
        timed.append(wide_resnet())
    for problem in timed:
        print(f"\n### Time of a solve, {rounds} rounds: {problem.name}\n")
        lines = speed(problem, _usable(problem, solvers), products, rounds)
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
