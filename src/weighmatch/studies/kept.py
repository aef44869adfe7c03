"""Jobs of a study, several at a time; those that are finished are kept, so that it can go on."""

import hashlib
import inspect
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from weighmatch.code import code_digest
from weighmatch.implicit import Method
from weighmatch.studies.methods import added_solvers
from weighmatch.workers import run_all

log = logging.getLogger(__name__)

T = TypeVar("T")
# A file is the SHA-256 of a pickle, and the pickle.
CHECKSUM_BYTES = hashlib.sha256().digest_size


def finish_jobs(
    jobs: Sequence[tuple[Callable[..., T], tuple[Any, ...]]],
    workers: int | Literal["auto"],
    folder: Path | str | None,
    title: str,
) -> list[T]:
    """Answers of `function(*arguments)` for every job, in the order of the jobs.

    Args:
        jobs: pairs of a function of a module and its arguments; put the longest first.
        workers: number of processes; "auto": one a core.
        folder: keeps the answers; those that it has are not computed again. An answer is known
            by the arguments of its job and by the code that computes it. None: nothing is kept.
        title: what the progress bar is called.
    """
    solvers = added_solvers()
    paths: dict[int, Path] = {}
    found: dict[int, T] = {}
    if folder is not None:
        for position, (function, arguments) in enumerate(jobs):
            digest = hashlib.sha256(code_digest(function.__module__).encode())
            for part in (function.__qualname__, *arguments, *solvers):
                _add(digest, part)
            paths[position] = Path(folder) / f"{digest.hexdigest()[:32]}.pickle"
            with suppress(FileNotFoundError, ValueError):
                found[position] = _read(paths[position])
    if found:
        log.info("%s: %d of %d were finished before", title, len(found), len(jobs))
    left = [position for position in range(len(jobs)) if position not in found]
    calls = [(*jobs[position], solvers) for position in left]
    for number, answer in run_all(
        _do, calls, workers, title=title, total=len(jobs), done=len(found)
    ):
        found[left[number]] = answer
        if paths:
            _write(paths[left[number]], answer)
    return [found[position] for position in range(len(jobs))]


def _do(
    function: Callable[..., T],
    arguments: tuple[Any, ...],
    solvers: tuple[type[Method], ...],
    progress: Callable[[int], object],
) -> T:
    """One job. A worker process knows the added `solvers` by being given them."""
    with warnings.catch_warnings():
        # torch's own forward-mode rules call torch.jit.script, which warns of itself.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        answer = function(*arguments)
    progress(1)
    return answer


def _add(digest: "hashlib._Hash", part: Any) -> None:
    if isinstance(part, np.ndarray):
        digest.update(f"{part.dtype} {part.shape}".encode())
        digest.update(part.tobytes())
    elif isinstance(part, type):
        digest.update(f"{part.__module__}.{part.__qualname__}".encode())
        with suppress(OSError):  # a class that was typed in has no source
            digest.update(inspect.getsource(part).encode())
    else:
        digest.update(repr(part).encode())


def _read(path: Path) -> Any:
    """What `_write` wrote; a ValueError and a warning where the file is damaged."""
    content = path.read_bytes()
    checksum, packed = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if hashlib.sha256(packed).digest() != checksum:
        log.warning("%s is damaged; what it holds is computed again", path)
        raise ValueError(path)
    return pickle.loads(packed)


def _write(path: Path, answer: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = pickle.dumps(answer)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(hashlib.sha256(packed).digest() + packed)
    os.replace(partial, path)
