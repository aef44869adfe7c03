"""How much quicker is a step of FixMatch where two processes share its batch?

python -m benchmarks.processes [--turns 3]

A step of N processes is predicted as a step of one process on an N-th of the batch, and a sum of
all gradients over the processes. Prints it beside what was measured, and what it costs that each
process holds a part of the pool (`training.pool_memory=sharded`). Each time is that of a run of
some steps less that of a run of fewer, so that starting and ending does not count.
"""

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.steps import digits_cnn, wide_resnet
from benchmarks.tables import conditions, markdown, spread
from benchmarks.timing import seconds_of
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.parts.group import Group
from weighmatch.semisup.parts.networks import build_classifier
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.jobs import Job, finish_jobs
from weighmatch.semisup.training.processes import together

# Sums of gradients that are timed together.
SUMS = 50


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        name: for the table.
        data: images.
        training: the configuration.
        steps: steps of the shorter and of the longer run.
    """

    name: str
    data: TrainingSet
    training: TrainingConfig
    steps: tuple[int, int]

    def halved(self) -> "Case":
        """The same with half of the batch."""
        half = replace(self.training, batch_size=self.training.batch_size // 2)
        return replace(self, training=half)

    def sharded(self) -> "Case":
        """The same where each process holds a part of the pool."""
        return replace(self, training=replace(self.training, pool_memory="sharded"))

    def parameters(self) -> Tensor:
        """All parameters in one tensor."""
        channels = self.data.unlabelled_images.shape[1]
        network = build_classifier(self.training.network, channels, self.data.classes, seed=0)
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def cases() -> list[Case]:
    """A small network with its usual batch and with a large one, and a larger network."""
    usual = TrainingConfig(device="cpu", snapshots=1, checkpoint_every=10**9)
    large = replace(usual, batch_size=128, unlabelled_ratio=7)
    digits = digits_cnn(usual)
    wide = wide_resnet(replace(usual, batch_size=8, unlabelled_ratio=7), pool=512)
    return [
        Case("CNN on digits", digits.data, usual, (100, 1300)),
        Case("CNN on digits, large batch", digits.data, large, (10, 110)),
        Case("WRN-28-2 at 32×32", wide.data, wide.training, (1, 7)),
    ]


def seconds_a_step(case: Case, processes: int) -> float:
    """Seconds of a step of `processes` processes."""

    def train(steps: int) -> float:
        config = RunConfig("fixmatch", 0, steps, case.data.classes, case.training)
        with TemporaryDirectory() as folder:
            jobs = [Job(f"steps-{steps}", "steps_0", config, case.data, steps)]
            return seconds_of(lambda: finish_jobs(jobs, Path(folder), 1, processes=processes))

    few, many = case.steps
    return (train(many) - train(few)) / (many - few)


def seconds_a_sum(parameters: Tensor) -> float:
    """Seconds in which two processes add up their gradients."""
    with together(2, "cpu") as team:
        team.also(_add_up, parameters)
        _add_up(parameters, team.group)
        team.also(_add_up, parameters)
        return seconds_of(lambda: _add_up(parameters, team.group)) / SUMS


def _add_up(parameters: Tensor, group: Group) -> None:
    for _ in range(SUMS):
        group.sum(parameters)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    rows = []
    for case in cases():
        one, two, predicted, sharded = [], [], [], []
        for _ in range(turns):
            one.append(seconds_a_step(case, 1))
            predicted.append(seconds_a_step(case.halved(), 1) + seconds_a_sum(case.parameters()))
            two.append(seconds_a_step(case, 2))
            sharded.append(seconds_a_step(case.sharded(), 2))
        rows.append(
            [
                case.name,
                f"{case.training.batch_size} × (1 + {case.training.unlabelled_ratio})",
                f"{1e3 * statistics.median(one):.1f}",
                spread([a / b for a, b in zip(one, predicted, strict=True)]),
                spread([a / b for a, b in zip(one, two, strict=True)]),
                spread([a / b for a, b in zip(sharded, two, strict=True)]),
            ]
        )
    measured = ["speed-up predicted", "measured", "sharded / shared pool"]
    header = ["what", "batch", "a step of one process, ms", *measured]
    print("\n".join(markdown(header, rows)), end="\n\n")
    print(conditions(["torch"]))


if __name__ == "__main__":
    from benchmarks.processes import main  # another process cannot find what is in `__main__`

    main()
