"""The bilevel problem of the IHVP study: a weight on each image of a noisily labelled digit set.

Inner: (1/n) Σ_i w_i CE_i(θ) + (λ/2)‖θ‖² on n images, some with wrong labels, at w = 1.
Outer: cross-entropy on clean images. Hyperparameters: w (Ren et al., 2018).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from weighmatch.implicit import (
    ConjugateGradient,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    Parameters,
    extreme_eigenvalues,
    flatten,
    unflatten,
)
from weighmatch.semisup.parts.networks import small_cnn_trunk
from weighmatch.studies.config import INDEFINITE, StudyConfig, parse_network
from weighmatch.studies.minimise import descend

CLASSES = 10
# Stage at the end of Adam's steps, from which L-BFGS goes on.
_END_OF_ADAM = 0.9999
# Largest entry of the gradient at a minimum.
_MINIMUM_TOLERANCE = 1e-9
# Snapshots among which the most indefinite one is looked for, as fractions of the training.
_SEARCHED_STAGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)


@dataclass(frozen=True)
class Point:
    """Where training has come to.

    Attributes:
        stage: fraction of the training, or "indefinite".
        progress: fraction of the training.
        params: θ.
        second_moment: Adam's bias-corrected mean of squared gradients, as `params`.
    """

    stage: float | str
    progress: float
    params: Parameters
    second_moment: Parameters


@dataclass(frozen=True)
class WeighingProblem:
    """One network on one draw of images and noise.

    Attributes:
        name: name of the network, such as "mlp-16".
        network: in double precision; its own parameters are the initial ones.
        inputs: inner images (n, 1, 8, 8) in [−0.5, 0.5].
        labels: their classes, some of them wrong, (n,).
        outer_inputs: (m, 1, 8, 8).
        outer_labels: (m,).
        l2: λ.
    """

    name: str
    network: nn.Module
    inputs: Tensor
    labels: Tensor
    outer_inputs: Tensor
    outer_labels: Tensor
    l2: float

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def has_minimum(self) -> bool:
        """False with group normalisation: the loss does not see the scale of a convolution, L2
        shrinks it for ever, and the curvature grows as it shrinks.
        """
        return not any(isinstance(module, nn.GroupNorm) for module in self.network.modules())

    def initial(self) -> Parameters:
        return {name: p.detach().clone() for name, p in self.network.named_parameters()}

    def _logits(self, params: Parameters, inputs: Tensor) -> Tensor:
        dtype = next(iter(params.values())).dtype
        z: Tensor = functional_call(self.network, params, (inputs.to(dtype),))
        return z

    def _batch(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        if rows is None:
            return self.inputs, self.labels
        return self.inputs[rows], self.labels[rows]

    def example_losses(self, params: Parameters) -> Tensor:
        """CE_i / n, (n,): what the weights multiply."""
        losses = F.cross_entropy(self._logits(params, self.inputs), self.labels, reduction="none")
        return losses / len(self.labels)

    def inner(self, params: Parameters, weights: Tensor) -> Tensor:
        squares = torch.stack([p.square().sum() for p in params.values()]).sum()
        losses = self.example_losses(params)
        return (weights.to(losses.dtype) * losses).sum() + self.l2 / 2 * squares

    def outer(self, params: Parameters) -> Tensor:
        return F.cross_entropy(self._logits(params, self.outer_inputs), self.outer_labels)

    def outer_gradient(self, params: Parameters) -> Tensor:
        return gradient(self.outer, params)

    def hessian(self, params: Parameters, rows: Tensor | None = None) -> Hessian:
        """The Hessian of the data term, at w = 1; λ belongs to the damping."""
        inputs, labels = self._batch(rows)
        return Hessian(lambda p: F.cross_entropy(self._logits(p, inputs), labels), params)

    def gauss_newton(self, params: Parameters, rows: Tensor | None = None) -> GaussNewton:
        inputs, labels = self._batch(rows)
        return GaussNewton(
            lambda p: self._logits(p, inputs), lambda z: F.cross_entropy(z, labels), params
        )

    def empirical_fisher(self, params: Parameters, rows: Tensor | None = None) -> EmpiricalFisher:
        inputs, labels = self._batch(rows)
        return EmpiricalFisher(
            lambda p: F.cross_entropy(self._logits(p, inputs), labels, reduction="none"), params
        )

    def train(self, config: StudyConfig) -> list[Point]:
        """The points of `config.stages`, in order, then the indefinite one if there is one."""
        wanted = {*config.stages, *(_SEARCHED_STAGES if config.indefinite else ())}
        snapshots = self._adam(config.steps, sorted(wanted - {1.0}))
        if 1.0 in wanted:
            last = snapshots[_END_OF_ADAM]
            params = self._minimise(last.params) if self.has_minimum else last.params
            snapshots[1.0] = Point(1.0, 1.0, params, last.second_moment)
        points = [snapshots[stage] for stage in config.stages]
        if config.indefinite and self.has_minimum:
            points += self._most_indefinite([snapshots[stage] for stage in _SEARCHED_STAGES])
        return points

    def _most_indefinite(self, points: list[Point]) -> list[Point]:
        """The one whose Hessian with λ has the most negative eigenvalue; none where all are PSD."""
        found = []
        for point in points:
            smallest, _ = extreme_eigenvalues(self.hessian(point.params), products=30)
            found.append((smallest + self.l2, point))
        smallest, point = min(found, key=lambda pair: pair[0])
        if smallest >= 0:
            return []
        return [Point(INDEFINITE, point.progress, point.params, point.second_moment)]

    def _adam(self, steps: int, fractions: list[float]) -> dict[float, Point]:
        theta = {name: p.requires_grad_() for name, p in self.initial().items()}
        optimizer = torch.optim.Adam(theta.values(), lr=1e-2)
        weights = torch.ones(len(self.labels), dtype=torch.float64)
        # The convergence stage goes on from the end of Adam's training. In a short training
        # several fractions are the same step.
        wanted = {fraction: round(fraction * steps) for fraction in [*fractions, _END_OF_ADAM]}
        points = {}
        for step in range(steps + 1):
            optimizer.zero_grad()
            self.inner(theta, weights).backward()
            for fraction in [f for f, at in wanted.items() if at == step]:
                params = {name: p.detach().clone() for name, p in theta.items()}
                points[fraction] = Point(
                    fraction, step / steps, params, _second_moment(optimizer, theta)
                )
            optimizer.step()
        return points

    def _minimise(self, params: Parameters, rounds: int = 7) -> Parameters:
        """L-BFGS until Newton's method converges from where it has come to."""
        weights = torch.ones(len(self.labels), dtype=torch.float64)

        def loss_and_slopes(theta: Parameters) -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = self.inner(theta, weights)
            return loss.detach(), torch.autograd.grad(loss, list(theta.values()))

        for _ in range(rounds):
            params, _ = descend(loss_and_slopes, params, _MINIMUM_TOLERANCE, (300, 375), 100)
            params = self._newton(params, weights)
            slope = gradient(lambda theta: self.inner(theta, weights), params)
            if float(slope.abs().max()) <= _MINIMUM_TOLERANCE:
                break
        return params

    def _newton(self, params: Parameters, weights: Tensor, steps: int = 30) -> Parameters:
        """The last digits, which L-BFGS takes thousands of iterations for."""
        solver = ConjugateGradient(max_products=300, rtol=1e-4)

        def loss(theta: Parameters) -> Tensor:
            return self.inner(theta, weights)

        slope = gradient(loss, params)
        for _ in range(steps):
            if float(slope.abs().max()) <= _MINIMUM_TOLERANCE:
                break
            step = solver.solve(Hessian(loss, params), slope).value
            moved = unflatten(flatten(params) - step, params)
            slope_there = gradient(loss, moved)
            if not slope_there.norm() < slope.norm():
                break
            params, slope = moved, slope_there
        return params


