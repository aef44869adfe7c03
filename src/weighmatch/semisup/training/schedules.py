"""Schedules: how the steps of a run are spent. Each trains a `RunConfig` to a `TrainedRun`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol

from weighmatch.arms import Schedule as ScheduleName
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.parts.state_file import read_if_whole, write_state
from weighmatch.semisup.training.config import RunConfig, TrainingSet, fingerprint
from weighmatch.semisup.training.numerics import precision
from weighmatch.semisup.training.online import Progress, train_online
from weighmatch.semisup.training.rounds import train_in_rounds
from weighmatch.semisup.training.two_stages import train_in_two_stages

log = logging.getLogger(__name__)

# The file of a finished run.
RUN = "run.pt"


class Schedule(Protocol):
    """What a schedule can do."""

    def fit(self, data: TrainingSet, folder: Path, progress: Progress = ...) -> TrainedRun:
        """Train to the end, or go on where an earlier call was interrupted; see `Fit.fit`."""


class Fit:
    """A schedule of a run.

    The same data, seed and configuration give the same result to the bit on the CPU of the same
    machine with the same number of threads, whether or not the run was interrupted.
    """

    trainers: ClassVar[dict[ScheduleName, Callable[..., TrainedRun]]] = {
        "online": train_online,
        "two_stages": train_in_two_stages,
        "rounds": train_in_rounds,
    }

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def fit(
        self, data: TrainingSet, folder: Path, progress: Progress = lambda steps: None
    ) -> TrainedRun:
        """Train to the end, go on where an earlier call was interrupted, or read what is done.

        Args:
            data: what to train on.
            folder: made if missing; gets checkpoints, `metrics.jsonl` and at the end `run.pt`.
                What it holds of another run (other data, seed, configuration or code) is
                replaced.
            progress: called with the number of steps done since the last call.

        Raises:
            FloatingPointError: if a loss or a parameter is not finite, also after the learning rate
                was halved three times.
            ValueError: if a label is none of the classes.
        """
        self.config.check_data(data)
        self.config.group.require_same(lambda: fingerprint(self.config, data))
        finished = self.read(data, folder)
        if finished is not None:
            progress(self.config.first_steps + self.config.steps)
            return finished
        try:
            with precision(self.config.training.precision):
                run = self.trainers[self.config.schedule](self.config, data, folder, progress)
        except FloatingPointError as error:
            # Rounds train under other names and seeds than those that the user gave.
            raise FloatingPointError(
                f"{self.config.arm}, seed {self.config.seed}: {error}"
            ) from error
        state = run.to_state()
        if self.config.group.first:
            name = fingerprint(self.config, data)
            write_state(folder / RUN, {"fingerprint": name, "run": state})
        # What was trained in double precision scores in single precision, as all runs do.
        double = self.config.training.precision == "float64"
        return TrainedRun.from_state(state) if double else run

    def read(self, data: TrainingSet, folder: Path) -> TrainedRun | None:
        """The finished run in `folder`, or None if there is none, or one of something else."""
        path = folder / RUN
        state = self.config.group.from_first(
            lambda: read_if_whole(path, "it is made again from its checkpoints")
        )
        if state is None or state.get("fingerprint") != fingerprint(self.config, data):
            return None
        return TrainedRun.from_state(state["run"])


def make_schedule(config: RunConfig) -> Schedule:
    """What trains a run of this configuration."""
    return Fit(config)
