"""The problems that the packages are compared on, and an adapter for each package.

Everybody solves (H + δI) v = g on the same problem with the same number k of products; ours
spends one of its k on recomputing the residual. Products are counted where the peer makes them.
Peers that know no damping (betty, hypergrad) get it as L2 in the loss, and their products go
through it, which tells on a small network.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from weighmatch.implicit import (
    ConjugateGradient,
    GaussNewton,
    Hessian,
    LinearOperator,
    Method,
    Neumann,
    Parameters,
    extreme_eigenvalues,
    flatten,
    unflatten,
)
from weighmatch.semisup.parts.networks import Classifier, wide_resnet_trunk

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

    def outputs(self, params: Parameters) -> Tensor:
        outputs: Tensor = functional_call(self.model, params, (self.inputs,))
        return outputs

    def output_loss(self, outputs: Tensor) -> Tensor:
        value: Tensor = self.criterion(outputs, self.targets)
        return value

    def loss(self, params: Parameters) -> Tensor:
        return self.output_loss(self.outputs(params))

    def example_losses(self, params: Parameters) -> Tensor:
        """The cross-entropy of each example, (B,)."""
        return F.cross_entropy(self.outputs(params), self.targets, reduction="none")

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
        hessian = torch.autograd.functional.hessian(
            lambda flat: self.loss(unflatten(flat, self.params)), point
        )
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
    # Not by torch.func, whose import takes as long as that of torch itself.
    params: Parameters = dict(model.named_parameters())
    return replace(here, rhs=_flat(torch.autograd.grad(there.loss(params), list(params.values()))))


def damped(problem: Problem) -> Problem:
    """With damping that makes it positive definite at the initialisation: enough for times."""
    smallest, largest = extreme_eigenvalues(Hessian(problem.loss, problem.params))
    damping = 0.1 * largest + 1.1 * max(0.0, -smallest)
    return replace(problem, damping=damping, step=1 / (largest + damping))


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


def mlp(widths: Sequence[int] = (784, 300, 100, 10), batch: int = 128) -> Problem:
    """An MLP at its initialisation in single precision; to be `damped`."""
    name = f"MLP {'-'.join(map(str, widths))}"
    return _network(name, lambda: _tanh_mlp(widths), (batch, widths[0]), torch.float32)


def wide_resnet(batch: int = 32) -> Problem:
    """WRN-10-1 on 32×32 colour images in single precision; to be `damped`."""
    return _network(
        "WRN-10-1",
        lambda: Classifier(wide_resnet_trunk(3, depth=10, widen=1), 64, 10),
        (batch, 3, 32, 32),
        torch.float32,
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
    return _solve(Hessian(problem.loss, problem.params), problem, method, products)


def gauss_newton(problem: Problem, method: MethodName, products: int) -> Answer:
    """This package with the Gauss-Newton matrix: another system, with another solution.

    It cannot be indefinite and gets a thousandth of δ: with all of it, conjugate gradients are
    done before k products.
    """
    operator = GaussNewton(problem.outputs, problem.output_loss, problem.params)
    return _solve(operator, replace(problem, damping=problem.damping / 1000), method, products)


def _solve(operator: LinearOperator, problem: Problem, method: MethodName, products: int) -> Answer:
    solver: Method
    if method == "CG":
        solver = ConjugateGradient(damping=problem.damping, max_products=products, rtol=0.0)
    else:
        solver = Neumann(
            damping=problem.damping, step=problem.step, max_products=products, rtol=0.0
        )
    solution = solver.solve(operator, problem.rhs)
    return Answer(solution.value, solution.products)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def betty(problem: Problem, method: MethodName, products: int) -> Answer:
    """betty-ml: products on the retained graph of the gradient.

    It hands back the hypergradient only, so a hyperparameter λ enters as ⟨θ, λ⟩: its mixed
    derivative is the identity and costs nothing. betty makes two more calls of `grad`: the
    gradient and that mixed derivative. Its conjugate gradients add the residual of the step before
    to the new direction, so that the directions are not conjugate and the error need not fall.
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
    system = hessian + problem.damping * identity
    if method == "CG":
        inverse = CGInverseLinearOperator(
            system, max_iter=products - 1, max_tridiag_iter=0, tolerance=0.0
        )
    else:
        inverse = NeumannInverseLinearOperator(system, num_terms=products, scale=problem.step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tolerance of zero is not reached
        return Answer(inverse @ problem.rhs, counted.calls)


def hypergrad(problem: Problem, method: MethodName, products: int) -> Answer:
    """hypergrad: forward over reverse, rebuilt for every product; without its mixed derivative.

    Its conjugate gradients are betty's.
    """
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


def installed(solvers: dict[str, Solver]) -> dict[str, Solver]:
    """Those whose distribution is installed; says which are not."""
    found = {}
    for name, solver in solvers.items():
        try:
            version(name)
        except PackageNotFoundError:
            print(f"{name} is left out: it is not installed (uv run --group peers)\n")
        else:
            found[name] = solver
    return found


def usable(problem: Problem, solvers: dict[str, Solver]) -> dict[str, Solver]:
    """Those that import and can differentiate this problem; says which do not and why."""
    found = {}
    for name, solver in solvers.items():
        try:
            solver(problem, "CG", 2)
        except (ImportError, NotImplementedError) as error:
            print(left_out(name, problem, error))
        else:
            found[name] = solver
    return found


def left_out(name: str, problem: Problem, error: Exception) -> str:
    """The line that says so."""
    reason = str(error).partition("\n")[0]
    return f"{name} is left out of {problem.name.split(',')[0]}: {reason}\n"
