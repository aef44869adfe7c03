"""One training of implicit meta-learning, and where it is before every step of φ."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weighmatch.implicit import Parameters, flatten
from weighmatch.studies.iml.diagnosis import (
    batch_cosine,
    buffers_kept,
    diagnose,
    in_double,
    network_mode,
)
from weighmatch.studies.iml.hypergradients import (
    COST_OF_A_PROBE,
    SECOND_MOMENT_DECAY,
    Descent,
    Hypergradients,
    largest_eigenvalue,
)
from weighmatch.studies.iml.settings import Training
from weighmatch.studies.minimise import minimise
from weighmatch.studies.problems import BilevelProblem

# A row of the table of steps: a value by the name of its column.
Row = dict[str, Any]

# Inner losses, and outer ones, beyond which a run counts as diverged.
DIVERGED_LOSS = 50.0
# Largest entry of the inner gradient at which retraining stops: it is for test accuracy alone.
RETRAINING_TOLERANCE = 1e-4


def train(
    problem: BilevelProblem,
    training: Training,
    seed: int,
    reference: BilevelProblem | None = None,
) -> list[Row]:
    """Train, and say before every outer step where it is.

    Args:
        problem: the bilevel problem.
        training: settings of the training.
        seed: seed of mini-batches.
        reference: the same problem in double precision, for `diagnose`; None: `problem`.

    Returns:
        A row an outer step and one for the end: `outer_step`, `cost` (inner gradients spent
        so far), `inner_loss`, `outer_loss`, `outer_accuracy`, `test_accuracy`,
        `inner_gradient` (norm), `residual`, `status`, `rejected` (whether what the last update
        led to was taken back; the row then says where it went back to), `diverged`, and, where
        it was diagnosed, the columns of `diagnose`, `batch_cosine`, `step_sharpness` (α·λ_max of
        inner descent) and, with `retrain` and at the end too, `retrained_accuracy` (of θ*(φ) from
        the initial parameters, on test images). A diverged run ends early; its last row has no
        other numbers.
    """
    learner = _Learner(problem, training, seed, reference or problem)
    rows: list[Row] = []
    for outer_step in range(training.outer_steps + 1):
        learner.train_on()
        row = {"outer_step": outer_step, **learner.place()}
        rows.append(row)
        is_last = outer_step == training.outer_steps
        if row["diverged"] or is_last:
            if training.retrain:
                row["retrained_accuracy"] = learner.retrained(row)
            break
        if training.method != "none":
            learner.update(outer_step, row)
    return rows


@dataclass(frozen=True)
class _Kept:
    """Where an update of φ is made from.

    Attributes:
        inner: θ and what belongs to it.
        hyper: φ.
        mean: running mean of hypergradients.
        outer: state of the outer optimiser.
        network: running statistics of the network.
    """

    inner: Descent
    hyper: Parameters
    mean: Parameters | None
    outer: dict[int, Any]
    network: dict[str, Tensor]


class _Learner:
    """θ, φ and all that moves them."""

    def __init__(
        self, problem: BilevelProblem, training: Training, seed: int, reference: BilevelProblem
    ) -> None:
        self.problem, self.training, self.reference = problem, training, reference
        self.generator = torch.Generator().manual_seed(seed)
        # Diagnoses draw from a stream of their own, which leaves the training as it is.
        self.probes = torch.Generator().manual_seed(seed + 1)
        self.hypergradients = Hypergradients(problem, training)
        self.hyper = problem.hyperparameters()
        self.inner = Descent.begin(problem.initial)
        self.outer = _OuterOptimizer(problem, training, self.hyper)
        self.mean: Parameters | None = None
        self.kept: _Kept | None = None
        self.least_outer_loss = math.inf
        self.rate = training.step / self._largest(problem.initial)
        self.cost = COST_OF_A_PROBE

    def train_on(self) -> None:
        """T inner steps, or to convergence."""
        problem, training = self.problem, self.training
        if training.automatic_step and not training.converge:
            self.rate = min(training.step, 1.0) / self._largest(self.inner.params)
            self.cost += COST_OF_A_PROBE
        if training.converge:
            self.inner.params, spent = minimise(problem, self.hyper, dict(problem.initial))
            self.cost += spent
            self.inner.history = [(self.inner.params, None)] * training.budget
        else:
            self.inner = self.descend()
            share = (training.batch or problem.examples) / problem.examples
            self.cost += training.inner_steps * share

    def descend(self) -> Descent:
        """T steps of gradient descent with momentum."""
        problem, training, inner = self.problem, self.training, self.inner
        problem.network.train()
        params, velocity = dict(inner.params), dict(inner.velocity)
        moment, history = inner.moment, []
        for _ in range(training.inner_steps):
            rows = self.hypergradients.draw(self.generator)
            history.append((params, rows))
            _, found = problem.inner_gradient(params, self.hyper, rows)
            slopes = dict(zip(params, found, strict=True))
            if training.method == "sama":
                moment = {
                    k: SECOND_MOMENT_DECAY * moment[k] + (1 - SECOND_MOMENT_DECAY) * s.square()
                    for k, s in slopes.items()
                }
            velocity = {k: training.momentum * velocity[k] + s for k, s in slopes.items()}
            params = {k: p - self.rate * velocity[k] for k, p in params.items()}
        problem.network.eval()
        return Descent(params, velocity, history, moment, inner.taken + training.inner_steps)

    def place(self) -> Row:
        """Where it is, after the last update was taken back if it led too far."""
        where, rejected = self._losses(), False
        if self.kept is not None and self.training.backtrack is not None:
            highest = (1 + self.training.backtrack) * self.least_outer_loss
            rejected = not where.get("outer_loss", math.inf) <= highest
            if rejected:
                kept = self.kept
                self.inner, self.hyper, self.mean = kept.inner, kept.hyper, kept.mean
                self.problem.network.load_state_dict(kept.network)
                self.outer.go_back(kept.hyper, kept.outer)
                where = self._losses()
        self.least_outer_loss = min(self.least_outer_loss, where.get("outer_loss", math.inf))
        return {"cost": self.cost, **where, "rejected": rejected}

    def update(self, outer_step: int, row: Row) -> None:
        """A step of φ along the hypergradient; `row` gets what is known of it."""
        problem, training = self.problem, self.training
        if training.renew > 0 and outer_step % training.renew == 0:
            self.hypergradients.state.clear()
        with network_mode(problem, not training.frozen_statistics):
            found = self.hypergradients.estimate(self.hyper, self.inner, self.rate, self.generator)
        self.cost += found.cost
        row.update(residual=found.residual, status=found.status)
        if training.diagnose and (outer_step + 1) % training.diagnose == 0:
            # Batch normalisation with the statistics that the run has.
            self.reference.network.load_state_dict(problem.network.state_dict())
            self.reference.network.eval()
            row |= diagnose(
                self.reference, training, self.inner.params, self.hyper, found, self.rate
            )
            with buffers_kept(problem), network_mode(problem, not training.frozen_statistics):
                row["batch_cosine"] = batch_cosine(
                    problem, training, self.hyper, self.inner, self.rate, self.probes
                )
            if not training.converge:
                row["step_sharpness"] = self.rate * row["largest_eigenvalue"]
            # The end is retrained anyway; at convergence it costs nothing.
            if training.retrain and (training.converge or outer_step + 1 < training.outer_steps):
                row["retrained_accuracy"] = self.retrained(row)
        if training.backtrack is not None:
            network = {k: b.clone() for k, b in problem.network.state_dict().items()}
            self.kept = _Kept(self.inner, self.hyper, self.mean, self.outer.state(), network)
        gradient = _normalised(found.gradient) if training.normalise else found.gradient
        if training.average:
            past, weight = gradient if self.mean is None else self.mean, training.average
            gradient = {k: weight * past[k] + (1 - weight) * g for k, g in gradient.items()}
            self.mean = gradient
        self.hyper = self.outer.update(gradient)

    def retrained(self, row: Mapping[str, Any]) -> float:
        """Test accuracy of θ*(φ) from the initial parameters."""
        if self.training.converge and not row["diverged"]:
            return float(row["test_accuracy"])  # that is where θ is
        exact, start = self.reference, in_double(self.reference.initial)
        found, _ = minimise(exact, in_double(self.hyper), start, tolerance=RETRAINING_TOLERANCE)
        return exact.test_accuracy(found)

    def _largest(self, params: Parameters) -> float:
        """λ_max of the inner loss on all examples, as training sees it; NaN if not finite."""
        with buffers_kept(self.problem), network_mode(self.problem, True):
            largest = largest_eigenvalue(self.problem.hessian(params, self.hyper))
        return max(largest, 1e-3) if math.isfinite(largest) else math.nan

    def _losses(self) -> Row:
        """Losses and accuracy at θ."""
        problem, params = self.problem, self.inner.params
        problem.network.eval()
        loss, slopes = problem.inner_gradient(params, self.hyper)
        with torch.no_grad():
            outer_loss = float(problem.outer(params))
        inner_loss = float(loss)
        if not (inner_loss < DIVERGED_LOSS and outer_loss < DIVERGED_LOSS):
            return {"diverged": True}
        return {
            "inner_loss": inner_loss,
            "outer_loss": outer_loss,
            "outer_accuracy": problem.outer_accuracy(params),
            "test_accuracy": problem.test_accuracy(params),
            "inner_gradient": float(torch.cat([s.reshape(-1) for s in slopes]).norm()),
            "diverged": False,
        }


def _normalised(gradient: Parameters) -> Parameters:
    """The gradient with norm 1; zero where it overflowed or is zero."""
    norm = float(flatten(gradient).double().norm())
    scale = 1 / norm if 0 < norm < math.inf else 0.0
    return {k: scale * torch.nan_to_num(g) for k, g in gradient.items()}


class _OuterOptimizer:
    """φ and the optimiser that moves it."""

    def __init__(self, problem: BilevelProblem, training: Training, hyper: Parameters) -> None:
        rate = problem.outer_rate if training.outer_rate is None else training.outer_rate
        rate *= training.outer_factor
        self._leaves = {k: h.clone().requires_grad_() for k, h in hyper.items()}
        leaves = list(self._leaves.values())
        # Single steps on a few numbers: the plain loops are the fastest.
        self._optimizer: torch.optim.Optimizer
        if training.outer_rule == "adam":
            self._optimizer = torch.optim.Adam(leaves, lr=rate, betas=(0.9, 0.99), foreach=False)
        else:
            self._optimizer = torch.optim.SGD(leaves, lr=rate, foreach=False)

    def update(self, gradient: Mapping[str, Tensor]) -> Parameters:
        """φ after a step along a hypergradient."""
        for k, leaf in self._leaves.items():
            leaf.grad = gradient[k].to(leaf.dtype)
        self._optimizer.step()
        return {k: leaf.detach().clone() for k, leaf in self._leaves.items()}

    def state(self) -> dict[int, Any]:
        """The optimiser's state, for `go_back`."""
        return copy.deepcopy(self._optimizer.state_dict()["state"])

    def go_back(self, hyper: Parameters, state: dict[int, Any]) -> None:
        """Go back to φ and `state`, with half of the rate that it has now."""
        with torch.no_grad():
            for k, leaf in self._leaves.items():
                leaf.copy_(hyper[k])
        groups = self._optimizer.state_dict()["param_groups"]
        for group in groups:
            group["lr"] /= 2
        self._optimizer.load_state_dict({"state": copy.deepcopy(state), "param_groups": groups})
