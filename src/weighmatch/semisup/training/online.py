"""The schedule online: weights are learned while the classifier trains."""

from collections.abc import Callable
from pathlib import Path

from weighmatch.semisup.checkpoint import Parameters, TrainedRun
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.training.numerics import algorithms

Progress = Callable[[int], None]


def train_online(
    config: RunConfig,
    data: TrainingSet,
    folder: Path,
    progress: Progress = lambda steps: None,
    start: Parameters | None = None,
    until: int | None = None,
    earlier: Path | None = None,
) -> TrainedRun:
    """Train to the last step, or go on from the last checkpoint.

    A run that stops at some step and goes on in another folder ends as one that never stopped,
    but for where the lines of metrics are cut.

    Args:
        config: what defines the run.
        data: what to train on.
        folder: made if missing; gets `checkpoint.pt` and `metrics.jsonl`.
        progress: called with the number of steps done since the last call.
        start: parameters of the classifier to begin with; None: the seed's.
        until: the step to stop at; None: the last.
        earlier: where a call that stopped before left this run's checkpoint, to go on from
            if `folder` holds none.

    Returns:
        The run at that step.
    """
    with algorithms(config.training.deterministic, config.group):
        run = Run(config, data, folder, start, until, earlier)
        progress(run.step)
        last = config.steps if until is None else until
        while run.step < last:
            progress(run.train_steps(min(run.batches.chunk(), last - run.step)))
        if run.step != run.saved:
            run.save()
        return run.result()
