"""Digests of every arm in every schedule at a tiny setting: shows that a change of the code
changes no number.

python -m benchmarks.digests FILE             # writes the digests
python -m benchmarks.digests FILE --against OTHER   # and compares them with earlier ones

Digests hold on one machine and for one release of torch. Twice about half a minute.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from weighmatch.arms import SCHEDULES, arm_names
from weighmatch.data.config import DataConfig
from weighmatch.data.source import get_source
from weighmatch.data.splits import Arrays, Splits
from weighmatch.semisup.checkpoint import TrainedRun
from weighmatch.semisup.config import (
    OPERATIONS,
    AugmentationConfig,
    InfluenceConfig,
    RankingConfig,
    RunsConfig,
    TrainingConfig,
    WeightingConfig,
)
from weighmatch.semisup.parts.state_file import content_digest
from weighmatch.semisup.training.jobs import finish_jobs, plan_jobs, read_job

PLAIN = TrainingConfig(
    width=8,
    steps=40,
    batch_size=8,
    unlabelled_ratio=2,
    snapshots=2,
    checkpoint_every=20,
    threshold=0.5,
    device="cpu",
    augmentation=AugmentationConfig(operations=OPERATIONS),
    weighting=WeightingConfig(interval=10, fit_batch=16),
    influence=InfluenceConfig(max_products=4, outer_batch=24, curvature_batch=16, batch=24),
    ranking=RankingConfig(steps=20, batch=32),
)
VARIANTS = {
    "plain": PLAIN,
    "aligned": replace(
        PLAIN,
        distribution_alignment=True,
        weighting=replace(PLAIN.weighting, weights="soft", outer_labels="held_out"),
        influence=replace(PLAIN.influence, solver="neumann"),
        ranking=replace(PLAIN.ranking, contamination_level=1.0),
    ),
}


def main() -> None:
    """Write digests and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    found = {name: digests(run, heldout) for name, run, heldout in train_everything()}
    given.file.write_text(json.dumps(found, indent=1, sort_keys=True))
    if given.against is None:
        return
    before = json.loads(given.against.read_text())
    different = [
        f"{name}: {part}"
        for name in sorted(found.keys() | before.keys())
        for part in sorted(found.get(name, {}).keys() | before.get(name, {}).keys())
        if found.get(name, {}).get(part) != before.get(name, {}).get(part)
    ]
    print("\n".join(different) or f"{len(found)} runs, no difference")
    raise SystemExit(bool(different))


def train_everything() -> Iterator[tuple[str, TrainedRun, np.ndarray]]:
    """Every variant, arm and schedule: its name, the run, and held-out images."""
    splits = draw()
    assert splits.pool is not None
    assert splits.heldout is not None
    heldout = splits.heldout.images
    arrays: Arrays = {
        "labelled_images": splits.labelled_images,
        "labels": splits.labels,
        "unlabelled_images": splits.pool.images,
        "useful_share": np.array(0.5),
    }
    for variant, training in VARIANTS.items():
        for schedule in SCHEDULES:
            # An arm that has another schedule alone trains in that, at its own time.
            runs = RunsConfig(schedule=(schedule,), rounds=4)
            jobs = plan_jobs(arm_names(), {"seed_0": arrays}, training, runs)
            jobs = [job for job in jobs if job.config.schedule == schedule]
            with tempfile.TemporaryDirectory() as folder:
                finish_jobs(jobs, Path(folder), 1)
                for job in jobs:
                    run = read_job(job, Path(folder))
                    yield f"{variant}/{job.config.arm}/{schedule}", run, heldout


def draw() -> Splits:
    """The digits of the main job, few of them."""
    config = DataConfig((0,), labels_per_class=4, pool_size=80, heldout_size=30, test_size=60)
    source = get_source(config.source)
    return source.draw(source.load(config), config, 0)


def digests(run: TrainedRun, images: np.ndarray) -> dict[str, object]:
    """Digests of the parts of a run."""
    scored, pool = run.score(images), run.pool
    kept, measured = pool.kept, pool.measured
    return {
        "steps": run.config.steps,
        "classifier": content_digest(run.classifier.state_dict()),
        "scores": content_digest([value.tolist() for value in vars(scored).values()]),
        "kept": None if kept is None else [int(kept.sum()), content_digest(kept)],
        "history": content_digest(vars(run.history)),
        "influence": None if measured is None else content_digest(vars(measured)),
        "log": content_digest([[line["step"], line["loss"]] for line in run.log]),
    }


if __name__ == "__main__":
    main()
