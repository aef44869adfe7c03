"""What a network sees of a stored image: the image itself or a view of it.

A run stores either pixels, which `Augmentation` turns into views as they are drawn, or features
that a frozen backbone gave of some views, of which `StoredViews` draws one.
"""

from typing import Protocol

import torch
from torch import Tensor

from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.store import ImageStore


class Views(Protocol):
    """Makes what a network sees of n stored images."""

    def plain(self, images: Tensor) -> Tensor:
        """The images as they are, float32."""

    def weak(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A weak view of each, float32."""

    def strong(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A strong view of each, float32."""


class StoredViews:
    """Draws from features (n, 1 + weak + strong, width): plain, weak and strong views in turn.

    Args:
        weak: number of weak views; 0: the plain view stands in.
        strong: number of strong views; 0: the plain view stands in.
    """

    def __init__(self, weak: int, strong: int) -> None:
        self._weak, self._strong = weak, strong

    def plain(self, images: Tensor) -> Tensor:
        return images[:, 0].float()

    def weak(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return self._drawn(images, 1, self._weak, generator)

    def strong(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return self._drawn(images, 1 + self._weak, self._strong, generator)

    def weak_of(self, pool: ImageStore, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Weak views of the images of a pool at `indices` (n,); no other view is read."""
        return self._drawn_of(pool, indices, 1, self._weak, generator)

    def strong_of(self, pool: ImageStore, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Strong views of the images of a pool at `indices` (n,); no other view is read."""
        return self._drawn_of(pool, indices, 1 + self._weak, self._strong, generator)

    def _drawn(self, images: Tensor, first: int, count: int, generator: torch.Generator) -> Tensor:
        """One of `count` views of each image, which begin at `first`."""
        views = _draw(len(images), first, count, generator).to(images.device)
        rows = torch.arange(len(images), device=images.device)
        return images[rows, views].float()

    def _drawn_of(
        self, pool: ImageStore, indices: Tensor, first: int, count: int, generator: torch.Generator
    ) -> Tensor:
        return pool.view(indices, _draw(len(indices), first, count, generator)).float()


def _draw(images: int, first: int, count: int, generator: torch.Generator) -> Tensor:
    """For each image one of `count` views that begin at `first`, or the plain one; (images,)."""
    if not count:
        return torch.zeros(images, dtype=torch.long)
    return first + torch.randint(count, (images,), generator=generator)


def make_views(training: TrainingConfig) -> Views:
    """What makes the views of a run's stored images."""
    if training.frozen:
        return StoredViews(training.features.weak_views, training.features.strong_views)
    return Augmentation(training.augmentation)
