"""Nodes of `training`."""

from pathlib import Path
from typing import Any

from weighmatch.semisup.config import ArmName, RunsConfig, TrainingConfig

# A pandas.DataFrame: pandas itself would take half a second of every start.
Table = Any
Arrays = dict[str, Any]
Checkpoints = dict[str, dict[str, Any]]


def train_arms(
    training_sets: dict[str, Arrays], training: TrainingConfig, runs: RunsConfig, run_folder: str
) -> tuple[Checkpoints, Table]:
    """Every arm but the oracle, on every seed's contaminated pool."""
    arms = tuple(arm for arm in runs.arms if arm != "oracle")
    return _train(arms, training_sets, training, runs, run_folder)


def remove_intruders(
    training_sets: dict[str, Arrays], ood_truth: dict[str, Arrays]
) -> dict[str, Arrays]:
    """The training sets with every OOD image taken out of the pool: the oracle's alone."""
    return {
        key: {
            **arrays,
            "unlabelled_images": arrays["unlabelled_images"][ood_truth[key]["pool_sources"] == 0],
        }
        for key, arrays in training_sets.items()
    }


def train_oracle(
    oracle_sets: dict[str, Arrays], training: TrainingConfig, runs: RunsConfig, run_folder: str
) -> tuple[Checkpoints, Table]:
    """FixMatch on the cleaned pools, if the oracle is among the arms."""
    arms = tuple(arm for arm in runs.arms if arm == "oracle")
    return _train(arms, oracle_sets, training, runs, run_folder)


def _train(
    arms: tuple[ArmName, ...],
    sets: dict[str, Arrays],
    training: TrainingConfig,
    runs: RunsConfig,
    run_folder: str,
) -> tuple[Checkpoints, Table]:
    import pandas as pd

    from weighmatch.data.config import seed_key
    from weighmatch.data.splits import fingerprint
    from weighmatch.semisup.runs import make_jobs, train_all

    jobs = make_jobs(arms, sets, training, (runs.stages,))
    results = train_all(jobs, Path(run_folder), runs.workers)
    log = [
        {"arm": job.config.arm, "seed": job.config.seed, **line}
        for job in jobs
        for line in results[job.name].pop("metrics")
    ]
    # By arm and seed: here an arm has one schedule, whatever it is.
    checkpoints = {
        f"{job.config.arm}-{seed_key(job.config.seed)}": {
            **results[job.name],
            "pool": fingerprint(job.data.unlabelled_images),
        }
        for job in jobs
    }
    return checkpoints, pd.DataFrame(log, columns=None if log else ["arm", "seed", "step"])
