"""Where images lie while a run draws batches from them."""

import warnings
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Pixels (n, C, H, W), or features of views of n images, (n, views, width).
Stored = NDArray[np.uint8] | NDArray[np.float16]
# Of a GPU's free memory, the share that images may take; the rest is for training.
SHARE = 0.25


class ImageStore:
    """Stored images, N of them, given out batch by batch on a device.

    They lie on the device if they fit; else in the host's memory, and every batch goes over by
    way of pinned memory, without the host waiting for it.

    Args:
        images: M of them, pixels or features (`Stored`), which may be a memory map.
        device: where batches are given out.
        memory: where the images lie, see `TrainingConfig.pool_memory`.
        rows: the N images to give out, (N,); None: all of them.

    Attributes:
        device: where batches are given out.
        resident: whether the images lie there.
    """

    def __init__(
        self,
        images: Stored,
        device: torch.device,
        memory: Literal["auto", "device", "host"] = "auto",
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.device = device
        count = len(images) if rows is None else len(rows)
        self.shape = torch.Size((count, *images.shape[1:]))
        resident = memory == "device" or device.type == "cpu"
        if memory == "auto" and not resident:
            resident = fits(images.nbytes, torch.cuda.mem_get_info(device)[0])
        self.resident = resident
        host = as_tensor(images)
        self._images = host.to(device) if resident else host
        self._rows = None if rows is None else as_tensor(rows).to(self._images.device)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Images at `indices` (n,), which may lie anywhere, on the device."""
        return self._given_out(self._images, self._places(indices))

    def view(self, indices: Tensor, views: Tensor) -> Tensor:
        """Of stored features at `indices` (n,) one view each, named by `views` (n,): (n, width)."""
        places = self._places(indices) * self.shape[1]
        views = views.to(places.device, non_blocking=self.resident)
        return self._given_out(self._images.flatten(0, 1), places + views)

    def _places(self, indices: Tensor) -> Tensor:
        indices = indices.to(self._images.device, non_blocking=self.resident)
        return indices if self._rows is None else self._rows.index_select(0, indices)

    def _given_out(self, images: Tensor, places: Tensor) -> Tensor:
        batch = images.index_select(0, places)
        if self.resident:
            return batch
        return batch.pin_memory().to(self.device, non_blocking=True)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """The array as a tensor that shares its memory and is only read, also of a read-only file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)


def fits(size: int, free: int) -> bool:
    """Whether images of `size` bytes may lie on a device with `free` bytes."""
    return size <= SHARE * free
