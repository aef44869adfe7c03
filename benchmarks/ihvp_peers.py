"""Conjugate gradients and Neumann series beside those of other packages.

    uv run --group peers python -m benchmarks.ihvp_peers [--quick] [--keep-memory-everywhere]

Prints tables in Markdown: accuracy at equal products; time, each package in a process of its own;
the hypergradient of the examples' weights, which is ours alone; memory. A peer that is not
installed is left out, and a line says so.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.peers import (
    METHODS,
    SOLVERS,
    Answer,
    MethodName,
    Problem,
    Solver,
    damped,
    gauss_newton,
    installed,
    left_out,
    mlp,
    ours,
    quadratic,
    small_mlp,
    usable,
    wide_resnet,
)
from benchmarks.products import product_costs, product_table
from benchmarks.tables import conditions, markdown, show, spread, verdict
from benchmarks.workers import (
    Memory,
    Timing,
    Worker,
    solve_memory,
    time_solve,
    time_weight_gradients,
    weight_gradient_errors,
)
from weighmatch.implicit import ConjugateGradient, Hessian, Method, Neumann, Nystrom

OURS = "weighmatch"
OURS_BY_DEFAULT = "weighmatch, default allocator"
GAUSS_NEWTON = "weighmatch, Gauss-Newton instead"
# Errors below it, and so small a difference between two, are rounding.
ROUNDING = 1e-11
SAME = 1.001


def accuracy(problem: Problem, solvers: dict[str, Solver], budgets: Sequence[int]) -> list[str]:
    """Relative error to the dense solve; in brackets the products where they are not k."""
    exact = problem.exact()
    rows, behind = [], []
    for method in METHODS:
        errors: dict[str, list[float]] = {}
        for name, solver in solvers.items():
            answers = [solver(problem, method, budget) for budget in budgets]
            errors[name] = [float((a.value - exact).norm() / exact.norm()) for a in answers]
            cells = [
                f"{error:.1e}" + ("" if answer.products == budget else f" ({answer.products})")
                for error, answer, budget in zip(errors[name], answers, budgets, strict=True)
            ]
            rows.append([method, name, *cells])
        behind += [f"{method} {line}" for line in less_accurate(errors, budgets)]
    table = markdown(["method", "package", *(f"k = {k}" for k in budgets)], rows)
    claim = "At equal products ours is at least as accurate as the best peer"
    return [*table, "", verdict(claim, behind)]


def last_iterate(problem: Problem, method: MethodName, products: int) -> Answer:
    """Ours, handing back the last iterate as the peers do, where its residual is above 1 too."""
    if method != "CG":
        return ours(problem, method, products)
    solver = ConjugateGradient(
        damping=problem.damping, max_products=products, rtol=0.0, shorten=False
    )
    solution = solver.solve(Hessian(problem.loss, problem.params), problem.rhs)
    return Answer(solution.value, solution.products)


def less_accurate(errors: dict[str, list[float]], budgets: Sequence[int]) -> list[str]:
    """The budgets where ours, the first, is behind the best of the others, and by how much."""
    (_, own), *peers = errors.items()
    lines = []
    for i, budget in enumerate(budgets):
        if peers:
            name, best = min(((n, e[i]) for n, e in peers), key=lambda pair: pair[1])
            if not own[i] <= max(SAME * best, ROUNDING):
                lines.append(f"k = {budget}: {own[i]:.1e} and {name} {best:.1e}")
    return lines


@dataclass(frozen=True)
class Contestant:
    """A row of the table of times, and the process that it runs in."""

    name: str
    solver: Solver
    worker: Worker
    methods: Sequence[MethodName] = METHODS


def contestants(solvers: dict[str, Solver], keep_everywhere: bool) -> list[Contestant]:
    """Ours as it is, ours with the allocator left alone, the peers, and ours of Gauss-Newton."""
    setting: Memory = "kept" if keep_everywhere else "own"
    found = [Contestant(name, solver, Worker(solver, setting)) for name, solver in solvers.items()]
    if not keep_everywhere:
        solver = solvers[OURS]
        found.insert(1, Contestant(OURS_BY_DEFAULT, solver, Worker(solver, "default")))
    return [*found, Contestant(GAUSS_NEWTON, gauss_newton, found[0].worker, ("CG",))]


def willing(problem: Problem, field: Iterable[Contestant]) -> list[Contestant]:
    """Those that can differentiate the problem that they hold; says which cannot."""
    found = []
    for contestant in field:
        try:
            contestant.worker.call(time_solve, contestant.solver, "CG", 2)
        except (ImportError, NotImplementedError) as error:
            print(left_out(contestant.name, problem, error))
        else:
            found.append(contestant)
    return found


Timings = dict[tuple[MethodName, str], list[Timing]]


def measure(field: Sequence[Contestant], products: int, rounds: int) -> Timings:
    """Everybody's solves by turns, one process at a time, after a round of warming up."""
    timings: Timings = {(m, c.name): [] for m in METHODS for c in field if m in c.methods}
    for _ in range(rounds + 1):
        for method in METHODS:
            for one in field:
                if method in one.methods:
                    timing = one.worker.call(time_solve, one.solver, method, products)
                    timings[method, one.name].append(timing)
    return {key: found[1:] for key, found in timings.items()}


