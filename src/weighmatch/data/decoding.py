"""Many image files, decoded in several processes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from weighmatch.data.files import Decoded, Fit, Rejected, RejectedFileError, Shape, read_file
from weighmatch.workers import run_all

# Files that one process decodes before it says so.
FILES_AT_ONCE = 64
# From how many files on several processes start, which takes them seconds.
MANY_FILES = 1_000


def decode_many(
    paths: Sequence[str | Path],
    shape: Shape,
    fit: Fit = "crop",
    background: str = "white",
    workers: int | Literal["auto"] = "auto",
    title: str = "reading images",
) -> Iterator[tuple[int, Decoded | Rejected]]:
    """Read many files, in several processes where there are many; the time left is shown.

    Args:
        paths: the files.
        shape: see `decode`, as are `fit` and `background`.
        fit: see `decode`.
        background: see `decode`.
        workers: number of processes; "auto": one a core.
        title: what the progress bar is called.

    Yields:
        The position of a file in `paths`, with what is in it or why it is rejected, in the order
        in which they are read. No more than some hundred images are in memory at a time.
    """
    if len(paths) < MANY_FILES or workers == 1:
        from tqdm import tqdm

        for position, path in enumerate(tqdm(paths, desc=title, unit="file", disable=not paths)):
            yield position, _read_or_reject(str(path), shape, fit, background)
        return
    chunks = [
        ([str(path) for path in paths[first : first + FILES_AT_ONCE]], shape, fit, background)
        for first in range(0, len(paths), FILES_AT_ONCE)
    ]
    answers = run_all(_read_all, chunks, workers, title=title, total=len(paths))
    for chunk, found in answers:
        for position, one in enumerate(found):
            yield chunk * FILES_AT_ONCE + position, one


def _read_all(
    paths: Sequence[str],
    shape: Shape,
    fit: Fit,
    background: str,
    progress: Callable[[int], None],
) -> list[Decoded | Rejected]:
    found = []
    for path in paths:
        found.append(_read_or_reject(path, shape, fit, background))
        progress(1)
    return found


def _read_or_reject(path: str, shape: Shape, fit: Fit, background: str) -> Decoded | Rejected:
    try:
        return read_file(path, shape, fit, background)
    except RejectedFileError as error:
        return Rejected(path, error.reason)
