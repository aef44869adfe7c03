"""Control arms: weights by other people's criteria, on the code path of every other arm.

What each leaves out of its paper is said in its docstring. All keep the warm-up and the schedule
of updates that `learned` has, so that an arm differs by its weights alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from weighmatch.implicit import Parameters, weight_gradient
from weighmatch.semisup.config import WeighingConfig
from weighmatch.semisup.learned import Learned, parameters_of
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.losses import PseudoLabels, consistency_losses, mean_one
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.parts.running import RunningMean
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams, derive_seed
from weighmatch.semisup.weightings import SCORED, Weighting, confidence_weights, otsu_cut

# The Gaussian's standard deviation is the confidences' over this (the authors' code).
SIGMAS = 2.0
# Inlier probability below which an image counts as an outlier (OpenMatch).
INLIER_CUT = 0.5


def truncated_gaussian(confidence: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """1 from the mean on, exp(−(c − mean)² · `SIGMAS`²/(2 · variance)) below it, (n,).

    Chen et al. (2023) with λ_max = 1. Before any confidence was seen, at mean 0 and variance 0,
    it is 1.
    """
    below = (confidence - mean).clamp(max=0)
    spread = variance.clamp(min=torch.finfo(variance.dtype).tiny) / SIGMAS**2
    return torch.exp(-below.square() / (2 * spread))


class SoftMatch(Weighting):
    """A truncated Gaussian of the confidence in place of the threshold (Chen et al., 2023).

    Mean and variance of the confidences are running ones over the training batches from the end
    of the warm-up on. The paper starts them at 1/classes and 1 and forgets with .999 a step,
    which is slow for some thousand steps. Its uniform alignment is left out: see
    `training.distribution_alignment`.
    """

    masks = False

    def __init__(self, device: torch.device) -> None:
        self.moments = RunningMean(2, device)

    def weights(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None = None) -> Tensor:
        """Weights in [0, 1] of a training batch, (n,), which moves mean and variance first."""
        n = len(pseudo.confidence)
        variance, mean = torch.var_mean(pseudo.confidence, correction=min(1, n - 1))
        self.moments.update(torch.stack([mean, variance]))
        return self.scores(weak, pseudo, indices)

    def scores(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None) -> Tensor:
        mean, variance = self.moments.value
        return truncated_gaussian(pseudo.confidence, mean, variance)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments.load_state_dict(state["moments"])


def negative_free_energy(logits: Tensor) -> Tensor:
    """−E = logsumexp of logits (n, classes), (n,): high on what looks known (Liu et al., 2020)."""
    return logits.logsumexp(dim=1)


class Energy(Weighting):
    """Weights of two sizes by the classifier's free energy (Liu et al., 2020).

    The paper cuts where 95 % of held-out in-distribution images pass; without such images the
    cut lies where the scores of the pool fall apart (Otsu), and moves with every update. Raw
    energies are no weights, so `weighing.weights: soft` has no meaning here.
    """

    def __init__(self, pool: ImageStore, streams: Streams) -> None:
        self.pool, self.streams = pool, streams
        self.cut = float("-inf")

    def scores(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None) -> Tensor:
        return confidence_weights(negative_free_energy(pseudo.logits), self.cut)

    def update(self, classifier: Classifier) -> dict[str, float]:
        sample = torch.arange(len(self.pool))
        if len(self.pool) > SCORED:
            generator = self.streams["sample for the cut"]
            sample = torch.randint(len(self.pool), (SCORED,), generator=generator)
        with torch.no_grad():
            logits = classifier(self.pool[sample].float() / 255)
        self.cut = otsu_cut(negative_free_energy(logits))
        return {"energy_cut": -self.cut}

    def state_dict(self) -> dict[str, Any]:
        return {"cut": self.cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cut = state["cut"]


def one_vs_all_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p_y − log(1 − max_{k≠y} p_k), p = σ(logits), mean over n images, a scalar.

    Of the other classes only the hardest counts (Saito et al., 2021).

    Args:
        logits: of one inlier head a class, (n, classes).
        labels: (n,).
    """
    own = F.one_hot(labels, logits.shape[1]).bool()
    hardest = logits.masked_fill(own, float("-inf")).amax(dim=1)
    return (F.softplus(-logits[own]) + F.softplus(hardest)).mean()


def inlier_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """σ of the head of each image's class, (n,), from logits (n, classes) and labels (n,)."""
    return logits.gather(1, labels[:, None]).squeeze(1).sigmoid()


