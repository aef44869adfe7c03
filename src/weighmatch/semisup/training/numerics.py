"""How a run computes: its algorithms and the precision of its numbers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Repeatable algorithms, or else, on a GPU, the fastest for the shapes at hand.

    Either way single precision is that, in convolutions, too, which cuDNN would cut to 10 bits
    (TF32): curvature products and hypergradients rely on it.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    tf32 = torch.backends.cudnn.allow_tf32
    if deterministic:
        # cuBLAS reads it when a process first multiplies matrices on the GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic or before[0])
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
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
