"""Peak memory of a computation on the CPU, and how it grows with the number of parameters."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from weighmatch.implicit import (
    Chebyshev,
    ConjugateGradient,
    Diagonal,
    Hessian,
    Method,
    MinRes,
    Neumann,
    Nystrom,
    Parameters,
    unrolled_gradient,
)
from weighmatch.studies.config import StudyConfig

# Products, probes or unrolled steps of each method.
PRODUCTS = 20


def peak_memory(call: Callable[[], object]) -> int:
    """Largest sum of bytes that tensors hold during `call` beyond what they held before it.

    From every allocation that torch's profiler records; on the CPU.
    """
    was_enabled = gc.isenabled()
    # A collection in the middle would free what others left behind. To collect that first takes
    # longer than most calls.
    gc.disable()
    try:
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
    finally:
        if was_enabled:
            gc.enable()
    # The public list of events leaves out what is allocated inside of operators.
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the profiler's library writes to the standard error of the process off it."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def measure_memory(config: StudyConfig) -> pd.DataFrame:
    """Peak memory of one solve on MLPs of growing width, single precision, 64 images.

    Returns:
        Columns `method`, `parameters` (P) and `vectors` (peak in vectors of P numbers, beyond the
        operator's graph).
    """
    rows = []
    for size in config.memory_sizes:
        params, loss = _mlp(max(1, round((size - 10) / 75)))
        operator = Hessian(loss, params)
        count = operator.shape[0]
        rhs = torch.randn(count, generator=torch.Generator().manual_seed(1))
        calls: dict[str, Callable[[], object]] = {
            name: partial(method.solve, operator, rhs) for name, method in _methods().items()
        }
        decay = torch.tensor(0.1)
        calls["unrolled"] = partial(
            unrolled_gradient, partial(_descend, loss), params, decay, loss, PRODUCTS
        )
        for name, call in calls.items():
            vectors = peak_memory(call) / (4 * count)
            rows.append({"method": name, "parameters": count, "vectors": vectors})
    return pd.DataFrame(rows)


def _mlp(width: int) -> tuple[Parameters, Callable[[Parameters], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    # As many images as inputs: with fewer, solves would go to the row space of the images.
    inputs, labels = torch.randn(64, 64, generator=generator), torch.arange(64) % 10
    params = {
        "w": torch.randn(width, 64, generator=generator) / 8,
        "b": torch.zeros(width),
        "v": torch.randn(10, width, generator=generator) / width**0.5,
        "c": torch.zeros(10),
    }

    def loss(p: Parameters) -> Tensor:
        hidden = torch.tanh(F.linear(inputs, p["w"], p["b"]))
        return F.cross_entropy(F.linear(hidden, p["v"], p["c"]), labels)

    return params, loss


def _descend(loss: Callable[[Parameters], Tensor], params: Parameters, decay: Tensor) -> Parameters:
    gradients = torch.autograd.grad(loss(params), list(params.values()), create_graph=True)
    return {
        name: p - 0.1 * (g + decay * p)
        for (name, p), g in zip(params.items(), gradients, strict=True)
    }


def _methods() -> dict[str, Method]:
    shared: dict[str, Any] = {"damping": 1.0, "max_products": PRODUCTS, "rtol": 0.0}
    return {
        "conjugate_gradient": ConjugateGradient(**shared),
        "minres": MinRes(**shared),
        "chebyshev": Chebyshev(**shared),
        "neumann_extrapolated": Neumann(**shared),
        "diagonal": Diagonal(damping=1.0, probes=PRODUCTS),
        "nystrom, rank 10": Nystrom(damping=1.0, rank=10),
        "nystrom, rank 40": Nystrom(damping=1.0, rank=40),
    }
