"""What two choices of FixMatch change on digits, paired over seeds.

python -m benchmarks.choices [--seeds 16]

Weight decay on kernels alone, as in FixMatch's own code, or on all parameters; and a pool with the
labelled images in it, as in FixMatch's own code, or without them. Arms `fixmatch` and `learned` (in
rounds), the digits of the main job with 75 % OOD. Prints a table; about 8 minutes on one core.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.tables import markdown
from weighmatch.data.config import DataConfig
from weighmatch.data.source import get_source
from weighmatch.evaluation.statistics import paired_difference
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.training import loop
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.schedules import make_schedule
from weighmatch.workers import run_in_order

FIRST_SEED = 300
CHOICES = ("kernels decay", "all parameters decay", "labelled images in the pool")


def everything(classifier: Classifier, weight_decay: float) -> list[dict[str, object]]:
    """One group of parameters, all of which decay."""
    return [{"params": list(classifier.parameters()), "weight_decay": weight_decay, "rate": 1.0}]


def accuracies(seed: int, choice: str, progress: Callable[[int], None]) -> dict[str, float]:
    """Test accuracy in per cent of both arms with one choice."""
    config = DataConfig((seed,))
    source = get_source(config.source)
    splits = source.draw(source.load(config), config, seed)
    assert splits.pool is not None
    assert splits.test_images is not None
    pool = splits.pool.images
    if choice == CHOICES[2]:
        pool = np.concatenate([pool, splits.labelled_images])
    data = TrainingSet(splits.labelled_images, splits.labels, pool)
    grouped = loop.decay_groups
    loop.decay_groups = everything if choice == CHOICES[1] else grouped
    found = {}
    for arm, schedule, rounds in (("fixmatch", "online", 1), ("learned", "rounds", 4)):
        training = TrainingConfig(device="cpu")
        run = RunConfig(arm, seed, training.steps, data.classes, training)
        run = replace(run, schedule=schedule, rounds=rounds)
        with TemporaryDirectory() as folder:
            trained = make_schedule(run).fit(data, Path(folder))
        right = trained.classify(splits.test_images).argmax(dim=1).numpy() == splits.test_labels
        found[arm] = 100 * float(right.mean())
    loop.decay_groups = grouped
    progress(1)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=16)
    count = parser.parse_args().seeds
    torch.set_num_threads(1)
    jobs = [(FIRST_SEED + k, choice) for k in range(count) for choice in CHOICES]
    answers = run_in_order(accuracies, jobs, title="choices", total=len(jobs))
    found = dict(zip(jobs, answers, strict=True))
    rows = []
    for arm in ("fixmatch", "learned"):
        plain, *others = (
            np.array([found[seed, choice][arm] for seed, c in jobs if c == choice])
            for choice in CHOICES
        )
        for choice, values in zip(CHOICES[1:], others, strict=True):
            test = paired_difference(values - plain)
            interval = f"{test.mean:+.1f} ({test.low:+.1f} to {test.high:+.1f})"
            rows.append([choice, arm, f"{plain.mean():.1f}", f"{values.mean():.1f}", interval])
    header = ["choice", "arm", CHOICES[0], "with the choice", "difference (95 % interval)"]
    print("\n".join(markdown(header, rows)))


if __name__ == "__main__":
    main()
