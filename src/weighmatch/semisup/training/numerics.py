"""How a run computes: its algorithms and the precision of its numbers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from weighmatch.semisup.parts.group import ALONE, Group


@contextmanager
def algorithms(deterministic: bool, group: Group = ALONE) -> Iterator[None]:
    """Repeatable algorithms, or else, on a GPU, the fastest for the shapes at hand.

    Several processes have repeatable ones where there are any, as they have to come to the same
    bits in what each of them computes by itself.

    Either way single precision is that, in convolutions, too, which cuDNN would cut to 10 bits
    (TF32): curvature products and hypergradients rely on it.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    tf32 = torch.backends.cudnn.allow_tf32
    wanted = deterministic or group.size > 1
    if wanted:
        # cuBLAS reads it when a process first multiplies matrices on the GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    lenient = not deterministic and (warns or not before[0])
    torch.use_deterministic_algorithms(wanted or before[0], warn_only=lenient)
    torch.backends.cudnn.benchmark = not wanted
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warns)
        torch.backends.cudnn.benchmark = before[1]
        torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def precision(name: str) -> Iterator[None]:
    """What is made anew has double precision where `name` is "float64"."""
    before = torch.get_default_dtype()
    if name == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