def speed(timings: Timings) -> list[str]:
    """Times of whole solves, and ours over theirs within each round."""
    has_default = any(name == OURS_BY_DEFAULT for _, name in timings)
    rows = []
    for (method, name), found in timings.items():
        products = statistics.median(t.products for t in found)
        in_gradients = [t.product / t.gradient for t in found]
        row = [
            method,
            name,
            f"{1e3 * statistics.median(t.product for t in found):.3g}",
            f"{1e3 * statistics.median(t.gradient for t in found):.3g}",
            spread(in_gradients),
            f"{products * statistics.median(in_gradients):.0f} (k = {products:.0f})",
        ]
        for own, alone in ((OURS, (OURS,)), (OURS_BY_DEFAULT, (OURS, OURS_BY_DEFAULT))):
            if own == OURS or has_default:
                # Gauss-Newton is another system: a ratio would compare nothing.
                comparable = name not in (*alone, GAUSS_NEWTON)
                pairs = zip(timings[method, own], found, strict=True) if comparable else ()
                row.append(spread([o.product / t.product for o, t in pairs]))
        rows.append(row)
    header = ["method", "package", "ms a product", "ms a gradient", "product in gradients"]
    header += ["solve in gradients", "ours / theirs"]
    if has_default:
        header.append("ours, default allocator / theirs")
    return markdown(header, rows)


WEIGHT_GRADIENT_HEADER = [
    "problem",
    "difference",
    "error of ours",
    "error of double backward",
    "ms, ours",
    "ms, double backward",
    "ours / double backward",
]


def weight_gradients(problem: Problem, worker: Worker, rounds: int) -> list[str]:
    """The row of a problem: `weight_gradient` beside double backward."""
    errors = worker.call(weight_gradient_errors)
    times = [worker.call(time_weight_gradients) for _ in range(rounds + 1)][1:]
    milliseconds = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
    ratios = [pushed / pulled for pushed, pulled in times]
    return [
        problem.name,
        *(f"{error:.1e}" for error in errors),
        *(f"{value:.3g}" for value in milliseconds),
        spread(ratios),
    ]


def memory(worker: Worker, hidden: Sequence[int], products: int) -> list[str]:
    """Peak of a solve, the operator included, in parameter vectors; for MLPs of several widths."""
    # The values do not matter here: damping that is large enough keeps every iteration going.
    methods: dict[str, Method | None] = {
        "the operator alone": None,
        f"CG, k = {products}": ConjugateGradient(damping=10.0, max_products=products, rtol=0.0),
        f"Neumann, k = {products}": Neumann(
            damping=10.0, step=0.05, max_products=products, rtol=0.0
        ),
        "Nystrom, rank 10": Nystrom(damping=10.0, rank=10),
        "Nystrom, rank 50": Nystrom(damping=10.0, rank=50),
    }
    sizes = []
    multiples: dict[str, list[float]] = {name: [] for name in methods}
    for width in hidden:
        build = partial(mlp, (64, width, width, 10), batch=64)
        problem = build()
        worker.hold(build, problem)
        sizes.append(f"P = {problem.rhs.numel():,}")
        for name, method in methods.items():
            multiples[name].append(worker.call(solve_memory, method))
    rows = [[name, *(f"{m:.1f}" for m in found)] for name, found in multiples.items()]
    table = markdown(["method", *sizes], rows)
    return [*table, "", *memory_verdicts(multiples)]


