"""Many jobs of a study, as many at a time as there are cores."""

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from weighmatch.semisup.runs import default_workers, one_thread
from weighmatch.studies.config import StudyConfig
from weighmatch.studies.ihvp import compare_methods

T = TypeVar("T")


def in_parallel(
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    workers: int | Literal["auto"],
    title: str,
) -> list[T]:
    """`function(*job)` for every job, in the order of the jobs whoever is done first.

    Args:
        function: of a module, so that other processes can import it.
        jobs: its arguments; the dearest first, so that no core waits at the end.
        workers: processes, one thread each; "auto": one a core.
        title: of the progress bar.
    """
    count = default_workers(torch.device("cpu")) if workers == "auto" else workers
    if min(count, len(jobs)) <= 1:
        with one_thread(), warnings.catch_warnings():
            _hush()
            return [function(*job) for job in tqdm(jobs, title)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(count, len(jobs)), context, _start_worker) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            return [future.result() for future in tqdm(futures, title)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def compare_all(
    images: NDArray[np.uint8], labels: NDArray[np.int64], config: StudyConfig
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of `compare_methods` over `config.networks` and `config.seeds`, stacked."""
    jobs = [
        (images, labels, config, name, seed)
        for name in reversed(config.networks)
        for seed in config.seeds
    ]
    found = in_parallel(compare_methods, jobs, config.workers, "IHVPs")
    tables, spectra = zip(*found, strict=True)
    return pd.concat(tables, ignore_index=True), pd.concat(spectra, ignore_index=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    _hush()


def _hush() -> None:
    # torch's own forward-mode rules call torch.jit.script, which warns of itself.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