class InlierFilter(Weighting):
    """One-vs-all inlier heads on the classifier's features (Saito et al., 2021; Li et al., 2023).

    An image whose pseudo-label's head gives it less than `INLIER_CUT` is weighed down. The heads
    see detached features: the classifier is trained as in every other arm, and what the arm
    gains it gains by its weights. OpenMatch trains the features with the heads, adds entropy and
    consistency losses on unlabelled images, and outputs two logits a class (a softmax over two is
    a sigmoid of their difference); IOMatch turns the heads into targets of an open-set
    classifier. None of that is here.
    """

    def __init__(
        self,
        classifier: Classifier,
        labelled: Tensor,
        labels: Tensor,
        augmentation: Augmentation,
        config: WeighingConfig,
        streams: Streams,
    ) -> None:
        self.classifier, self.labelled, self.labels = classifier, labelled, labels
        self.augmentation, self.config, self.streams = augmentation, config, streams
        head = classifier.head
        # From zero: the problem is convex, and before the first fit all images score the same.
        self.heads = nn.Linear(head.in_features, head.out_features, device=labelled.device)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def scores(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None) -> Tensor:
        with torch.no_grad():
            logits = self.heads(self.classifier.features(weak))
        return confidence_weights(inlier_probability(logits, pseudo.labels), INLIER_CUT)

    def update(self, classifier: Classifier) -> dict[str, float]:
        total = 0.0
        for _ in range(self.config.fit_steps):
            drawn = torch.randint(
                len(self.labelled),
                (self.config.fit_batch,),
                generator=self.streams["labelled images for the inlier heads"],
            )
            noise = self.streams["augmentation for the inlier heads"]
            images = self.augmentation.weak(self.labelled[drawn], noise)
            with torch.no_grad():
                features = classifier.features(images)
            loss = one_vs_all_loss(self.heads(features), self.labels[drawn])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach())
        return {"inlier_loss": total / self.config.fit_steps}

    def state_dict(self) -> dict[str, Any]:
        return {
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "cut": INLIER_CUT,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])


class SoftmaxNetwork(nn.Module):
    """One raw score an image from its softmax vector, (B, classes) -> (B,): one hidden layer."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(classes, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, probabilities: Tensor) -> Tensor:
        scores: Tensor = self.layers(probabilities).squeeze(1)
        return scores


class SoftmaxWeights(Learned):
    """Weights from the classifier's softmax vector, by one-step hypergradients (DS3L-like).

    Guo et al. (2020) take one step of the classifier and differentiate the loss on labelled
    images through it: the hypergradient with v = ∇_θ L_outer, no curvature, here taken before the
    step. s_i = ⟨∇_θ m_i CE_i, v⟩ of one batch, a dot product, with no memory of earlier batches,
    moves a small network on p(u_i). Unlike theirs, weights have mean 1 and are pulled towards 1,
    the outer images are strongly augmented, and φ takes `fit_steps` Adam steps every `interval`
    steps. The weights are soft, whatever `weighing.weights` says.

    Args:
        classes: length of the softmax vector.
        learned: what `Learned` takes, in its order.
    """

    def __init__(self, classes: int, *learned: Any) -> None:
        self.classes = classes
        super().__init__(*learned)

    def _make_network(self) -> nn.Module:
        seed = derive_seed(self.streams.seed, "initialisation of the confidence network")
        return SoftmaxNetwork(self.classes, seed)

    def scores(self, weak: Tensor, pseudo: PseudoLabels, indices: Tensor | None) -> Tensor:
        with torch.no_grad():
            return torch.sigmoid(self.network(pseudo.probabilities))

    def update(self, classifier: Classifier) -> dict[str, float]:
        _, _, strong, pseudo = self._draw_pool(classifier)
        direction = self._outer_gradient(classifier)

        def losses(params: Parameters) -> Tensor:
            return consistency_losses(functional_call(classifier, params, (strong,)), pseudo)

        influence = -weight_gradient(losses, parameters_of(classifier), direction)
        target = influence / influence.square().mean().sqrt().clamp(min=1e-12)
        spread = 0.0
        for _ in range(self.config.fit_steps):
            weights = mean_one(torch.sigmoid(self.network(pseudo.probabilities)))
            pull = self.config.proximity / 2 * (weights - 1).square().mean()
            loss = pull - (target * weights).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            spread = float(weights.detach().std())
        return {"weight_spread": spread}


class FreeWeights(Learned):
    """One free weight an image of the pool (Ren et al., 2018; Ren, Yeh & Schwing, 2020).

    Influence is measured as for `learned`, and an image's running mean is its logit: nothing is
    fitted, so nothing carries over from one image to another. Ren et al. (2018) take one step
    from weights of zero anew at each batch; Ren, Yeh & Schwing (2020) keep a weight an image, as
    here. Transductive: images without a measurement, unseen ones above all, score 1 (no
    opinion), and on held-out images the scores rank nothing.
    """

    def _build(self) -> None:
        """No network and no optimiser: the running means are all there is."""

    def _raw(self, images: Tensor) -> Tensor:
        return torch.ones(len(images), device=images.device)

    def _fit(self) -> float:
        known = self.evidence > 0
        means = self.influence / self.evidence.clamp(min=torch.finfo(torch.float32).tiny)
        scores = torch.where(known, means.sigmoid(), 1.0)
        self.pool_scores = scores
        return float(mean_one(scores).std(correction=0))

    def score_pool(self) -> None:
        """Move the cut to where the scores of measured images fall apart."""
        assert self.pool_scores is not None
        if self.config.weights == "hard":
            self.cut = otsu_cut(self.pool_scores[self.evidence > 0])

    def state_dict(self) -> dict[str, Any]:
        return {"cut": self.cut, "pool_scores": self.pool_scores, **self._measured()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._load_scores(state)
        self._load_measured(state)
