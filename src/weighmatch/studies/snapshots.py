"""How well does the influence signal tell ID from OOD images at frozen points of a training?

Plain FixMatch is trained on a contaminated pool, and its classifier is copied on the way. On each
copy the influence of every pool image is computed as the learned arm does,

    s_i = ⟨∇_θ m_i CE_i, v⟩,   v = (C + δI)⁻¹ ∇_θ L_outer,

for dampings δ from the weight decay alone to no curvature at all, with v exact and by a few
iterations of conjugate gradients. Nothing is learned from it, so that what the signal is worth
is not mixed up with what a Confidence Network or a training makes of it.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.func import functional_call

from weighmatch.data.config import DataConfig
from weighmatch.data.source import get_source
from weighmatch.data.splits import Arrays, Splits
from weighmatch.implicit import ConjugateGradient, GaussNewton, Parameters, weight_gradient
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.losses import (
    PseudoLabels,
    consistency_losses,
    fixmatch_loss,
    pseudo_label,
)
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.parts.streams import Streams
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.weightings.meter import head_gradient_norm
from weighmatch.studies.snapshot_config import SnapshotConfig
from weighmatch.workers import one_thread

# Images whose Jacobians are taken in one pass: more would leave the cache.
JACOBIANS = 32


@dataclass(frozen=True)
class Snapshot:
    """The classifier (itself, not its average, as the learned arm takes it) after `step` steps."""

    stage: float
    step: int
    classifier: Classifier


@dataclass(frozen=True)
class Direction:
    """One v and where it comes from.

    Attributes:
        damping_ratio: δ/λ_max without the weight decay; 0: that alone, inf: no curvature.
        solver: "exact", "cg" with its budget, or "identity".
        value: v, (P,), of any positive scale.
        cosine_to_exact: cosine with the exact v of the same damping.
    """

    damping_ratio: float
    solver: str
    value: Tensor
    cosine_to_exact: float


@dataclass(frozen=True)
class PoolScores:
    """What N pool images get along k directions, means over the draws of the augmentation.

    Attributes:
        dot: the influence, (k, N); 0 in a draw where the image is not confident enough to count.
        cosine: the same over the norm of the last layer's gradient, (k, N).
        confidence: confidence of the pseudo-label, (N,).
        counted: whether the image counts in any of the draws, (N,).
    """

    dot: Tensor
    cosine: Tensor
    confidence: Tensor
    counted: Tensor


def influence_quality(
    images: NDArray[np.uint8], labels: NDArray[np.int64], config: SnapshotConfig, seed: int
) -> pd.DataFrame:
    """Train with one seed and judge the influence on each snapshot.

    Args:
        images: digits, (N, 1, 8, 8).
        labels: their classes, (N,).
        config: parameters of the study.
        seed: seed of everything drawn; it need not be one of `config.seeds`.

    Returns:
        A row a snapshot, damping, solver and score: `seed`, `stage`, `step`, `damping_ratio`
        (δ/λ_max without the weight decay; 0: the weight decay alone, inf: no curvature), `solver`
        ("exact", "cg10" for ten products, "identity"), `score` ("dot": the influence; "cosine":
        over the norm of the last layer's gradient), `auroc` (chance that the score of an ID pool
        image is above that of an OOD one), `cosine_to_exact` (of the directions v),
        `accuracy_test_seen` (%), `outer_loss` (nats), `auroc_counted` (`auroc` among the images
        that are confident enough to count in some draw; NaN without two kinds of them) and
        `auroc_confidence` (of the pseudo-label's confidence, for comparison).

    Raises:
        FloatingPointError: if the training diverges.
    """
    data_config = config.data(seed)
    splits = draw_splits(images, labels, data_config, seed)
    data = TrainingSet(splits.labelled_images, splits.labels, splits.pool.images)
    assert splits.pool.kinds is not None  # digits are contaminated on purpose
    assert splits.test_images is not None
    assert splits.test_labels is not None
    is_id = splits.pool.kinds == 0
    rows: list[dict[str, Any]] = []
    with one_thread():
        for snapshot in train(data, config, data_config.classes, seed):
            problem = SnapshotProblem(snapshot.classifier, data, config, seed)
            directions = problem.directions()
            scores = problem.scores([direction.value for direction in directions])
            accuracy = _accuracy(snapshot.classifier, splits.test_images, splits.test_labels)
            confidence = _auroc(is_id, scores.confidence)
            counted = scores.counted.numpy()
            for name in ("dot", "cosine"):
                for direction, values in zip(directions, getattr(scores, name), strict=True):
                    rows.append(
                        {
                            "seed": seed,
                            "stage": snapshot.stage,
                            "step": snapshot.step,
                            "damping_ratio": direction.damping_ratio,
                            "solver": direction.solver,
                            "score": name,
                            "auroc": _auroc(is_id, values),
                            "cosine_to_exact": direction.cosine_to_exact,
                            "accuracy_test_seen": accuracy,
                            "outer_loss": problem.outer_loss,
                            "auroc_counted": _auroc(is_id[counted], values[counted]),
                            "auroc_confidence": confidence,
                        }
                    )
    return pd.DataFrame(rows)


def draw_splits(
    images: NDArray[np.uint8], labels: NDArray[np.int64], config: DataConfig, seed: int
) -> Splits:
    """Splits of digits whose OOD images are of unseen classes."""
    no_photographs = np.zeros((1, 3, 64, 64), np.uint8)  # nothing is cut from them
    raw: Arrays = {"images": images, "labels": labels, "photographs": no_photographs}
    return get_source(config.source).draw(raw, config, seed)


def _auroc(is_id: NDArray[np.bool_], scores: Tensor) -> float:
    if is_id.all() or not is_id.any():
        return math.nan
    return float(roc_auc_score(is_id, scores.numpy()))


def _accuracy(
    classifier: Classifier, images: NDArray[np.uint8], labels: NDArray[np.int64]
) -> float:
    """Accuracy in per cent."""
    with torch.no_grad():
        predicted = classifier(torch.from_numpy(images).float() / 255).argmax(dim=1)
    return 100 * float((predicted.numpy() == labels).mean())


def train(data: TrainingSet, config: SnapshotConfig, classes: int, seed: int) -> Iterator[Snapshot]:
    """The snapshots of one FixMatch training, in the order of their steps."""
    run_config = RunConfig("fixmatch", seed, config.steps, classes, config.training())
    with TemporaryDirectory() as folder:
        run = Run(run_config, data, Path(folder))
        for stage in sorted(config.stages):
            step = max(1, round(stage * config.steps))
            while run.step < step:
                run.train_steps(min(run.batches.chunk(), step - run.step))
            yield Snapshot(stage, step, copy.deepcopy(run.classifier))


class SnapshotProblem:
    """Influence at one frozen classifier, from what a training may see.

    What is drawn depends on the seed alone, so that the snapshots of a seed are compared on the
    same views.

    Args:
        classifier: f_θ, in single precision.
        data: the images that it was trained on.
        config: parameters of the study.
        seed: seed of every draw.

    Attributes:
        outer_loss: L_outer(θ), in nats.
        rhs: ∇_θ L_outer, (P,), in double precision, as all that belongs to the systems.
        curvature: C, the Gauss-Newton matrix of FixMatch's loss on one batch.
        factor: F with F Fᵀ = C, (P, k).
    """

    def __init__(
        self, classifier: Classifier, data: TrainingSet, config: SnapshotConfig, seed: int
    ) -> None:
        self.config, self.training, self.seed = config, config.training(), seed
        self.classifier = classifier
        self.labelled = torch.from_numpy(data.labelled_images)
        self.labels = torch.from_numpy(data.labels)
        self.pool = torch.from_numpy(data.unlabelled_images)
        self.augmentation = Augmentation(self.training.augmentation)
        self._wide = copy.deepcopy(classifier).double()
        self._params: Parameters = {name: p.detach() for name, p in self._wide.named_parameters()}
        self.outer_loss, self.rhs = self._outer()
        self.curvature, self.factor = self._curvature()

    def _noise(self, purpose: str) -> torch.Generator:
        return Streams(self.seed)[f"snapshots: {purpose}"]

    def _outer(self) -> tuple[float, Tensor]:
        """L_outer and its gradient (P,)."""
        repeated = self.labelled.repeat(self.config.copies, 1, 1, 1)
        views = self.augmentation.strong(repeated, self._noise("outer loss")).double()
        loss = F.cross_entropy(self._wide(views), self.labels.repeat(self.config.copies))
        gradients = torch.autograd.grad(loss, list(self._wide.parameters()))
        return float(loss.detach()), torch.cat([g.reshape(-1) for g in gradients])

    def _curvature(self) -> tuple[GaussNewton, Tensor]:
        """C as the learned arm builds it, and F."""
        n, noise = self.config.curvature_batch, self._noise("curvature")
        drawn = torch.randint(len(self.labelled), (n,), generator=noise)
        labelled, labels = self.augmentation.weak(self.labelled[drawn], noise), self.labels[drawn]
        chosen = self.pool[torch.randint(len(self.pool), (n,), generator=noise)]
        pseudo = self._pseudo_label(self.augmentation.weak(chosen, noise))
        pseudo = replace(pseudo, mask=pseudo.mask.double())
        views = torch.cat([labelled, self.augmentation.strong(chosen, noise)]).double()
        weight = self.training.unlabelled_weight
        curvature = GaussNewton(
            lambda params: functional_call(self._wide, params, (views,)),
            lambda logits: fixmatch_loss(logits, labels, pseudo, None, weight),
            self._params,
        )
        scales = torch.cat([pseudo.mask.new_ones(n), weight * pseudo.mask]) / n
        counted = scales > 0
        return curvature, self._factor_of(views[counted], scales[counted])

    def _factor_of(self, views: Tensor, scales: Tensor) -> Tensor:
        """Jᵀ H^½, (P, n·classes), for views (n, C, H, W) whose losses count `scales`, (n,).

        One example at a time under vmap: `GaussNewton.factor` takes all of them through every
        backward pass.
        """

        def rooted(params: Parameters, view: Tensor, scale: Tensor) -> Tensor:
            logits = functional_call(self._wide, params, (view.unsqueeze(0),)).squeeze(0)
            # The Hessian of cross-entropy in the logits is R Rᵀ with R = diag(√p) − p √pᵀ.
            p = logits.detach().softmax(dim=0)
            rooted_logits: Tensor = scale.sqrt() * p.sqrt() * (logits - p @ logits)
            return rooted_logits

        jacobians = torch.func.vmap(torch.func.jacrev(rooted), (None, 0, 0))
        rows = []
        for part, scale in zip(views.split(JACOBIANS), scales.split(JACOBIANS), strict=True):
            pieces = jacobians(self._params, part, scale)
            rows.append(torch.cat([pieces[name].flatten(2) for name in self._params], dim=2))
        return torch.cat(rows).flatten(0, 1).T

    def _pseudo_label(self, weak: Tensor) -> PseudoLabels:
        with torch.no_grad():
            return pseudo_label(self.classifier(weak), self.config.threshold)

    def directions(self) -> list[Direction]:
        """For every damping, ascending, v by both solvers; then v without curvature."""
        config, factor = self.config, self.factor
        # (F Fᵀ + δI)⁻¹ g = (g − F (FᵀF + δI)⁻¹ Fᵀ g)/δ. FᵀF has the square of F's condition,
        # which does no harm here: λ_max/δ is far from the 10¹⁶ of double precision.
        eigenvalues, rotation = torch.linalg.eigh(factor.T @ factor)
        coordinates = rotation.T @ (factor.T @ self.rhs)
        found = []
        for ratio in (0.0, *sorted(config.dampings)):
            damping = self.training.weight_decay + ratio * float(eigenvalues[-1])
            inside = factor @ (rotation @ (coordinates / (eigenvalues + damping)))
            exact = (self.rhs - inside) / damping
            found.append(Direction(ratio, "exact", exact, 1.0))
            # The budget alone ends it.
            solver = ConjugateGradient(damping=damping, max_products=config.products, rtol=0.0)
            near = solver.solve(self.curvature, self.rhs).value
            cosine = float(F.cosine_similarity(near, exact, dim=0))
            found.append(Direction(ratio, f"cg{config.products}", near, cosine))
        return [*found, Direction(math.inf, "identity", self.rhs, 1.0)]

    def scores(self, directions: list[Tensor]) -> PoolScores:
        """Scores of the pool along k directions (P,), each scaled to norm 1."""
        params: Parameters = {name: p.detach() for name, p in self.classifier.named_parameters()}
        block = torch.stack([v / v.norm() for v in directions]).float()
        noise = self._noise("influence")
        draws = []
        for _ in range(self.config.draws):
            pseudo = self._pseudo_label(self.augmentation.weak(self.pool, noise))
            strong = self.augmentation.strong(self.pool, noise)
            dot = self._influences(params, strong, pseudo, block)
            cosine = dot / self._last_layer_norms(strong, pseudo)
            draws.append((dot, cosine, pseudo.confidence, pseudo.mask))
        dot, cosine, confidence, mask = (
            torch.stack(column).mean(dim=0) for column in zip(*draws, strict=True)
        )
        return PoolScores(dot, cosine, confidence, mask > 0)

    def _influences(
        self, params: Parameters, strong: Tensor, pseudo: PseudoLabels, directions: Tensor
    ) -> Tensor:
        """s_i along each of (k, P), (k, N): one forward-mode pass with a batch of tangents."""

        def losses(theta: Parameters) -> Tensor:
            return consistency_losses(functional_call(self.classifier, theta, (strong,)), pseudo)

        gradients: Tensor = torch.func.vmap(lambda v: weight_gradient(losses, params, v))(
            directions
        )
        # Where the gradient of the outer loss in an image's weight is negative, the image helps.
        return -gradients

    def _last_layer_norms(self, strong: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Norms (N,) of the gradients of CE_i in the weights of the head, as the learned arm's."""
        with torch.no_grad():
            features = self.classifier.features(strong)
            probabilities = self.classifier.head(features).softmax(dim=1)
        return head_gradient_norm(probabilities, pseudo.labels, features)