def growth(worker: Worker, hidden: Sequence[int], products: int, rounds: int) -> list[str]:
    """Time of a solve by conjugate gradients on MLPs of several widths, batch 64."""
    sizes, milliseconds, in_gradients = [], [], []
    for width in hidden:
        build = partial(mlp, (64, width, width, 10), batch=64)
        # Damping that keeps every iteration going.
        problem = replace(build(), damping=10.0)
        worker.hold(build, problem)
        found = [worker.call(time_solve, ours, "CG", products) for _ in range(rounds + 1)][1:]
        sizes.append(f"P = {problem.rhs.numel():,}")
        milliseconds.append(f"{1e3 * statistics.median(t.product for t in found):.3g}")
        in_gradients.append(f"{statistics.median(t.product / t.gradient for t in found):.2f}")
    rows = [["ms a product", *milliseconds], ["product in gradients", *in_gradients]]
    return markdown([f"CG, k = {products}", *sizes], rows)


def memory_verdicts(multiples: dict[str, list[float]]) -> list[str]:
    """Whether a solve takes O(P), for Nyström O(rank · P)."""
    growing = [
        f"{name}: {found[-1] / found[0]:.2f} ×"
        for name, found in multiples.items()
        if found[-1] > 1.1 * found[0]
    ]
    low, high = (multiples[f"Nystrom, rank {rank}"][-1] for rank in (10, 50))
    return [
        verdict("O(P): from the smallest to the largest P no multiple grows by 10 %", growing),
        "",
        f"Nyström takes {(high - low) / 40:.1f} vectors more for every column of its sketch.",
    ]


def tables(
    *, quick: bool, rounds: int = 7, products: int = 20, keep_memory_everywhere: bool = False
) -> None:
    """Print them all.

    Args:
        quick: under a minute: less of everything.
        rounds: of timing after a warm-up.
        products: k of the timed solves.
        keep_memory_everywhere: set the allocator of the peers' processes as ours sets its own.
    """
    # The workers inherit these; the profiler would look for a GPU and complain.
    os.environ.update(PYTHONWARNINGS="ignore", KINETO_LOG_LEVEL="9")
    warnings.simplefilter("ignore", FutureWarning)  # functorch and TorchScript, in the peers
    torch.set_num_threads(1)
    budgets, hidden = [5, 10, 20, 40], [70, 150, 280, 510, 963]
    builds: list[Callable[[], Problem]] = [mlp, wide_resnet]
    if quick:
        rounds, products, budgets, hidden = 2, 5, [5, 20], [70, 280]
        builds = [partial(mlp, batch=32), partial(wide_resnet, batch=2)]

    solvers = installed(SOLVERS)
    print(f"\n{conditions(solvers)}", flush=True)
    field = contestants(solvers, keep_memory_everywhere)  # they start meanwhile
    workers = list(dict.fromkeys(contestant.worker for contestant in field))
    for problem in (quadratic(), small_mlp()):
        lines = accuracy(problem, {**usable(problem, solvers), OURS: last_iterate}, budgets)
        show(f"Relative error at k products: {problem.name}", lines)
    allocator = "kept in all processes" if keep_memory_everywhere else "as each sets it"
    weight_rows = []
    for build in builds:
        problem = damped(build())
        for worker in workers:
            worker.hold(build, problem)
        timings = measure(willing(problem, field), products, rounds)
        show(
            f"Time of a solve: {problem.name}",
            speed(timings),
            f"Median (range) of {rounds} rounds; a gradient is one of the same process, just "
            f"before the solve; freed memory: {allocator}.",
        )
        costs = workers[0].call(product_costs, rounds)
        show(
            f"Cost of a product: {problem.name}",
            product_table(costs),
            f"Median of {rounds} rounds in one process.",
        )
        weight_rows.append(weight_gradients(problem, workers[0], rounds))
    show(
        "Hypergradient of the examples' weights: one JVP beside double backward",
        markdown(WEIGHT_GRADIENT_HEADER, weight_rows),
        f"Largest difference over largest entry, errors against double precision; times: "
        f"{rounds} rounds in one process.",
    )
    show("Time of a solve against P", growth(workers[0], hidden, products, rounds))
    # Last, as it takes gigabytes that the process then keeps.
    show(
        "Peak memory of a solve in parameter vectors",
        memory(workers[0], hidden, products),
        "Of torch's tensors, by its profiler; MLPs with tanh in single precision, batch 64, "
        "the Hessian's graph included.",
    )
    for worker in workers:
        worker.close()


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description="IHVPs beside other packages'.")
    parser.add_argument("--quick", action="store_true", help="under a minute: less of everything")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing after a warm-up")
    parser.add_argument("--products", type=int, default=20, help="k of the timed solves")
    parser.add_argument(
        "--keep-memory-everywhere",
        action="store_true",
        help="set the allocator of the peers' processes as ours sets its own",
    )
    tables(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
