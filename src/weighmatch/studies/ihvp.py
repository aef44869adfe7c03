"""How near do cheap IHVPs come to the exact one, at the point that training ends in?

The problem is the main job's in small: an MLP on digits, trained in float64 on labelled images
and on pool images with pseudo-labels and weights; the hyperparameters are those weights, the
outer loss is taken on strongly augmented labelled images.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from weighmatch.implicit import (
    ConjugateGradient,
    Exact,
    GaussNewton,
    Identity,
    Method,
    Neumann,
    Parameters,
    extreme_eigenvalues,
    flatten,
    weight_gradient,
)
from weighmatch.semisup.augmentation import Augmentation
from weighmatch.semisup.config import AugmentationConfig
from weighmatch.semisup.streams import Streams
from weighmatch.semisup.trainer import TrainingSet
from weighmatch.studies.config import StudyConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """A bilevel problem at its trained point.

    Attributes:
        params: θ, trained.
        curvature: makes the Gauss-Newton operator of the inner loss without its L2 term.
        example_losses: of the weighted pool images, θ -> (n,).
        outer_gradient: ∇_θ L_outer, (P,).
        inner_gradient: computes ∇_θ of the inner loss, (P,), for timing.
    """

    params: Parameters
    curvature: Callable[[], GaussNewton]
    example_losses: Callable[[Parameters], Tensor]
    outer_gradient: Tensor
    inner_gradient: Callable[[], Tensor]


def build_problem(data: TrainingSet, config: StudyConfig, seed: int) -> Problem:
    """Train the MLP on the data's labelled and first `config.pool` unlabelled images."""
    streams = Streams(seed)
    labelled = torch.from_numpy(data.labelled_images)
    labels = torch.from_numpy(data.labels)
    pool = _flat(torch.from_numpy(data.unlabelled_images[: config.pool]))
    classes = int(labels.max()) + 1
    inputs = _flat(labelled)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(inputs.shape[1], config.hidden),
            torch.nn.Tanh(),
            torch.nn.Linear(config.hidden, classes),
        ).double()
    params = {name: p.detach().clone() for name, p in network.named_parameters()}

    def logits(theta: Parameters, images: Tensor) -> Tensor:
        z: Tensor = functional_call(network, theta, (images,))
        return z

    def supervised(theta: Parameters) -> Tensor:
        return F.cross_entropy(logits(theta, inputs), labels) + _l2(theta, config.l2)

    params = _train(supervised, params, config.steps)
    pseudo = logits(params, pool).argmax(dim=1)
    everything = torch.cat([inputs, pool])

    def output_loss(z: Tensor) -> Tensor:
        n = len(labels)
        return F.cross_entropy(z[:n], labels) + F.cross_entropy(z[n:], pseudo)

    def inner(theta: Parameters) -> Tensor:
        return output_loss(logits(theta, everything)) + _l2(theta, config.l2)

    params = _train(inner, params, config.steps)
    copies = labelled.repeat(-(-192 // len(labelled)), 1, 1, 1)
    strong = Augmentation(AugmentationConfig(cutout=0.25)).strong(copies, streams["outer"])
    outer_labels = labels.repeat(len(copies) // len(labels))
    outer = _gradient(lambda p: F.cross_entropy(logits(p, _flat(strong)), outer_labels), params)
    return Problem(
        params=params,
        curvature=lambda: GaussNewton(lambda p: logits(p, everything), output_loss, params),
        example_losses=lambda p: F.cross_entropy(logits(p, pool), pseudo, reduction="none"),
        outer_gradient=outer,
        inner_gradient=lambda: _gradient(inner, params),
    )


def compare_methods(data: TrainingSet, config: StudyConfig, seed: int) -> pd.DataFrame:
    """Every method, damping and budget against the exact solve of one seed's problem.

    Returns:
        Columns `seed`, `parameters` (P), `damping_ratio` (δ/λ_max), `method`, `max_products`,
        `products`, `residual`, `status`, `ihvp_error`, `ihvp_cosine`, `hypergradient_error`,
        `hypergradient_cosine` (relative errors and cosines against exact), `error_bound`
        (relative to the exact v's norm) and `gradients` (time of the solve over the time of one
        gradient of the inner loss, same run).
    """
    problem = build_problem(data, config, seed)
    operator = problem.curvature()
    _, largest = extreme_eigenvalues(operator, products=30)
    rhs = problem.outer_gradient
    gradient_seconds = min(_timed(problem.inner_gradient)[1] for _ in range(20))
    rows = []
    for ratio in config.dampings:
        damping = ratio * largest
        exact = Exact(damping=damping).solve(operator, rhs).value
        exact_hyper = weight_gradient(problem.example_losses, problem.params, exact)
        for name, budget, method in _methods(config, damping):
            solution, seconds = _timed(partial(method.solve, operator, rhs))
            hyper = weight_gradient(problem.example_losses, problem.params, solution.value)
            bound = solution.error_bound
            rows.append(
                {
                    "seed": seed,
                    "parameters": len(rhs),
                    "damping_ratio": ratio,
                    "method": name,
                    "max_products": budget,
                    "products": solution.products,
                    "residual": solution.residual,
                    "status": solution.status,
                    "ihvp_error": _relative_error(solution.value, exact),
                    "ihvp_cosine": _cosine(solution.value, exact),
                    "hypergradient_error": _relative_error(hyper, exact_hyper),
                    "hypergradient_cosine": _cosine(hyper, exact_hyper),
                    "error_bound": None
                    if bound is None
                    else bound * float(rhs.norm() / exact.norm()),
                    "gradients": seconds / gradient_seconds,
                }
            )
    return pd.DataFrame(rows)


def _methods(config: StudyConfig, damping: float) -> Iterator[tuple[str, int, Method]]:
    yield "identity", 1, Identity(damping=damping)
    for budget in config.budgets:
        yield "neumann", budget, Neumann(damping=damping, max_products=budget, rtol=1e-12)
        yield (
            "conjugate_gradient",
            budget,
            ConjugateGradient(damping=damping, max_products=budget, rtol=1e-12),
        )


def _train(loss: Callable[[Parameters], Tensor], params: Parameters, steps: int) -> Parameters:
    theta = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(theta.values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(theta).backward()
        optimizer.step()
    return {name: p.detach() for name, p in theta.items()}


def _gradient(loss: Callable[[Parameters], Tensor], params: Parameters) -> Tensor:
    theta = {name: p.detach().requires_grad_() for name, p in params.items()}
    gradients = torch.autograd.grad(loss(theta), list(theta.values()))
    return flatten(dict(zip(theta, gradients, strict=True)))


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _flat(images: Tensor) -> Tensor:
    scaled = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    return scaled.flatten(1) - 0.5


def _l2(params: Parameters, strength: float) -> Tensor:
    return torch.stack([p.square().sum() for p in params.values()]).sum() * (strength / 2)


def _relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def _cosine(value: Tensor, reference: Tensor) -> float:
    return float(F.cosine_similarity(value, reference, dim=0))
