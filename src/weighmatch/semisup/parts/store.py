"""Where images lie while a run draws batches from them."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.semisup.config import PoolMemory
from weighmatch.semisup.parts.group import ALONE, Group

# Pixels (n, C, H, W), or features of views of n images, (n, views, width).
Stored = NDArray[np.uint8] | NDArray[np.float16]
# Of a GPU's free memory, the share that images may take; the rest is for training.
SHARE = 0.25


class ImageStore:
    """Stored images, N of them, given out batch by batch on a device.

    Where they are sharded, each process of a group holds a part of them, and the processes give
    one another the images of a batch: all of them have to ask at the same time. Images that lie in
    the host's memory go over by way of pinned memory, without the host waiting for it.

    Args:
        images: M of them, pixels or features (`Stored`), which may be a memory map.
        device: where batches are given out.
        memory: where the images lie, see `TrainingConfig.pool_memory`.
        rows: the N images to give out, (N,); None: all of them.
        group: the processes that draw from them together.

    Attributes:
        device: where batches are given out.
        memory: where the images lie, which is never "auto".
        held: how many images this process holds or maps.
    """

    def __init__(
        self,
        images: Stored,
        device: torch.device,
        memory: PoolMemory = "auto",
        rows: NDArray[np.int64] | None = None,
        group: Group = ALONE,
    ) -> None:
        self.device, self._group = device, group
        count = len(images) if rows is None else len(rows)
        self.shape = torch.Size((count, *images.shape[1:]))
        self._part = -(-count // group.size)
        self.memory = _choose(images, device, memory, self._part, group)
        if self.memory == "sharded":
            own = slice(group.rank * self._part, (group.rank + 1) * self._part)
            chosen: Any = images[own if rows is None else rows[own]]
            images, rows = np.array(chosen), None
        self.held = len(images)
        host = as_tensor(images)
        self._images = host if self.memory == "host" else host.to(device)
        self._rows = None if rows is None else as_tensor(rows).to(self._images.device)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Images at `indices` (n,), which may lie anywhere, on the device."""
        return self._given_out(self._images, indices)

    def view(self, indices: Tensor, views: Tensor) -> Tensor:
        """Of stored features at `indices` (n,) one view each, named by `views` (n,): (n, width)."""
        return self._given_out(self._images.flatten(0, 1), indices, views)

    def _given_out(self, images: Tensor, indices: Tensor, views: Tensor | None = None) -> Tensor:
        """Rows of `images`, which has `shape[1]` rows for each image where there are views."""
        if self.memory == "sharded":
            owners = indices // self._part
            places = indices - owners * self._part
            if views is not None:
                places = places * self.shape[1] + views.to(places.device)
            return self._group.fetch(images, owners, places)
        at_once = self.memory == "device"
        places = indices.to(images.device, non_blocking=at_once)
        if self._rows is not None:
            places = self._rows.index_select(0, places)
        if views is not None:
            places = places * self.shape[1] + views.to(places.device, non_blocking=at_once)
        batch = images.index_select(0, places)
        return batch if at_once else batch.pin_memory().to(self.device, non_blocking=True)


def _choose(
    images: Stored, device: torch.device, memory: PoolMemory, part: int, group: Group
) -> PoolMemory:
    """Where images lie, the same in all processes; on a CPU the host's memory is the device's.

    Args:
        images: M of them.
        device: where batches are given out.
        memory: what is asked for.
        part: how many images a process holds if they are sharded.
        group: the processes.
    """
    alone = group.size == 1
    if memory == "auto" and device.type == "cpu":
        # A file that other machines read by the network is best read once.
        memory = "sharded" if group.spread and isinstance(images, np.memmap) else "device"
    if (memory == "host" and device.type == "cpu") or (memory == "sharded" and alone):
        return "device"
    if memory != "auto":
        return memory
    free = torch.cuda.mem_get_info(device)[0]
    sizes = (images.nbytes, part * (images.nbytes // max(1, len(images))))
    # Processes may have GPUs of different sizes.
    whole, sharded = group.sum(torch.tensor([fits(size, free) for size in sizes], dtype=torch.long))
    if whole == group.size:
        return "device"
    return "host" if alone or sharded < group.size else "sharded"


def as_tensor(array: NDArray[Any]) -> Tensor:
    """The array as a tensor that shares its memory and is only read, also of a read-only file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)


def fits(size: int, free: int) -> bool:
    """Whether images of `size` bytes may lie on a device with `free` bytes."""
    return size <= SHARE * free
