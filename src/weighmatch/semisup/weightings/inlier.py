"""An inlier filter: one-vs-all heads on the classifier's features (Saito et al., 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.parts.state_file import State
from weighmatch.semisup.weightings.base import Context, Features, Weighting

# Inlier probability below which an image counts as an outlier (OpenMatch).
INLIER_CUT = 0.5


def one_vs_all_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p_y − log(1 − max_{k≠y} p_k), p = σ(logits), mean over n images, a scalar.

    Only the hardest of the other classes counts (Saito et al., 2021).

    Args:
        logits: what the inlier head of each class says, (n, classes).
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

    name = "inlier"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.cut = INLIER_CUT
        head = context.classifier.head
        # From zero: the problem is convex, and before the first fit all images score the same.
        device = context.labelled.device
        self.heads = nn.Linear(head.in_features, head.out_features, device=device)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)
        config = context.training.weighting
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def criterion(self, images: Tensor, features: Features, logits: Tensor) -> Tensor:
        with torch.no_grad():
            return inlier_probability(self.heads(features()), logits.argmax(dim=1))

    def update(self, classifier: Classifier) -> dict[str, float]:
        config, streams = self.context.training.weighting, self.context.streams
        labelled, labels = self.context.labelled, self.context.labels
        total = 0.0
        for _ in range(config.fit_steps):
            drawn = streams.draw(
                len(labelled), config.fit_batch, "labelled images for the inlier heads"
            )
            noise = streams["augmentation for the inlier heads"]
            images = self.context.views.weak(labelled[drawn], noise)
            with torch.no_grad():
                features = classifier.features(images)
            loss = one_vs_all_loss(self.heads(features), labels[drawn])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach())
        return {"inlier_loss": total / config.fit_steps}

    def state_dict(self) -> State:
        own = {"heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
