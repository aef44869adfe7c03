"""FixMatch's loss with a weight on every unlabelled image."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weighmatch.semisup.parts.group import ALONE, Group


@dataclass(frozen=True)
class PseudoLabels:
    """What the weak view of unlabelled images says.

    Attributes:
        probabilities: (n, classes), without a graph.
        labels: argmax, (n,).
        confidence: max, (n,).
        mask: 1 where the confidence reaches τ, else 0, (n,).
        logits: before the softmax and any alignment, (n, classes), without a graph.
    """

    probabilities: Tensor
    labels: Tensor
    confidence: Tensor
    mask: Tensor
    logits: Tensor


def pseudo_label(
    weak_logits: Tensor, threshold: float, align: Callable[[Tensor], Tensor] | None = None
) -> PseudoLabels:
    """Pseudo-labels and mask from logits of the weak view (Sohn et al., 2020).

    Args:
        weak_logits: (n, classes).
        threshold: τ.
        align: from probabilities (n, classes) to aligned ones; labels, confidence and mask follow
            from these.
    """
    logits = weak_logits.detach()
    probabilities = logits.softmax(dim=1)
    if align is not None:
        probabilities = align(probabilities)
    confidence, labels = probabilities.max(dim=1)
    mask = (confidence >= threshold).to(confidence.dtype)
    return PseudoLabels(probabilities, labels, confidence, mask, logits)


def consistency_losses(strong_logits: Tensor, pseudo: PseudoLabels) -> Tensor:
    """m_i · CE(p(A(u_i)), q_i), (n,)."""
    return pseudo.mask * F.cross_entropy(strong_logits, pseudo.labels, reduction="none")


def fixmatch_loss(
    logits: Tensor,
    labels: Tensor,
    pseudo: PseudoLabels,
    weights: Tensor | None,
    unlabelled_weight: float,
    whole: tuple[int, int] | None = None,
) -> Tensor:
    """CE(labelled) + λ_u · mean_i(w_i m_i CE(p(A(u_i)), q_i)), a scalar.

    The mean is over all unlabelled images of the batch, masked or not (Sohn et al., 2020,
    equations 3 and 4, with weights).

    Args:
        logits: of B labelled images and after them of the strong views, (B + µB, classes).
        labels: (B,).
        pseudo: of the weak views.
        weights: w_i, (µB,); None: 1.
        unlabelled_weight: λ_u.
        whole: labelled and unlabelled images of the batch that these are a part of, so that the
            losses of all parts add up to that of the batch; None: these are the batch.
    """
    of_labelled, of_unlabelled = whole or (len(labels), len(pseudo.mask))
    factors = pseudo.mask * (unlabelled_weight / of_unlabelled)
    if weights is not None:
        factors = weights * factors
    # One cross-entropy over all, of few operations: on a small network each of them shows.
    targets = torch.cat([labels, pseudo.labels])
    losses = F.nll_loss(logits.log_softmax(dim=1), targets, reduction="none")
    return losses.dot(torch.cat([factors.new_full(labels.shape, 1 / of_labelled), factors]))


def mean_one(scores: Tensor, group: Group = ALONE) -> Tensor:
    """Positive scores (n,) scaled to mean 1 over the batch, of which each process has a part."""
    return scores / group.mean(scores).clamp(min=torch.finfo(scores.dtype).tiny)
