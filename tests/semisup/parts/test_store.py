import numpy as np
import torch

from weighmatch.semisup.parts import store
from weighmatch.semisup.parts.store import ImageStore, fits

CPU = torch.device("cpu")


def draw():
    return np.random.default_rng(0).integers(0, 256, (9, 3, 4, 4), dtype=np.uint8)


def test_batches_are_the_images_asked_for():
    images = draw()
    for memory in ("auto", "device", "host"):
        kept = ImageStore(images, CPU, memory)
        assert kept.resident  # on a CPU there is one memory
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
    assert not streamed.resident
    assert trail == []  # nothing was copied yet
    np.testing.assert_array_equal(streamed[torch.tensor([1, 2])].numpy(), images[[1, 2]])
    assert trail == [("pin", 2), ("to", (2, 3, 4, 4), True)]
    trail.clear()
    assert ImageStore(images, OtherDevice(), "device").resident
    assert trail == [("to", (9, 3, 4, 4), False)]
