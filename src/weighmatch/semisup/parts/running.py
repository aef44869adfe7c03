"""Running means, and the alignment of pseudo-labels' classes that rests on one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from weighmatch.semisup.parts.group import ALONE, Group
from weighmatch.semisup.parts.state_file import State

# Weight of the past: the last 100 batches or so, of runs of some thousand steps.
DECAY = 0.99
# The least share of a class that distribution alignment reckons with.
SMALLEST_SHARE = 1e-6


class RunningMean:
    """Exponential moving average of a vector, a plain mean until it holds 1/(1 − `DECAY`) values.

    Attributes:
        value: (n,); 0 before the first update.
        seen: how many vectors were averaged.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.value = torch.zeros(size, device=device)
        self.seen = 0

    def update(self, vector: Tensor) -> None:
        """Move towards `vector`, (n,), without waiting for the device."""
        decay = min(DECAY, self.seen / (self.seen + 1))
        self.value.lerp_(vector, 1 - decay)
        self.seen += 1

    def state_dict(self) -> State:
        """What a checkpoint needs to continue."""
        return {"value": self.value, "seen": self.seen}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`'s answer."""
        self.value.copy_(state["value"])
        self.seen = state["seen"]


class DistributionAlignment:
    """p̃ ∝ p · (labelled marginal) / (running mean of p) (ReMixMatch; Berthelot et al., 2020).

    The paper averages over the last 128 batches, and labelled batches too; here the mean decays,
    and the labelled marginal is that of the labelled images themselves. Both are at least
    `SMALLEST_SHARE`, so that a class without a labelled image gives no 0/0.

    Args:
        labels: of the labelled images, (n,).
        classes: number of classes.
        group: the processes that each have a part of a batch.
    """

    def __init__(self, labels: Tensor, classes: int, group: Group = ALONE) -> None:
        dtype = torch.get_default_dtype()
        self.marginal = F.one_hot(labels, classes).to(dtype).mean(dim=0)
        self.predicted = RunningMean(classes, labels.device)
        self._group = group

    def observe(self, weak_logits: Tensor) -> None:
        """Count the predictions on a training batch, logits (n, classes)."""
        self.predicted.update(self._group.mean(weak_logits.detach().softmax(dim=1)))

    def state_dict(self) -> State:
        """What a checkpoint needs to continue."""
        return self.predicted.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`'s answer."""
        self.predicted.load_state_dict(state)

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Aligned probabilities, (n, classes); the same ones before anything was observed."""
        if not self.predicted.seen:
            return probabilities
        expected = self.marginal.clamp(min=SMALLEST_SHARE)
        aligned = probabilities * (expected / self.predicted.value.clamp(min=SMALLEST_SHARE))
        return aligned / aligned.sum(dim=1, keepdim=True)
