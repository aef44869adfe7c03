"""The views of many steps, made together: one pass over many images instead of many passes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.parts.group import ALONE, Group
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams
from weighmatch.semisup.parts.views import StoredViews, Views

# Steps whose images are augmented together, and the bytes that their views may take.
CHUNK, CHUNK_BYTES = 100, 2**28


class Batch(NamedTuple):
    """What a process sees of a step: of B labelled and µB unlabelled images its own, n together.

    Attributes:
        images: labelled weak views and after them the strong views, (n, C, H, W).
        labels: of the labelled images, (b,); b is B where there is one process.
        weak: weak views, (u, C, H, W); u is µB where there is one process.
        indices: which images of the pool they are, (u,).
    """

    images: Tensor
    labels: Tensor
    weak: Tensor | None = None
    indices: Tensor | None = None


class Batches:
    """Draws and augments the images of steps.

    Args:
        labelled: stored images, uint8 (n, C, H, W), or stored features, see `TrainingSet`.
        labels: (n,).
        pool: the unlabelled images.
        training: batch size, ratio and layout.
        views: makes the views.
        streams: random streams by purpose.
        with_pool: whether steps see unlabelled images.
        group: the processes among which each batch is divided; they draw the same streams.

    Attributes:
        batch: labelled images of a step, in all processes together.
        unlabelled: unlabelled images of a step, in all processes together.
    """

    def __init__(
        self,
        labelled: Tensor,
        labels: Tensor,
        pool: ImageStore,
        training: TrainingConfig,
        views: Views,
        streams: Streams,
        with_pool: bool,
        group: Group = ALONE,
    ) -> None:
        self.group = group
        self.labelled, self.labels, self.pool = labelled, labels, pool
        self.views, self.streams = views, streams
        self.batch = training.batch_size
        self.unlabelled = training.unlabelled_ratio * self.batch if with_pool else 0
        self.layout = torch.channels_last if training.channels_last else torch.contiguous_format

    def chunk(self) -> int:
        """How many steps' images are augmented together; no result depends on it."""
        views = self.batch + 2 * self.unlabelled
        # What a step sees of stored features is one view.
        shape = self.pool.shape
        numbers = math.prod(shape[1:]) if len(shape) == 4 else shape[-1]
        return max(1, min(CHUNK, CHUNK_BYTES // (4 * views * numbers)))

    def arranged(self, images: Tensor) -> Tensor:
        """The images in the memory layout of training."""
        return images.contiguous(
            memory_format=self.layout if images.ndim == 4 else torch.contiguous_format
        )

    def draw(self, size: int) -> list[Batch]:
        """The batches of `size` steps; every process makes the views of its own images."""
        rows = self.group.rows(self.batch, size)
        batch = self.group.share(self.batch)
        drawn = self.streams.draw(len(self.labelled), rows.total, "labelled batches")[rows.own]
        drawn = drawn.to(self.pool.device, non_blocking=True)
        noise = self.streams["augmentation of labelled images"]
        labelled = self.views.weak(self.labelled[drawn], noise, rows)
        labels = self.labels[drawn].split(batch)
        if not self.unlabelled:
            parts = self.arranged(labelled).split(batch)
            return [Batch(*pair) for pair in zip(parts, labels, strict=True)]
        rows = self.group.rows(self.unlabelled, size)
        unlabelled = self.group.share(self.unlabelled)
        chosen = self.streams.draw(len(self.pool), rows.total, "unlabelled batches")[rows.own]
        weak_noise = self.streams["weak views of unlabelled images"]
        strong_noise = self.streams["strong views of unlabelled images"]
        if isinstance(self.views, StoredViews):
            weak = self.views.weak_of(self.pool, chosen, weak_noise, rows)
            strong = self.views.strong_of(self.pool, chosen, strong_noise, rows)
        else:
            images = self.pool[chosen]
            weak = self.views.weak(images, weak_noise, rows)
            strong = self.views.strong(images, strong_noise, rows)
        weak_batches = self.arranged(weak).split(unlabelled)
        # Only what is differentiated shares a pass: the weak view needs no backward.
        both = torch.cat(
            [labelled.unflatten(0, (size, batch)), strong.unflatten(0, (size, unlabelled))], dim=1
        )
        together = self.arranged(both.flatten(0, 1)).split(batch + unlabelled)
        indices = chosen.to(self.pool.device, non_blocking=True).split(unlabelled)
        columns = zip(together, labels, weak_batches, indices, strict=True)
        return [Batch(*parts) for parts in columns]


def first_half_of_each_class(labels: Tensor) -> Tensor:
    """True for the first ⌈half⌉ of the images of each class, (n,)."""
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        kept[members[: (len(members) + 1) // 2]] = True
    return kept
