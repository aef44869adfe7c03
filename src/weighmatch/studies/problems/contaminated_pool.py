"""A weight on every image of an unlabelled pool, three quarters of it of unseen classes.

The pseudo-labels are those of a teacher trained on the labelled images, and stay: the smallest
problem that has what FixMatch's consistency loss has to weigh (docs/method.md, Two levels).
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.implicit import Parameters
from weighmatch.studies.digits import Digits, Size, require_images, scaled
from weighmatch.studies.minimise import minimise
from weighmatch.studies.names import LABELLED, MISMATCH
from weighmatch.studies.problems.contract import BilevelProblem

SEEN = 6


class ContaminatedPool(BilevelProblem):
    """φ: one number a pool image; its weight is 2σ(φ_i), 1 at the start.

    The first 24 inner images are labelled, the others are the pool. `Digits.wrong` marks images
    of unseen classes.
    """

    name = "contaminated_pool"
    outer_rate = 0.2

    def __init__(self, digits: Digits, size: Size, seed: int) -> None:
        super().__init__(digits, size, seed)
        self._labels = digits.inner_labels
        unweighted = {"raw": torch.full_like(self._start(), -40.0)}
        teacher, _ = minimise(self, unweighted, self.initial)
        with torch.no_grad():
            pseudo = self.forward(teacher, digits.inner[LABELLED:]).argmax(1)
        self._labels = torch.cat([digits.inner_labels[:LABELLED], pseudo])

    @classmethod
    def draw(
        cls, images: NDArray[np.uint8], labels: NDArray[np.int64], size: Size, seed: int
    ) -> Digits:
        """Labelled, outer and test images of the classes 0–5, and the pool, for one seed."""
        if size.inner <= LABELLED:
            raise ValueError(
                f"{cls.name} needs more than {LABELLED} inner images, got {size.inner}"
            )
        rng = np.random.default_rng([seed, 6022])
        order = rng.permutation(len(images))
        seen, unseen = order[labels[order] < SEEN], order[labels[order] >= SEEN]
        intruders = round(MISMATCH * (size.inner - LABELLED))
        known = size.inner - intruders
        require_images(cls.name, size, known + size.outer + size.test, len(seen))
        require_images(cls.name, size, intruders, len(unseen))
        inner = np.concatenate([seen[:known], unseen[:intruders]])
        outer, test = np.split(seen[known:], [size.outer])[:2]
        wrong = torch.arange(size.inner) >= known
        return scaled(images, labels, inner, wrong, outer, test[: size.test])

    def _start(self) -> Tensor:
        return torch.zeros(self.examples - LABELLED, dtype=self.digits.inner.dtype)

    def hyperparameters(self) -> Parameters:
        return {"raw": self._start()}

    def example_losses(
        self, logits: Tensor, hyper: Parameters, rows: Tensor | None = None
    ) -> Tensor:
        count, raw = self.examples, hyper["raw"]
        # The mean over all is then the labelled mean plus the pool's.
        labelled = raw.new_full((LABELLED,), count / LABELLED)
        weights = torch.cat([labelled, 2 * raw.sigmoid() * count / len(raw)])
        labels = self._labels
        if rows is not None:
            labels, weights = labels[rows], weights[rows]
        return weights * F.cross_entropy(logits, labels, reduction="none")
