"""Every IHVP method on a network of modern size that was trained for a while."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.gpu import records, training
from benchmarks.gpu.device import peak_memory
from benchmarks.gpu.session import Bench, Budget
from benchmarks.timing import seconds_of
from weighmatch.implicit import (
    KFAC,
    Chebyshev,
    ConjugateGradient,
    Diagonal,
    GaussNewton,
    Hessian,
    Identity,
    LinearOperator,
    Method,
    MinRes,
    Neumann,
    Nystrom,
    Parameters,
    Solution,
    State,
    extreme_eigenvalues,
)

CURVATURES = ("Gauss-Newton", "Hessian")
PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUDGETS = (1, 5, 20, 100)
REACHED = 1e-6
# As many as the operators of `weighmatch.implicit` take without a trace of the derivative.
MOST_PRODUCTS = 999
# Share of the part's time that one reference may take.
REFERENCE_SHARE = 0.15


def _iterative(kind: Callable[..., Method], damping: float, products: int) -> Method:
    # One product more, for the check of the residual, and no end before them.
    return kind(damping=damping, max_products=products + 1, rtol=0.0)


# By name: a method with damping that spends about so many products.
METHODS: dict[str, Callable[[float, int], Method]] = {
    "Neumann": partial(_iterative, Neumann),
    "Chebyshev": partial(_iterative, Chebyshev),
    "ConjugateGradient": partial(_iterative, ConjugateGradient),
    "MinRes": partial(_iterative, MinRes),
    "Nystrom": lambda damping, products: Nystrom(damping=damping, rank=products),
    "Diagonal": lambda damping, products: Diagonal(damping=damping, probes=products),
}


# A curvature and the precision of its passes, names of `CURVATURES` and `PRECISIONS`.
System = tuple[str, str]


@dataclass(frozen=True)
class Job:
    """One solve that is to be done.

    Attributes:
        system: whose.
        name: of the method, for the table.
        budget: products, rank or probes; 0: the method has no choice.
        method: what solves.
        state: what it carries from one solve to the next.
        note: for the table.
    """

    system: System
    name: str
    budget: int
    method: Method
    state: State | None = None
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """A network and the images that its curvature is taken on.

    Attributes:
        network: without gradients.
        names: of the parameters that count: those of convolutions and linear layers.
        inputs: (B, 3, H, W) in [0, 1].
        labels: (B,).
        outer: images and labels whose loss gives the right-hand side.
    """

    network: nn.Module
    names: tuple[str, ...]
    inputs: Tensor
    labels: Tensor
    outer: tuple[Tensor, Tensor]

    def params(self, dtype: torch.dtype = torch.float32) -> Parameters:
        """θ, copied."""
        found = dict(self.network.named_parameters())
        return {
            name: found[name].detach().clone(memory_format=torch.contiguous_format).to(dtype)
            for name in self.names
        }

    def outputs(self, inputs: Tensor, passes: torch.dtype) -> Callable[[Parameters], Tensor]:
        """Logits from θ, of any type, with the passes in `passes` and the answer in θ's."""
        network = copy.deepcopy(self.network).to(passes)
        inputs = inputs.to(passes)

        def logits(params: Parameters) -> Tensor:
            cast = {name: p.to(passes) for name, p in params.items()}
            found: Tensor = functional_call(network, cast, (inputs,))
            return found.to(next(iter(params.values())).dtype)

        return logits

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(logits, self.labels)

    def operator(
        self, curvature: str, passes: torch.dtype, vectors: torch.dtype = torch.float32
    ) -> LinearOperator:
        """The Hessian or the Gauss-Newton matrix of the loss."""
        outputs, params = self.outputs(self.inputs, passes), self.params(vectors)
        if curvature == "Hessian":
            return Hessian(lambda p: self.loss(outputs(p)), params)
        return GaussNewton(outputs, self.loss, params)

    def right_hand_side(self) -> Tensor:
        """∇L_outer in double precision, (P,)."""
        images, labels = self.outer
        params = {k: p.requires_grad_() for k, p in self.params(torch.float64).items()}
        loss = F.cross_entropy(self.outputs(images, torch.float64)(params), labels)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [*params.values()])])


def build(bench: Bench, record: records.Ihvps) -> Problem:
    """The network after some steps of training, and two batches."""
    steps, count = (2, 8) if bench.tiny else (300, 128)
    network = training.classifier_after(bench, steps, count, bench.folder / "ihvps")
    layers = [
        f"{name}.{kind}"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        for kind, _ in module.named_parameters(recurse=False)
    ]
    images = torch.from_numpy(bench.images.test_images[: 2 * count]).to(bench.device) / 255
    labels = torch.from_numpy(bench.images.test_labels[: 2 * count]).to(bench.device)
    problem = Problem(
        network, tuple(layers), images[:count], labels[:count], (images[count:], labels[count:])
    )
    record.network, record.images = training.training_of(bench).network, count
    record.parameters = sum(p.numel() for p in problem.params().values())
    return problem


