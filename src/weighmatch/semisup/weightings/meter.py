"""The influence of unlabelled images on the loss on labelled ones.

The influence of image i is s_i = ⟨∇_θ m_i CE_i, v⟩ with v ≈ (C + δI)⁻¹ ∇_θ L_outer: what one more
unit of weight on it takes off the outer loss (docs/method.md, The hypergradient).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from weighmatch.implicit import (
    ConjugateGradient,
    GaussNewton,
    Identity,
    LinearOperator,
    Method,
    Neumann,
    Parameters,
    Solution,
    Summed,
    extreme_eigenvalues,
    weight_gradient,
)
from weighmatch.semisup.config import InfluenceConfig
from weighmatch.semisup.parts.losses import (
    PseudoLabels,
    consistency_losses,
    fixmatch_loss,
    pseudo_label,
)
from weighmatch.semisup.parts.networks import Classifier, WithFeatures
from weighmatch.semisup.parts.state_file import State

if TYPE_CHECKING:
    from weighmatch.semisup.weightings.base import Context

# Updates between two Lanczos runs for λ_max, and the products of one.
PROBE_EVERY, PROBE_PRODUCTS = 10, 6
NOT_FINITE = "a gradient, the curvature or an influence is not finite; lower training.learning_rate"


class Views(NamedTuple):
    """Unlabelled images as the meter sees them.

    Attributes:
        indices: which images of the pool they are, (n,), on its device.
        weak: weak views of those that are this process's own, (m, C, H, W).
        strong: strong views of the same ones, (m, C, H, W).
        pseudo: what the classifier says of the weak views.
    """

    indices: Tensor
    weak: Tensor
    strong: Tensor
    pseudo: PseudoLabels


@dataclass
class Measured:
    """Decaying sums over the measurements of each of N pool images.

    Attributes:
        influence: weighted sum of the measured influences, in units of a batch's spread, (N,).
        influence_square: the same of their squares, (N,).
        evidence: sum of the weights, 0 (never measured) to 1, (N,).
    """

    influence: Tensor
    influence_square: Tensor
    evidence: Tensor

    @classmethod
    def nothing(cls, size: int, device: torch.device) -> "Measured":
        """No measurement of any of `size` images."""
        return cls(*(torch.zeros(size, device=device) for _ in range(3)))

    @property
    def known(self) -> Tensor:
        """Which images were measured, (N,) bool."""
        return self.evidence > 0

    def mean(self) -> Tensor:
        """Mean influence of each image, 0 where it was not measured, (N,)."""
        return self.influence / self.evidence.clamp(min=torch.finfo(torch.float32).tiny)

    def variance(self) -> Tensor:
        """Variance of the measurements of each image, 0 where there is none, (N,)."""
        square = self.influence_square / self.evidence.clamp(min=torch.finfo(torch.float32).tiny)
        return (square - self.mean().square()).clamp(min=0)

    def remember(self, indices: Tensor, influence: Tensor, memory: float) -> None:
        """Move the means of images `indices` (n,) towards new influences (n,).

        Args:
            indices: which images.
            influence: what was measured; images with an influence of 0 are left alone.
            memory: weight of the past.
        """
        seen = influence != 0
        if not bool(seen.any()):
            return
        scaled = influence / influence[seen].square().mean().sqrt().clamp(min=1e-12)
        chosen, new = indices[seen], scaled[seen]
        for sums, value in (
            (self.evidence, torch.ones_like(new)),
            (self.influence, new),
            (self.influence_square, new.square()),
        ):
            sums[chosen] = memory * sums[chosen] + (1 - memory) * value

    def to(self, device: torch.device | str) -> "Measured":
        """The same on another device."""
        return Measured(*(value.to(device) for value in vars(self).values()))


class InfluenceMeter:
    """Measures influences and remembers their means.

    Args:
        context: the data and parameters of the run.
        weigh: weights of a training batch, as in `Weighting.weights`: the curvature is that of
            the weighted loss.
    """

    def __init__(
        self,
        context: "Context",
        weigh: Callable[[Tensor, PseudoLabels, Tensor], Tensor],
    ) -> None:
        self.context, self.weigh = context, weigh
        self.measured = Measured.nothing(len(context.pool), context.pool.device)
        self.updates, self.largest_eigenvalue = 0, 0.0

    @property
    def config(self) -> InfluenceConfig:
        """The group `training.influence`."""
        return self.context.training.influence

    def measure(self, classifier: Classifier) -> dict[str, float]:
        """Measure one batch of the pool at `classifier`; returns what is worth logging.

        Raises:
            FloatingPointError: if a gradient, the curvature or an influence is not finite.
        """
        views = self.draw_views(classifier)
        solution = self.solve(classifier, views)
        influence = require_finite(self.influence(classifier, views, solution.value))
        self.measured.remember(views.indices, influence, self.config.memory)
        self.updates += 1
        return {
            "residual": solution.residual,
            "products": float(solution.products),
            "largest_eigenvalue": self.largest_eigenvalue,
        }

    def measure_at(self, classifier: Classifier, trained: Tensor, images: Tensor) -> Tensor:
        """Measure images of the pool at a classifier that is trained no further.

        Args:
            classifier: at the end of training.
            trained: indices of the pool images that it was trained on, for the curvature.
            images: indices of those to measure, (n,).

        Returns:
            Their influences, in units of their root mean square, (n,).

        Raises:
            FloatingPointError: if a gradient, the curvature or an influence is not finite.
        """
        size = self.config.curvature_batch
        drawn = trained[self.context.streams.draw(len(trained), size, "influence batch")]
        solution = self.solve(classifier, self.make_views(classifier, drawn))
        views = self.make_views(classifier, images)
        # Images that do not reach τ yet are ranked as well.
        whole = replace(views.pseudo, mask=torch.ones_like(views.pseudo.mask))
        views = views._replace(pseudo=whole)
        influence = require_finite(self.influence(classifier, views, solution.value))
        self.measured.remember(views.indices, influence, self.config.memory)
        self.updates += 1
        return influence / influence.square().mean().sqrt().clamp(min=1e-12)

    def draw_views(self, classifier: Classifier) -> Views:
        """Views of pool images drawn with replacement."""
        size, streams = len(self.context.pool), self.context.streams
        return self.make_views(classifier, streams.draw(size, self.config.batch, "influence batch"))

    def make_views(self, classifier: Classifier, indices: Tensor) -> Views:
        """Views of the pool images `indices`, (n,), of which each process makes its own."""
        context = self.context
        rows = context.group.rows(len(indices))
        images = context.pool[indices[rows.own]]
        noise = context.streams["augmentation for influence"]
        weak = context.views.weak(images, noise, rows)
        strong = context.views.strong(images, noise, rows)
        with torch.no_grad():
            pseudo = pseudo_label(classifier(weak), context.training.threshold, context.align)
        return Views(indices.to(images.device), weak, strong, pseudo)

    def outer_gradient(self, classifier: Classifier) -> Tensor:
        """∇_θ L_outer on strongly augmented labelled images of all processes, (P,)."""
        context = self.context
        images, labels = context.outer
        noise = context.streams["augmentation for the outer loss"]
        size = self.config.outer_batch
        rows = context.group.rows(size)
        drawn = context.streams.draw(len(images), size, "outer batch")[rows.own]
        outer = context.views.strong(images[drawn], noise, rows)
        outer_loss = F.cross_entropy(classifier(outer), labels[drawn]) * (len(drawn) / size)
        leaves = [p for p in classifier.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(outer_loss, leaves)
        return context.group.sum(torch.cat([g.reshape(-1) for g in gradient]))

    def solve(self, classifier: Classifier, views: Views) -> Solution:
        """V ≈ (C + δI)⁻¹ ∇_θ L_outer at the classifier's parameters.

        Raises:
            FloatingPointError: if the gradient or the curvature is not finite.
        """
        context = self.context
        rhs = require_finite(self.outer_gradient(classifier))
        params = parameters_of(classifier)
        n = min(self.config.curvature_batch, len(views.indices))
        rows, own = context.group.rows(n), context.group.share(n)
        mine = views.indices[context.group.rows(len(views.indices)).own]
        noise = context.streams["augmentation for the outer loss"]
        drawn = context.streams.draw(len(context.labelled), n, "labelled images in the curvature")
        drawn = drawn[rows.own]
        labelled = context.views.weak(context.labelled[drawn], noise, rows)
        labels = context.labels[drawn]
        part = PseudoLabels(*(t[:own] for t in vars(views.pseudo).values()))
        weights = self.weigh(views.weak[:own], part, mine[:own])
        images = torch.cat([labelled, views.strong[:own]])
        factor = context.training.unlabelled_weight
        curvature: LinearOperator = GaussNewton(
            lambda p: functional_call(classifier, p, (images,)),
            lambda z: fixmatch_loss(z, labels, part, weights, factor, (n, n)),
            params,
        )
        if context.group.size > 1:
            curvature = Summed(curvature, context.group.sum)
        if self.updates % PROBE_EVERY == 0:
            _, self.largest_eigenvalue = extreme_eigenvalues(curvature, products=PROBE_PRODUCTS)
        if not math.isfinite(self.largest_eigenvalue):
            raise FloatingPointError(NOT_FINITE)
        state = {"largest_eigenvalue": self.largest_eigenvalue}
        solution = self._method().solve(curvature, rhs, state)
        # A method that meets such a product gives its best iterate, which may be none.
        if solution.status == "diverged" and not bool(solution.value.any()):
            raise FloatingPointError(NOT_FINITE)
        return solution

    def _method(self) -> Method:
        config = self.config
        damping = config.damping * self.largest_eigenvalue
        if config.solver == "identity":
            return Identity(damping=damping)
        kind = Neumann if config.solver == "neumann" else ConjugateGradient
        return kind(damping=damping, max_products=config.max_products, rtol=1e-3)

    def influence(
        self, classifier: Classifier, views: Views, v: Tensor, cosine: bool = True
    ) -> Tensor:
        """s_i = ⟨∇_θ m_i CE_i, v⟩ of the images of all processes, (n,).

        Args:
            classifier: with parameters θ.
            views: of the images to measure.
            v: (P,).
            cosine: divide by the norm of the image's gradient in the last layer, so that a
                direction counts and not the size of a loss.
        """
        network = WithFeatures(classifier)
        params = parameters_of(network)

        def losses(params: Parameters) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            logits, features = functional_call(network, params, (views.strong,))
            return consistency_losses(logits, views.pseudo), (logits, features)

        gradient, (logits, features) = weight_gradient(losses, params, v, has_aux=True)
        influence: Tensor = -gradient
        if cosine:
            labels = views.pseudo.labels
            influence = influence / head_gradient_norm(logits.softmax(dim=1), labels, features)
        return self.context.group.gather(influence)

    def state_dict(self) -> State:
        """What a checkpoint needs to continue."""
        numbers = {"updates": self.updates, "largest_eigenvalue": self.largest_eigenvalue}
        return {**numbers, **vars(self.measured)}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`'s answer."""
        self.updates = state["updates"]
        self.largest_eigenvalue = state["largest_eigenvalue"]
        names = vars(self.measured)
        measured = Measured(**{name: state[name] for name in names})
        self.measured = measured.to(self.context.pool.device)


def require_finite(value: Tensor) -> Tensor:
    """The tensor.

    Raises:
        FloatingPointError: if it holds NaN or infinity.
    """
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(NOT_FINITE)
    return value


def head_gradient_norm(probabilities: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """Norm of the gradient of each image's cross-entropy in the weights of the head, (n,).

    Args:
        probabilities: (n, classes).
        labels: (n,).
        features: what the head sees, (n, width).
    """
    error = probabilities - F.one_hot(labels, probabilities.shape[1])
    norm: Tensor = error.norm(dim=1) * features.norm(dim=1)
    return norm.clamp(min=1e-6)


def parameters_of(network: nn.Module) -> Parameters:
    """A copy of the parameters that are trained, by name, without a graph."""
    # In the plain layout whatever that of training is: forward mode through group norm needs it
    # in torch 2.11. Cloned, since kernels of one channel pass for contiguous in either.
    return {
        name: p.detach().clone(memory_format=torch.contiguous_format)
        for name, p in network.named_parameters()
        if p.requires_grad
    }
