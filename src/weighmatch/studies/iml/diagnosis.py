"""What is wrong with a hypergradient: held against the exact one, and against another batch's."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from weighmatch.implicit import Parameters, flatten, implicit_gradient
from weighmatch.studies.iml.hypergradients import (
    CountedMatrix,
    Descent,
    Estimate,
    Hypergradients,
    factored_exact,
)
from weighmatch.studies.iml.settings import Training
from weighmatch.studies.problems import BilevelProblem
from weighmatch.studies.weighing import gradient


def diagnose(
    problem: BilevelProblem,
    training: Training,
    params: Parameters,
    hyper: Parameters,
    found: Estimate,
    rate: float,
) -> dict[str, float]:
    """Hold a hypergradient beside the exact one, with the spectrum that tells them apart.

    Args:
        problem: the problem in double precision.
        training: names method, budget and damping.
        params: θ.
        hyper: φ.
        found: the hypergradient of the training at this point.
        rate: step α of its inner descent.

    Returns:
        `cosine` and `error` of the hypergradient against the exact one on all examples without
        damping, `low_share` (of ‖H⁻¹g‖² in eigendirections below λ_max/20),
        `smallest_eigenvalue`, `largest_eigenvalue` (of H, L2 included) and, for Neumann's series,
        `unguarded_residual`: ‖(I − α(H+δI))^k g‖/‖g‖ for its α and its k terms (Lorraine, Vicol &
        Duvenaud, 2020, eq. 5), which is what would be left were it not stopped where it grows;
        above 1 it diverges.
    """
    params, hyper = in_double(params), in_double(hyper)
    matrix = problem.matrix(params, hyper)
    exact, solution = implicit_gradient(
        problem.inner,
        problem.outer,
        params,
        hyper,
        factored_exact(),
        lambda *_: CountedMatrix(matrix),
    )
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    coordinates = (vectors.T @ solution.value).square()
    low = eigenvalues < eigenvalues[-1] / 20
    ours, reference = flatten(found.gradient).double(), flatten(exact)
    row = {
        "cosine": float(F.cosine_similarity(ours, reference, dim=0)),
        "error": float((ours - reference).norm() / reference.norm()),
        "low_share": float(coordinates[low].sum() / coordinates.sum()),
        "smallest_eigenvalue": float(eigenvalues[0]),
        "largest_eigenvalue": float(eigenvalues[-1]),
    }
    if training.method == "neumann":
        damped = eigenvalues + training.damping * max(float(eigenvalues[-1]), 0.0)
        step = rate if training.neumann_step else 1 / float(damped[-1])
        outer = gradient(problem.outer, params)
        left = (1 - step * damped).abs().pow(training.budget) * (vectors.T @ outer)
        row["unguarded_residual"] = float(left.norm() / outer.norm())
    return row


def batch_cosine(
    problem: BilevelProblem,
    training: Training,
    hyper: Parameters,
    inner: Descent,
    rate: float,
    generator: torch.Generator,
) -> float:
    """Cosine of the hypergradients of two independent mini-batches at the same point.

    The mini-batches have half of the examples where training is on all; NaN for unrolled
    differentiation, whose mini-batches are past.
    """
    if training.method == "unrolled":
        return math.nan
    size = training.batch or problem.examples
    halved = replace(training, batch=size if size < problem.examples else problem.examples // 2)
    one, other = (
        flatten(
            Hypergradients(problem, halved).estimate(hyper, inner, rate, generator).gradient
        ).double()
        for _ in range(2)
    )
    return float(F.cosine_similarity(one, other, dim=0))


def in_double(tree: Parameters) -> Parameters:
    """The same in double precision."""
    return {name: leaf.double() for name, leaf in tree.items()}


@contextmanager
def buffers_kept(problem: BilevelProblem) -> Iterator[None]:
    """Leave running statistics of the network as they were."""
    kept = {k: b.clone() for k, b in problem.network.named_buffers()}
    try:
        yield
    finally:
        for k, b in problem.network.named_buffers():
            b.copy_(kept[k])


@contextmanager
def network_mode(problem: BilevelProblem, train: bool) -> Iterator[None]:
    """Batch normalisation in train or in eval mode, and in eval mode afterwards."""
    problem.network.train(train)
    try:
        yield
    finally:
        problem.network.eval()
