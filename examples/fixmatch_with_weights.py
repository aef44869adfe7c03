"""FixMatch with weights on the unlabelled images, on digits: about half a minute on one core.

uv run python examples/fixmatch_with_weights.py

Four images of each of the digits 0 to 5 are labelled. Of 600 unlabelled images 450 show the digits
6 to 9, which no label names. FixMatch treats all of them alike. Learned weights rank them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from weighmatch.data.config import DataConfig
from weighmatch.data.source import get_source
from weighmatch.semisup import RunConfig, TrainedRun, TrainingConfig, TrainingSet, make_schedule

SEED = 0


def main(steps: int = 1000) -> dict[str, float]:
    """Train three arms on the same images, print what came of them, and return accuracies."""
    asked = DataConfig(seeds=(SEED,), labels_per_class=4, ratio=0.75, pool_size=600)
    digits = get_source("digits")
    splits = digits.draw(digits.load(asked), asked, SEED)
    # Training gets the labelled images and the pool, and no word on what the pool holds.
    data = TrainingSet(splits.labelled_images, splits.labels, splits.pool.images)

    accuracies = {}
    for arm, schedule, rounds in (
        ("supervised", "online", 1),  # the labelled images alone
        ("fixmatch", "online", 1),  # every unlabelled image counts the same
        ("learned", "rounds", 4),  # images are ranked, and the best of them are trained on
    ):
        config = RunConfig(arm, SEED, steps, data.classes, TrainingConfig(), schedule, rounds)
        with TemporaryDirectory() as folder:
            run = make_schedule(config).fit(data, Path(folder))
        found = run.score(splits.test_images).probabilities.argmax(axis=1)
        accuracies[arm] = float((found == splits.test_labels).mean())
        print(f"{arm}: {accuracies[arm]:.1%} of {len(found)} test images are right")
    explain(run, splits.pool.images, splits.pool.kinds)
    return accuracies


def explain(run: TrainedRun, images: np.ndarray, kinds: np.ndarray) -> None:
    """Print what the run says of the pool; the truth is looked at here for the first time."""
    scored = run.score(images)
    known = kinds == 0
    print(f"mean weight of the digits 0 to 5: {scored.weights[known].mean():.2f}")
    print(f"mean weight of the digits 6 to 9: {scored.weights[~known].mean():.2f}")
    kept = run.pool.kept.numpy()
    print(f"kept: {kept[known].sum()} of {known.sum()} known digits, ", end="")
    print(f"{kept[~known].sum()} of {(~known).sum()} others")


if __name__ == "__main__":
    main()
