from typing import get_args

import numpy as np
import pytest
import torch

from weighmatch.semisup.config import PoolMemory
from weighmatch.semisup.parts import store
from weighmatch.semisup.parts.group import Group
from weighmatch.semisup.parts.store import ImageStore, fits

CPU = torch.device("cpu")


def draw():
    return np.random.default_rng(0).integers(0, 256, (9, 3, 4, 4), dtype=np.uint8)


def test_batches_are_the_images_asked_for():
    images = draw()
    for memory in get_args(PoolMemory):
        kept = ImageStore(images, CPU, memory)
        assert kept.memory == "device"  # on a CPU there is one memory
        assert len(kept) == 9
        assert kept.shape == (9, 3, 4, 4)
        batch = kept[torch.tensor([8, 0, 8])]
        assert batch.dtype == torch.uint8
        np.testing.assert_array_equal(batch.numpy(), images[[8, 0, 8]])


def test_a_pool_stays_on_the_host_where_it_would_crowd_the_device():
    assert fits(size=250, free=1000)
    assert not fits(size=251, free=1000)


class OtherDevice:
    """Stands in for a GPU: where batches go, and how."""

    type = "cuda"


def test_a_streamed_batch_goes_by_way_of_pinned_memory(monkeypatch):
    images, trail = draw(), []
    to = torch.Tensor.to

    def watched(tensor, *args, **kwargs):
        if args and isinstance(args[0], OtherDevice):
            trail.append(("to", tuple(tensor.shape), kwargs.get("non_blocking", False)))
            return tensor
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: trail.append(("pin", len(tensor))) or tensor
    )
    monkeypatch.setattr(store.torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    streamed = ImageStore(images, OtherDevice())
    assert streamed.memory == "host"
    assert trail == []  # nothing was copied yet
    np.testing.assert_array_equal(streamed[torch.tensor([1, 2])].numpy(), images[[1, 2]])
    assert trail == [("pin", 2), ("to", (2, 3, 4, 4), True)]
    trail.clear()
    assert ImageStore(images, OtherDevice(), "device").memory == "device"
    assert trail == [("to", (9, 3, 4, 4), False)]


class Crowd(Group):
    """Three processes, of which this one knows how many say yes."""

    rank, size = 1, 3

    def __init__(self, others):
        self.others = others

    def sum(self, tensor):
        return tensor * (1 + self.others)


@pytest.mark.parametrize(
    ("free", "others", "memory", "held"),
    [
        (4 * 432, 2, "device", 9),  # 9 images of 48 bytes are a quarter of it
        (4 * 432 - 1, 2, "sharded", 3),
        (4 * 432, 1, "host", 9),  # it fits here, and not in another process
        (4 * 144, 2, "sharded", 3),
        (4 * 144 - 1, 2, "host", 9),
    ],
)
def test_processes_shard_a_pool_that_would_crowd_each_of_them(
    free, others, memory, held, monkeypatch
):
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda t, *a, **k: t if a and isinstance(a[0], OtherDevice) else to(t, *a, **k),
    )
    monkeypatch.setattr(store.torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    kept = ImageStore(draw(), OtherDevice(), group=Crowd(others))
    assert (kept.memory, kept.held) == (memory, held)


def test_a_file_is_sharded_by_processes_of_several_machines(tmp_path):
    np.save(tmp_path / "pool.npy", draw())
    group = Crowd(2)
    for mapped, spread, memory in (
        (True, True, "sharded"),
        (True, False, "device"),
        (False, True, "device"),
    ):
        group.spread = spread
        images = np.load(tmp_path / "pool.npy", mmap_mode="r") if mapped else draw()
        assert ImageStore(images, CPU, group=group).memory == memory


def test_a_process_holds_its_part_of_the_images_chosen():
    images, rows = draw(), np.array([0, 2, 3, 8])
    for rank, expected in enumerate(([0, 2], [3, 8], [])):
        group = Crowd(2)
        group.rank = rank
        kept = ImageStore(images, CPU, "sharded", rows, group)
        assert len(kept) == 4
        assert kept.held == len(expected)
        np.testing.assert_array_equal(kept._images.numpy(), images[expected])
