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
from weighmatch.semisup.parts.streams import Rows


class Views(Protocol):
    """Makes what a network sees of n stored images, in torch's default precision.

    Where the images are a part of those that are drawn together, `rows` says which part.
    """

    def plain(self, images: Tensor) -> Tensor:
        """The images as they are."""

    def weak(self, images: Tensor, generator: torch.Generator, rows: Rows | None = None) -> Tensor:
        """A weak view of each."""

    def strong(
        self, images: Tensor, generator: torch.Generator, rows: Rows | None = None
    ) -> Tensor:
        """A strong view of each."""


class StoredViews:
    """Draws from features (n, 1 + weak + strong, width): plain, weak and strong views in turn.

    Args:
        weak: number of weak views; 0: the plain view stands in.
        strong: number of strong views; 0: the plain view stands in.
    """

    def __init__(self, weak: int, strong: int) -> None:
        self._weak, self._strong = weak, strong

    def plain(self, images: Tensor) -> Tensor:
        return _real(images[:, 0])

    def weak(self, images: Tensor, generator: torch.Generator, rows: Rows | None = None) -> Tensor:
        return self._drawn(images, 1, self._weak, generator, rows or Rows(len(images)))

    def strong(
        self, images: Tensor, generator: torch.Generator, rows: Rows | None = None
    ) -> Tensor:
        first = 1 + self._weak
        return self._drawn(images, first, self._strong, generator, rows or Rows(len(images)))

    def weak_of(
        self, pool: ImageStore, indices: Tensor, generator: torch.Generator, rows: Rows
    ) -> Tensor:
        """Weak views of the images of a pool at `indices` (n,); no other view is read."""
        return _real(pool.view(indices, _draw(rows, 1, self._weak, generator)))

    def strong_of(
        self, pool: ImageStore, indices: Tensor, generator: torch.Generator, rows: Rows
    ) -> Tensor:
        """Strong views of the images of a pool at `indices` (n,); no other view is read."""
        return _real(pool.view(indices, _draw(rows, 1 + self._weak, self._strong, generator)))

    def _drawn(
        self, images: Tensor, first: int, count: int, generator: torch.Generator, rows: Rows
    ) -> Tensor:
        """One of `count` views of each image, which begin at `first`."""
        views = _draw(rows, first, count, generator).to(images.device)
        each = torch.arange(len(images), device=images.device)
        return _real(images[each, views])


def _real(features: Tensor) -> Tensor:
    return features.to(torch.get_default_dtype())


def _draw(rows: Rows, first: int, count: int, generator: torch.Generator) -> Tensor:
    """For each image one of `count` views that begin at `first`, or the plain one; (n,)."""
    if not count:
        return torch.zeros(rows.total, dtype=torch.long)[rows.own]
    return first + torch.randint(count, (rows.total,), generator=generator)[rows.own]


def make_views(training: TrainingConfig) -> Views:
    """What makes the views of a run's stored images."""
    if training.frozen:
        return StoredViews(training.features.weak_views, training.features.strong_views)
    return Augmentation(training.augmentation)
