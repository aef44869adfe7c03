"""All networks and seeds of a study, as many at a time as there are cores."""

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from weighmatch.semisup.runs import default_workers, one_thread
from weighmatch.studies.config import StudyConfig
from weighmatch.studies.ihvp import compare_methods


def compare_all(
    images: NDArray[np.uint8], labels: NDArray[np.int64], config: StudyConfig
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of `compare_methods` over `config.networks` and `config.seeds`, stacked."""
    # The dearest first, so that no core waits at the end.
    jobs = [(name, seed) for name in reversed(config.networks) for seed in config.seeds]
    workers = default_workers(torch.device("cpu")) if config.workers == "auto" else config.workers
    if min(workers, len(jobs)) <= 1:
        with one_thread(), warnings.catch_warnings():
            _hush()
            found = [compare_methods(images, labels, config, *job) for job in jobs]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker) as pool:
            futures = [pool.submit(compare_methods, images, labels, config, *job) for job in jobs]
            found = [future.result() for future in futures]
    tables, spectra = zip(*found, strict=True)
    return pd.concat(tables, ignore_index=True), pd.concat(spectra, ignore_index=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    _hush()


def _hush() -> None:
    # torch's own forward-mode rules call torch.jit.script, which warns of itself.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
