"""The learned weighting: a Confidence Network trained by implicit meta-learning.

One update, at classifier parameters θ (docs/method.md):

1. g = ∇_θ L_outer on strongly augmented labelled images.
2. v ≈ (C + δI)⁻¹ g, C the Gauss-Newton matrix of the weighted FixMatch loss.
3. s_i = ⟨∇_θ m_i CE_i, v⟩ of unlabelled images, by one forward-mode pass: what one more unit of
   weight on image i takes off the outer loss.
4. φ descends −mean_i s_i w_φ(u_i), whose gradient is the hypergradient; here with s_i as a
   direction, averaged over updates, and a pull of the weights towards 1.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from weighmatch.implicit import (
    ConjugateGradient,
    GaussNewton,
    Identity,
    Method,
    Neumann,
    Parameters,
    Solution,
    extreme_eigenvalues,
    weight_gradient,
)
from weighmatch.semisup.config import WeighingConfig
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.losses import (
    PseudoLabels,
    consistency_losses,
    fixmatch_loss,
    mean_one,
    pseudo_label,
)
from weighmatch.semisup.parts.networks import Classifier, WithFeatures
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams
from weighmatch.semisup.weightings import InductiveWeighting

# Updates between two Lanczos runs for λ_max, and the products of one.
PROBE_EVERY, PROBE_PRODUCTS = 10, 6


class Learned(InductiveWeighting):
    """Weights that lower the loss on labelled images.

    Args:
        labelled: uint8 (n, C, H, W), with `labels` (n,): what the classifier trains on.
        outer: images and labels of the outer loss; the same ones by default.
        pool: uint8 (N, C, H, W).
        threshold: τ, as in training.
        unlabelled_weight: λ_u, as in training.
        align: aligns the pseudo-labels' probabilities, as in training; None: nothing does.
    """

    def __init__(
        self,
        labelled: Tensor,
        labels: Tensor,
        outer: tuple[Tensor, Tensor],
        pool: ImageStore,
        augmentation: Augmentation,
        config: WeighingConfig,
        streams: Streams,
        threshold: float,
        unlabelled_weight: float,
        align: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(labelled, labels, pool, augmentation, config, streams)
        self.outer_images, self.outer_labels = outer
        self.threshold, self.unlabelled_weight = threshold, unlabelled_weight
        self.align = align
        self.updates = 0
        self.largest_eigenvalue = 0.0
        # Running means of each pool image's influence and its square (times the evidence), and how
        # much evidence they hold.
        self.influence = torch.zeros(len(pool), device=pool.device)
        self.influence_square = torch.zeros(len(pool), device=pool.device)
        self.evidence = torch.zeros(len(pool), device=pool.device)

    def update(self, classifier: Classifier) -> dict[str, float]:
        indices, weak, strong, pseudo = self._draw_pool(classifier)
        solution = self._solve(classifier, indices, weak, strong, pseudo)
        influence = self._influence(classifier, strong, pseudo, solution.value)
        self._remember(indices, influence)
        spread = self._fit()
        self.score_pool()
        self.updates += 1
        return {
            "residual": solution.residual,
            "products": float(solution.products),
            "largest_eigenvalue": self.largest_eigenvalue,
            "weight_spread": spread,
        }

    def _draw_pool(self, classifier: Classifier) -> tuple[Tensor, Tensor, Tensor, PseudoLabels]:
        """Indices of the images whose influence is measured, both views and pseudo-labels."""
        indices = self.draw(len(self.pool), self.config.influence_batch, "influence batch")
        return self._views(classifier, indices)

    def _views(
        self, classifier: Classifier, indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, PseudoLabels]:
        """The indices on the pool's device, both views and pseudo-labels."""
        images = self.pool[indices]
        noise = self.streams["augmentation for influence"]
        weak = self.augmentation.weak(images, noise)
        strong = self.augmentation.strong(images, noise)
        with torch.no_grad():
            pseudo = pseudo_label(classifier(weak), self.threshold, self.align)
        return indices.to(images.device), weak, strong, pseudo

    def _outer_gradient(self, classifier: Classifier) -> Tensor:
        """∇_θ L_outer on strongly augmented labelled images, (P,)."""
        noise = self.streams["augmentation for the outer loss"]
        drawn = self.draw(len(self.outer_images), self.config.outer_batch, "outer batch")
        outer = self.augmentation.strong(self.outer_images[drawn], noise)
        outer_loss = F.cross_entropy(classifier(outer), self.outer_labels[drawn])
        leaves = [p for p in classifier.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(outer_loss, leaves)
        return torch.cat([g.reshape(-1) for g in gradient])

    def _solve(
        self,
        classifier: Classifier,
        indices: Tensor,
        weak: Tensor,
        strong: Tensor,
        pseudo: PseudoLabels,
    ) -> Solution:
        """Solve for v at the classifier's parameters."""
        rhs = self._outer_gradient(classifier)
        params = parameters_of(classifier)
        n = min(self.config.curvature_batch, len(strong))
        noise = self.streams["augmentation for the outer loss"]
        drawn = self.draw(len(self.labelled), n, "labelled images in the curvature")
        labelled = self.augmentation.weak(self.labelled[drawn], noise)
        labels = self.labels[drawn]
        part = PseudoLabels(*(t[:n] for t in vars(pseudo).values()))
        weights = self.weights(weak[:n], part, indices[:n])
        images = torch.cat([labelled, strong[:n]])
        curvature = GaussNewton(
            lambda p: functional_call(classifier, p, (images,)),
            lambda z: fixmatch_loss(z, labels, part, weights, self.unlabelled_weight),
            params,
        )
        if self.updates % PROBE_EVERY == 0:
            _, self.largest_eigenvalue = extreme_eigenvalues(curvature, products=PROBE_PRODUCTS)
        state = {"largest_eigenvalue": self.largest_eigenvalue}
        return self._method().solve(curvature, rhs, state)

    def _method(self) -> Method:
        damping = self.config.damping * self.largest_eigenvalue
        if self.config.solver == "identity":
            return Identity(damping=damping)
        if self.config.solver == "neumann":
            return Neumann(damping=damping, max_products=self.config.max_products, rtol=1e-3)
        return ConjugateGradient(damping=damping, max_products=self.config.max_products, rtol=1e-3)

    def _influence(
        self, classifier: Classifier, strong: Tensor, pseudo: PseudoLabels, v: Tensor
    ) -> Tensor:
        """s_i over the norm of the last layer's gradient, (n,): a direction, not a loss's size."""
        network = WithFeatures(classifier)
        params = parameters_of(network)

        def losses(params: Parameters) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            logits, features = functional_call(network, params, (strong,))
            return consistency_losses(logits, pseudo), (logits, features)

        gradient, (logits, features) = weight_gradient(losses, params, v, has_aux=True)
        probabilities = logits.softmax(dim=1)
        error = probabilities - F.one_hot(pseudo.labels, probabilities.shape[1])
        norm = error.norm(dim=1) * features.norm(dim=1)
        cosine: Tensor = -gradient / norm.clamp(min=1e-6)
        return cosine

    def _remember(self, indices: Tensor, influence: Tensor) -> None:
        """Update the running means, in units of the batch's spread."""
        seen = influence != 0
        if not bool(seen.any()):
            return
        scaled = influence / influence[seen].square().mean().sqrt().clamp(min=1e-12)
        memory = self.config.memory
        chosen = indices[seen]
        self.evidence[chosen] = memory * self.evidence[chosen] + (1 - memory)
        new = scaled[seen]
        self.influence[chosen] = memory * self.influence[chosen] + (1 - memory) * new
        self.influence_square[chosen] = (
            memory * self.influence_square[chosen] + (1 - memory) * new.square()
        )

    def _fit(self) -> float:
        """Adam steps on φ; returns the spread of the weights."""
        known = self.evidence.nonzero().squeeze(1)
        if len(known) == 0:
            return 0.0
        spread = 0.0
        for _ in range(self.config.fit_steps):
            drawn = known[
                self.draw(len(known), self.config.fit_batch, "fit batch").to(known.device)
            ]
            noise = self.streams["augmentation for the confidence network"]
            weak = self.augmentation.weak(self.pool[drawn], noise)
            target = self.influence[drawn] / self.evidence[drawn]
            weights = mean_one(torch.sigmoid(self.network(weak)))
            loss = (
                -(target * weights).mean()
                + self.config.proximity / 2 * (weights - 1).square().mean()
            )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            spread = float(weights.detach().std())
        return spread

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self._measured()}

    def _measured(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "largest_eigenvalue": self.largest_eigenvalue,
            "influence": self.influence,
            "influence_square": self.influence_square,
            "evidence": self.evidence,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._load_measured(state)

    def _load_measured(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.largest_eigenvalue = state["largest_eigenvalue"]
        self.influence = state["influence"].to(self.pool.device)
        self.influence_square = state["influence_square"].to(self.pool.device)
        self.evidence = state["evidence"].to(self.pool.device)


def parameters_of(network: nn.Module) -> Parameters:
    """A copy of the parameters by name, without a graph."""
    # In the plain layout whatever that of training is: forward mode through group norm needs it
    # in torch 2.11. Cloned, since kernels of one channel pass for contiguous in either.
    return {
        name: p.detach().clone(memory_format=torch.contiguous_format)
        for name, p in network.named_parameters()
    }