def build(
    name: str,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    config: StudyConfig,
    l2: float,
    seed: int,
) -> WeighingProblem:
    """Draw images, wrong labels and the initial parameters.

    Args:
        name: name of the network, see `StudyConfig.networks`.
        images: (N, 1, 8, 8).
        labels: 0 to 9, (N,).
        config: sizes and noise.
        l2: λ.
        seed: seed of everything drawn.
    """
    rng = np.random.default_rng([seed, 2310])
    order = rng.permutation(len(images))[: config.inner + config.outer]
    scaled = torch.from_numpy(images[order]).double() / 255 - 0.5
    classes = torch.from_numpy(labels[order])
    noisy = classes[: config.inner].clone()
    wrong = torch.from_numpy(
        rng.permutation(config.inner)[: round(config.label_noise * config.inner)]
    )
    shift = torch.from_numpy(rng.integers(1, CLASSES, len(wrong)))
    noisy[wrong] = (noisy[wrong] + shift) % CLASSES
    return WeighingProblem(
        name=name,
        network=make_network(name, seed),
        inputs=scaled[: config.inner],
        labels=noisy,
        outer_inputs=scaled[config.inner :],
        outer_labels=classes[config.inner :],
        l2=l2,
    )


def make_network(name: str, seed: int) -> nn.Module:
    """A network from images (B, 1, 8, 8) to logits (B, 10), in double precision."""
    kind, width = parse_network(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module]
        if kind == "softmax":
            layers = [nn.Flatten(), nn.Linear(64, CLASSES)]
        elif kind == "mlp":
            layers = [nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, CLASSES)]
        else:
            layers = [small_cnn_trunk(1, width), nn.Linear(16 * width, CLASSES)]
        return nn.Sequential(*layers).double()


def gradient(loss: Callable[[Parameters], Tensor], params: Parameters) -> Tensor:
    """∇loss at `params`, (P,)."""
    theta = {name: p.detach().requires_grad_() for name, p in params.items()}
    gradients = torch.autograd.grad(loss(theta), list(theta.values()))
    return flatten(dict(zip(theta, gradients, strict=True)))


def _second_moment(optimizer: torch.optim.Adam, theta: Parameters) -> Parameters:
    moments = {}
    for name, p in theta.items():
        state = optimizer.state.get(p, {})
        if state:
            decay = optimizer.param_groups[0]["betas"][1]
            moments[name] = state["exp_avg_sq"] / (1 - decay ** float(state["step"]))
        else:
            # Before the first step: what it would be after it.
            assert p.grad is not None
            moments[name] = p.grad.detach().square()
    return {name: moment.clone() for name, moment in moments.items()}
