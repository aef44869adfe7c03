"""Digits whose pool or labelled images are out of the ordinary: does the learned share hold?

python -m benchmarks.pools clean|unusual|validated

`clean`: pools without an OOD image, with and without copies among the labelled images. `unusual`:
one label a class, a quarter of OOD images, copies that are moved by a pixel, and classes ten times
as frequent as others. `validated`: the share is chosen by cross-validation on the labelled images,
in place of a hypergradient. Prints a table; seeds are paired. Each takes 5 to 15 minutes on two
cores.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from benchmarks.tables import markdown
from weighmatch.arms import get_arm
from weighmatch.data.config import DataConfig
from weighmatch.data.source import get_source
from weighmatch.data.splits import Splits
from weighmatch.evaluation.statistics import paired_difference
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.training.compute import Sizes, matched_steps
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.decision import keep_best
from weighmatch.semisup.training.judges import Known
from weighmatch.semisup.training.online import train_online
from weighmatch.semisup.training.ranking import rank_pool
from weighmatch.semisup.training.schedules import make_schedule
from weighmatch.workers import run_in_order

ROUNDS = 4
TRAINING = TrainingConfig(device="cpu")
# Shares of a ranking that cross-validation tries.
SHARES = (0.15, 0.25, 0.4, 0.6, 1.0)
# What kept the images of a run that keeps the whole pool.
WHOLE = 1.0


@dataclass(frozen=True)
class Pool:
    """A kind of pool.

    Attributes:
        labels: labelled images of each class, before they are copied.
        ratio: the share of OOD images.
        copies: whether each labelled image comes twice.
        moved: whether the copies are moved by a pixel.
        skew: how many times as frequent the first class is as the last one.
    """

    labels: int = 2
    ratio: float = 0.0
    copies: bool = False
    moved: bool = False
    skew: float = 1.0

    def draw(self, seed: int) -> tuple[Splits, TrainingSet]:
        """The splits of a seed, and what is trained on."""
        size = 1000 if self.skew > 1 else 600
        config = DataConfig((seed,), labels_per_class=self.labels, ratio=self.ratio, pool_size=size)
        source = get_source(config.source)
        splits = source.draw(source.load(config), config, seed)
        assert splits.pool is not None
        images, labels = splits.labelled_images, splits.labels
        if self.copies:
            twins = np.roll(images, 1, axis=3) if self.moved else images
            images, labels = np.concatenate([images, twins]), np.concatenate([labels, labels])
        classes, kinds = splits.pool.classes, splits.pool.kinds
        assert classes is not None
        assert kinds is not None
        chosen = self._chosen(classes, kinds == 0, seed)
        useful = float((kinds[chosen] == 0).mean())
        return splits, TrainingSet(images, labels, splits.pool.images[chosen], useful_share=useful)

    def _chosen(
        self, classes: NDArray[np.int64], useful: NDArray[np.bool_], seed: int
    ) -> NDArray[np.int64]:
        """The images of a pool that are left where classes are not of equal frequency."""
        everyone = np.arange(len(classes))
        if self.skew == 1:
            return everyone
        rng = np.random.default_rng(seed)
        last = int(classes[useful].max())
        keep = rng.random(len(classes)) < self.skew ** (-classes.clip(0, last) / last)
        known, foreign = everyone[useful & keep], everyone[~useful]
        share = useful.mean()
        foreign = rng.permutation(foreign)[: round(len(known) * (1 - share) / share)]
        return np.sort(np.concatenate([known, foreign]))


CLEAN = {
    "2 labels": Pool(2),
    "4 labels": Pool(4),
    "2 labels, each twice": Pool(2, copies=True),
    "4 labels, each twice": Pool(4, copies=True),
}
UNUSUAL = {
    "1 label, 75 % OOD": Pool(1, 0.75),
    "2 labels, 25 % OOD": Pool(2, 0.25),
    "2 labels, moved copies, 75 % OOD": Pool(2, 0.75, copies=True, moved=True),
    "2 labels, classes 10 : 1, 50 % OOD": Pool(2, 0.5, skew=10.0),
}
VALIDATED = {"2 labels, 50 % OOD": Pool(2, 0.5), "2 labels, 75 % OOD": Pool(2, 0.75)}
# Pools, arms and seeds, which were named before any of them ran with these pools.
STUDIES = {
    "clean": (CLEAN, ("fixmatch", "learned"), range(332, 340)),
    "unusual": (UNUSUAL, ("fixmatch_matched", "pu", "learned"), range(332, 344)),
    "validated": (VALIDATED, ("validated", "learned"), range(300, 316)),
}


def train(arm: str, seed: int, data: TrainingSet) -> TrainedRun:
    """A run of an arm, in rounds where it can be."""
    row = get_arm(arm)
    steps = TRAINING.steps
    if row.compute == "matched":
        steps = matched_steps("rounds", ROUNDS, Sizes.of(data, data.classes, TRAINING))
    run = RunConfig(arm, seed, steps, data.classes, TRAINING)
    if "rounds" in row.schedules and row.weighs:
        run = replace(run, schedule="rounds", rounds=ROUNDS)
    with TemporaryDirectory() as folder:
        return make_schedule(run).fit(data, Path(folder))


def validated_share(seed: int, data: TrainingSet) -> float:
    """The share of a ranking whose classifier has the lowest loss on labelled images.

    FixMatch trains for a round on the whole pool, and its classifier ranks the pool. For each of
    two halves of the labelled images and each share, FixMatch goes on for another round with the
    other half and the best of the ranking. That is ten more rounds than a run has.
    """
    steps = TRAINING.steps // ROUNDS
    run = RunConfig("fixmatch", seed, steps, data.classes, replace(TRAINING, snapshots=1))
    gate = replace(run, arm="gate_told", schedule="rounds", rounds=1)
    losses = np.zeros(len(SHARES))
    everyone = torch.ones(data.pool_size, dtype=torch.bool)
    halves = StratifiedKFold(2).split(data.labels, data.labels)
    for chosen, others in halves:
        fitted = replace(
            data, labelled_images=data.labelled_images[chosen], labels=data.labels[chosen]
        )
        with TemporaryDirectory() as folder:
            first = train_online(run, fitted, Path(folder) / "first")
            ranked = replace(first, config=gate, weighting={})
            ranking, _ = rank_pool(ranked, Known(everyone), fitted, gate, seed)
            classes = first.classify(fitted.plain_pool).argmax(dim=1)
            start = first.classifier.state_dict()
            for position, share in enumerate(SHARES):
                kept = keep_best(ranking.scores, classes, share, data.classes)
                pool = fitted if share == WHOLE else fitted.select(kept.numpy())
                place = Path(folder) / str(position)
                then = train_online(run, pool, place, start=start)
                found = then.classify(data.labelled_images[others])
                right = found[torch.arange(len(found)), torch.from_numpy(data.labels[others])]
                losses[position] -= float(right.clamp(min=1e-6).log().mean())
    return SHARES[int(losses.argmin())]


def measure(
    seed: int, arm: str, pool: Pool, progress: Callable[[int], None]
) -> tuple[float, float, float]:
    """Test accuracy in per cent, the share that is kept, and the useful one."""
    splits, data = pool.draw(seed)
    useful = data.useful_share
    assert useful is not None
    if arm == "validated":
        data = replace(data, useful_share=validated_share(seed, data))
        arm = "gate_told"
    trained = train(arm, seed, data)
    assert splits.test_images is not None
    right = trained.classify(splits.test_images).argmax(dim=1).numpy() == splits.test_labels
    kept = trained.pool.kept
    progress(1)
    share = WHOLE if kept is None else float(kept.float().mean())
    return 100 * float(right.mean()), share, useful


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=tuple(STUDIES))
    study = parser.parse_args().study
    torch.set_num_threads(1)
    pools, arms, seeds = STUDIES[study]
    jobs = [(seed, arm, pool) for pool in pools.values() for seed in seeds for arm in arms]
    answers = run_in_order(measure, jobs, title=study, total=len(jobs))
    found = dict(zip(jobs, answers, strict=True))
    rows = []
    for name, pool in pools.items():
        learned = np.array([found[seed, "learned", pool] for seed in seeds])
        for arm in arms:
            each = np.array([found[seed, arm, pool] for seed in seeds])
            test = paired_difference(learned[:, 0] - each[:, 0])
            interval = f"{test.mean:+.1f} ({test.low:+.1f} to {test.high:+.1f})"
            rows.append(
                [
                    name,
                    f"`{arm}`",
                    f"{each[:, 0].mean():.1f}",
                    "–" if arm == "learned" else interval,
                    f"{int((each[:, 1] < WHOLE).sum())} of {len(seeds)}",
                    f"{abs(each[:, 1] - each[:, 2]).mean():.2f}",
                ]
            )
    header = ["pool", "arm", "accuracy %", "learned − arm", "drop images", "share is off by"]
    print("\n".join(markdown(header, rows)))


if __name__ == "__main__":
    main()