def ihvps(record: records.Ihvps, bench: Bench, budget: Budget) -> None:
    """References first, then every method, from few products to many."""
    # Which also keeps single precision what it is, in convolutions, too.
    with training.fastest():
        _measure(record, bench, budget)


def _measure(record: records.Ihvps, bench: Bench, budget: Budget) -> None:
    whole = budget.left()
    problem = build(bench, record)
    rhs = problem.right_hand_side()
    exact: dict[str, Tensor | None] = {}
    for curvature in CURVATURES:
        if budget.allows(f"the reference with the {curvature}, and all of its solves"):
            reference, exact[curvature] = _reference(
                problem, curvature, rhs, REFERENCE_SHARE * whole
            )
            record.references.append(reference)
    dampings = {reference.curvature: reference.damping for reference in record.references}
    jobs = _jobs(dampings, BUDGETS[:2] if bench.tiny else BUDGETS)
    record.planned = len(jobs)
    built: dict[System, tuple[LinearOperator, float]] = {}
    for job in jobs:
        if budget.spent():
            break
        if job.system not in built:
            built[job.system] = _operator(problem, job.system, rhs.float())
        operator, a_product = built[job.system]
        if budget.left() < 1.3 * job.budget * a_product:
            continue
        try:
            solve = _solve(job, operator, rhs.float(), exact[job.system[0]], bench.device)
        except ImportError as failure:
            record.left_out.append(f"{job.name}: {failure}")
        else:
            record.solves.append(solve)
    missing = len(jobs) - len(record.solves) - len(record.left_out)
    if missing:
        budget.not_done.append(f"{missing} of {len(jobs)} solves")


def _jobs(dampings: dict[str, float], budgets: Sequence[int]) -> list[Job]:
    """From few products to many, so that a cut takes the dearest."""
    systems = [(curvature, name) for curvature in dampings for name in PRECISIONS]
    jobs = [Job(s, "Identity", 0, Identity(damping=dampings[s[0]])) for s in systems]
    for s in systems:
        if s != ("Gauss-Newton", "float32"):
            continue
        for name, corrected in (("KFAC", False), ("EKFAC", True)):
            method = KFAC(damping=dampings[s[0]], eigenvalue_corrected=corrected)
            state: State = {}
            jobs.append(Job(s, name, 0, method, state, "factors, their inverse, its product"))
            jobs.append(Job(s, name, 0, method, state, "with the factors of the call before"))
    for count in budgets:
        for name, make in METHODS.items():
            jobs += [Job(s, name, count, make(dampings[s[0]], count)) for s in systems]
    return jobs


def _operator(problem: Problem, system: System, vector: Tensor) -> tuple[LinearOperator, float]:
    """The curvature, and seconds of one product, the first of which is not timed."""
    operator = problem.operator(system[0], PRECISIONS[system[1]])
    seconds_of(lambda: operator @ vector)
    return operator, seconds_of(lambda: operator @ vector)


def _solve(
    job: Job,
    operator: LinearOperator,
    rhs: Tensor,
    exact: Tensor | None,
    device: torch.device,
) -> records.Solve:
    solutions: list[Solution] = []
    seconds: list[float] = []

    def call() -> None:
        seconds.append(
            seconds_of(lambda: solutions.append(job.method.solve(operator, rhs, job.state)))
        )

    memory = peak_memory(call, device)
    found = solutions[0]
    error = None
    if exact is not None:
        error = float((found.value.double() - exact).norm() / exact.norm())
    return records.Solve(
        *job.system,
        job.name,
        job.budget,
        found.products,
        seconds[0],
        memory and memory.peak,
        memory and memory.peak - memory.before,
        found.residual,
        error,
        found.status,
        job.note,
    )


def _reference(
    problem: Problem, curvature: str, rhs: Tensor, seconds: float
) -> tuple[records.Reference, Tensor | None]:
    """In double precision; the solution is None where the time ends it before the residual."""
    operator = problem.operator(curvature, torch.float64, torch.float64)
    probes = 20
    # What is timed here, the Lanczos vectors' own arithmetic included, is a little more than a
    # product.
    bounds: list[float] = []
    a_product = (
        seconds_of(lambda: bounds.extend(extreme_eigenvalues(operator, products=probes)[:2]))
        / probes
    )
    smallest, largest = bounds
    # Definite, so that every method has a meaning: beyond the most negative curvature found.
    damping = largest / 100 + 1.25 * max(0.0, -smallest)
    affordable = int(max(2, min(MOST_PRODUCTS, seconds / a_product - probes)))
    kind: type[ConjugateGradient | MinRes] = MinRes if curvature == "Hessian" else ConjugateGradient
    method = kind(damping=damping, max_products=affordable, rtol=REACHED)
    solutions: list[Solution] = []
    taken = seconds_of(lambda: solutions.append(method.solve(operator, rhs)))
    found = solutions[0]
    reached = found.residual <= 1.1 * REACHED
    reference = records.Reference(
        curvature, kind.__name__, damping, found.products, taken, found.residual, reached
    )
    return reference, found.value if reached else None
