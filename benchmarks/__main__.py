"""Every figure of speed, side by side in one run.

    uv run --group peers python -m benchmarks [--quick] [--only augmentation,steps,…] [--device …]

Prints tables in Markdown: augmentation beside Pillow, torchvision and kornia; a step of training
beside the bare loop, what learned weights add, what memory they take and where their time goes;
how these grow; whole runs, and many at once; products, solves, hypergradients and memory beside
other packages (`benchmarks.ihvp_peers`); and start-up.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks import augmentation, ihvp_peers, startup, steps
from benchmarks.tables import conditions, show
from weighmatch.data.config import DataConfig
from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.workers import default_workers

Device = Literal["cpu", "cuda"]
PACKAGES = ("weighmatch", "pillow", "torchvision", "kornia")


def augmentations(quick: bool, device: Device) -> None:
    """Pairs of views a second."""
    rounds, count = (2, 256) if quick else (9, 2048)
    if device == "cpu":
        show(
            f"Augmentation: weak and strong views of {count:,} images of 32×32×3",
            augmentation.beside_others(count, rounds),
            f"Median of {rounds} rounds; ratios within a round, median (range).",
        )
    counts = [64, 448, 2048] if quick else [64, 448, 2048, 8192, 32768]
    show("Augmentation against the batch", augmentation.scaling(counts, rounds, device))


def training_steps(quick: bool, device: Device) -> None:
    """A step, an update of the weights, a ranking of the pool, and the bare loop."""
    default, stages = TrainingConfig(), RunsConfig().rounds
    rounds = 2 if quick else 9
    if device == "cpu":
        settings = [steps.digits_cnn(default)]
        if quick:
            # Small, where time is short: the same calls as on a GPU.
            few = replace(default, batch_size=2, unlabelled_ratio=2)
            few = replace(few, influence=replace(few.influence, outer_batch=4, curvature_batch=4))
            settings.append(steps.wide_resnet(few, pool=16, labelled=10))
        else:
            settings.append(steps.wide_resnet(default))
    else:
        # FixMatch's own batch (Sohn et al., 2020), as a GPU has room for it.
        big = replace(
            default,
            batch_size=64,
            unlabelled_ratio=7,
            device=device,
            precision="bfloat16",
            channels_last=True,
        )
        settings = [steps.wide_resnet(big, pool=50_000, steps=20)]
    with tempfile.TemporaryDirectory() as folder:
        show(
            "A step of training",
            steps.step_table(settings, rounds, Path(folder)),
            f"Median (range) of {rounds} rounds, thrice as many on the CNN, ratios within a round; "
            "the learned arm has the "
            f"default IHVP and interval ({default.weighting.interval} steps), once its weights are "
            f"learned, which they are from {default.weighting.warmup:.0%} of a run on.",
        )
        show(
            "Rankings of the pool",
            steps.ranking_table(settings, stages, min(rounds, 3), Path(folder)),
            "Median (range), ratios within a round; the learned arm ranks the pool after each of "
            f"its {stages} rounds and trains as FixMatch does in between.",
        )
        show("Memory of training", steps.memory_table(settings, Path(folder)))
        for setting in settings:
            show(
                f"Where a step of FixMatch goes: {setting.name}",
                steps.profile_table(setting, Path(folder) / setting.name.split()[0]),
            )
        if not quick:
            show(
                f"Options of training: {settings[0].name}",
                steps.option_table(settings[0], rounds, Path(folder)),
            )


def whole_runs(quick: bool, device: Device) -> None:
    """Runs from their first step to their last, and side by side."""
    training = TrainingConfig(device=device)
    workers = [1, 2, 4] if device == "cuda" else [1, default_workers()]
    length = 100 if quick else training.steps
    rounds = 1 if quick else 5
    data = steps.training_set(DataConfig(seeds=(10,)))
    with tempfile.TemporaryDirectory() as folder:
        show(
            f"Whole runs of {length:,} steps: the CNN on digits, as in `kedro run`",
            steps.whole_run_table(
                data,
                replace(training, steps=length),
                RunsConfig().rounds,
                rounds,
                Path(folder),
            ),
            f"Median (range) of {rounds} rounds, ratios within a round.",
        )
        show(
            "Many runs: the CNN on digits, one thread a run",
            steps.many_runs_table(
                steps.digits_cnn(training), length, workers, rounds, Path(folder)
            ),
            "Steps of all runs together; each runs in a process of its own.",
        )


def growth(quick: bool, device: Device) -> None:
    """The digits CNN with more and more images in a step, and in the pool."""
    training = TrainingConfig(device=device)
    batches = [8, 32] if quick else [8, 16, 32, 64, 128]
    settings = [
        replace(steps.digits_cnn(replace(training, batch_size=batch)), name=f"B{batch}")
        for batch in batches
    ]
    pools = [
        replace(steps.digits_cnn(training, pool), name=f"CNN, {pool:,}")
        for pool in ((600, 4_000) if quick else (600, 4_000, 32_000, 256_000))
    ]
    with tempfile.TemporaryDirectory() as folder:
        show(
            "Images a second against the batch",
            steps.throughput_table(settings, 1 if quick else 5, Path(folder)),
        )
        rounds = 1 if quick else 3
        show(
            "A ranking against the images of the pool",
            steps.ranking_table(pools, RunsConfig().rounds, rounds, Path(folder)),
            f"Median (range) of {rounds} rounds.",
        )


def ihvps(quick: bool, device: Device) -> None:
    """Products, solves, hypergradients and memory."""
    del device  # on the CPU, where the peers are compared
    ihvp_peers.tables(quick=quick)


def start_up(quick: bool, device: Device) -> None:
    """CPU time until the work begins."""
    del device
    show("Start-up", startup.table(1 if quick else 3), "Seconds of CPU, user and system, median.")


SECTIONS: dict[str, Callable[[bool, Device], None]] = {
    "augmentation": augmentations,
    "steps": training_steps,
    "growth": growth,
    "runs": whole_runs,
    "ihvps": ihvps,
    "startup": start_up,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Every figure of speed, side by side.")
    parser.add_argument("--quick", action="store_true", help="two minutes: less of everything")
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help=f"from {', '.join(SECTIONS)}, by commas"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    unknown = sorted(set(wanted) - set(SECTIONS))
    if unknown:
        parser.error(f"--only {', '.join(unknown)} is unknown; choose from {', '.join(SECTIONS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    torch.set_num_threads(1)
    print(conditions(PACKAGES, arguments.device), flush=True)
    for name in wanted:
        SECTIONS[name](arguments.quick, arguments.device)


if __name__ == "__main__":
    main()
