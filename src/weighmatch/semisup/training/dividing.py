"""Which runs several processes can train together; imports no torch."""

import os
from collections.abc import Iterable

from weighmatch.arms import Schedule, get_arm
from weighmatch.checks import ToldError
from weighmatch.semisup.config import GROUPS_OF_SCHEDULE, TrainingConfig

# What torchrun sets in its processes, and nothing else does.
LAUNCHED = "TORCHELASTIC_RUN_ID"


class TogetherError(ToldError, ValueError):
    """Runs that several processes cannot train together."""


def count_processes(asked: int) -> int:
    """How many processes train a run together: those of `torchrun`, or else as many as asked."""
    return int(os.environ["WORLD_SIZE"]) if LAUNCHED in os.environ else asked


def require_divisible(
    processes: int,
    training: TrainingConfig,
    runs: Iterable[tuple[str, Schedule]],
    *,
    limited: bool,
    pool: int | None = None,
) -> None:
    """Require that processes can train runs together.

    Args:
        processes: how many.
        training: the sizes of batches.
        runs: arms and schedules.
        limited: whether there is a time limit.
        pool: how many images the smallest pool has; None: nobody knows yet.

    Raises:
        TogetherError: if a batch or the pool has fewer images than there are processes, or there is
            a time limit.
    """
    if processes == 1:
        return
    if limited:
        raise TogetherError(
            f"{processes} processes train together without a time limit; leave out "
            "runs.time_limit, or start one process"
        )
    if pool is not None and pool < processes:
        raise TogetherError(
            f"a pool of {pool} images cannot be divided over {processes} processes; train with "
            "fewer processes"
        )
    sizes = {"batch_size": training.batch_size}
    for arm, schedule in runs:
        if "influence" in GROUPS_OF_SCHEDULE[schedule] and "influence" in get_arm(arm).reads:
            for name in ("outer_batch", "curvature_batch", "batch"):
                sizes[f"influence.{name}"] = getattr(training.influence, name)
    for name, size in sizes.items():
        if size < processes:
            raise TogetherError(
                f"training.{name} {size} cannot be divided over {processes} processes; raise it "
                f"to at least {processes}, or train with fewer processes"
            )
