"""Peak memory of a computation on the CPU, and how it grows with the number of parameters."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from weighmatch.implicit import Hessian, Method, Nystrom, Parameters, unrolled_gradient
from weighmatch.studies.config import StudyConfig
from weighmatch.studies.methods import added_solvers, all_methods

# Products, probes or unrolled steps of each method.
PRODUCTS = 20
# Names of methods whose memory is compared; what other methods take follows from it.
MEASURED = ("conjugate_gradient", "minres", "chebyshev", "neumann_extrapolated", "diagonal")


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
    """The methods of `MEASURED` and all added ones, and Nyström's at two ranks."""
    added = added_solvers()
    found = {
        row.name: row.build(1.0, PRODUCTS + row.reserve, rtol=0.0)
        for row in all_methods()
        if row.name in MEASURED or row.solver in {kind.__name__ for kind in added}
    }
    return found | {f"nystrom, rank {rank}": Nystrom(damping=1.0, rank=rank) for rank in (10, 40)}
