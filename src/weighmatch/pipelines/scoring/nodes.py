"""Nodes of `scoring`: nothing here knows a test label or which image is OOD."""

from typing import Any

import numpy as np

from weighmatch.data.config import seed_key
from weighmatch.semisup.config import TrainingConfig

# A pandas.DataFrame: pandas itself would take half a second of every start.
Table = Any
Checkpoints = dict[str, dict[str, Any]]


def score_unseen_images(
    checkpoints: Checkpoints,
    oracle_checkpoints: Checkpoints,
    evaluation_images: dict[str, dict[str, Any]],
) -> Table:
    """Class probabilities and weights of test and held-out images, one row an image and run.

    Raises:
        ValueError: if there is no checkpoint, or one of a seed without images.
    """
    import pandas as pd

    from weighmatch.semisup.scoring import score_images

    everyone = [*checkpoints.values(), *oracle_checkpoints.values()]
    seeds = {checkpoint["config"]["seed"] for checkpoint in everyone}
    if not everyone or not {seed_key(seed) for seed in seeds} <= set(evaluation_images):
        raise ValueError(
            "the checkpoints are not of the data in the data folder; run the pipeline training"
        )
    tables = []
    for checkpoint in everyone:
        config = checkpoint["config"]
        for name, images in evaluation_images[seed_key(config["seed"])].items():
            scored = score_images(checkpoint, images)
            table = pd.DataFrame(scored.probabilities).add_prefix("p_")
            table.insert(0, "weight", scored.weights)
            table.insert(0, "score", scored.scores)
            table.insert(0, "index", np.arange(len(table)))
            table.insert(0, "split", name.removesuffix("_images"))
            table.insert(0, "seed", config["seed"])
            table.insert(0, "arm", config["arm"])
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def collect_runs(
    checkpoints: Checkpoints, oracle_checkpoints: Checkpoints, training: TrainingConfig
) -> tuple[Table, Table]:
    """A row a run, and the weights and confidences of pool images through training.

    `pool` of a run is the fingerprint of the pool that it was trained on. The oracle's pool is
    another one, so it is not among the latter.
    """
    import pandas as pd

    runs, histories = [], []
    for checkpoint in [*checkpoints.values(), *oracle_checkpoints.values()]:
        config, history = checkpoint["config"], checkpoint["history"]
        row = {"arm": config["arm"], "seed": config["seed"], "steps": config["steps"]}
        # The oracle's pool is a part of the others'.
        row["pool"] = "" if config["arm"] == "oracle" else checkpoint["pool"]
        mask_rate = float("nan")
        if history["step"]:
            mask_rate = float((history["confidence"][-1] >= training.threshold).float().mean())
        times = {name: checkpoint[name] for name in ("seconds", "update_seconds")}
        runs.append({**row, **times, "mask_rate": mask_rate})
        if config["arm"] != "oracle" and history["step"]:
            snapshots, images = history["weights"].shape
            histories.append(
                pd.DataFrame(
                    {
                        "arm": config["arm"],
                        "seed": config["seed"],
                        "step": np.repeat(history["step"], images),
                        "index": np.tile(np.arange(images), snapshots),
                        "weight": history["weights"].flatten().numpy(),
                        "confidence": history["confidence"].flatten().numpy(),
                    }
                )
            )
    columns = ["arm", "seed", "step", "index", "weight", "confidence"]
    weights = (
        pd.concat(histories, ignore_index=True) if histories else pd.DataFrame(columns=columns)
    )
    return pd.DataFrame(runs), weights


def collect_influences(checkpoints: Checkpoints) -> Table:
    """Running mean and variance of each pool image's influence, a row an image and run.

    Columns `arm`, `seed`, `index` (in the pool), `mean` and `variance` in units of the spread of
    a batch's influences, and `evidence`, the weight of the measurements behind them (0 to 1);
    images that were never measured have no row.
    """
    import pandas as pd

    tables = []
    for checkpoint in checkpoints.values():
        config, state = checkpoint["config"], checkpoint["weighting"]
        if "influence_square" not in state:
            continue
        measured = state["evidence"] > 0
        evidence = state["evidence"][measured]
        mean = state["influence"][measured] / evidence
        variance = (state["influence_square"][measured] / evidence - mean.square()).clamp(min=0)
        found = {"mean": mean, "variance": variance, "evidence": evidence}
        table = pd.DataFrame({name: column.numpy() for name, column in found.items()})
        table.insert(0, "index", measured.nonzero().squeeze(1).numpy())
        table.insert(0, "seed", config["seed"])
        table.insert(0, "arm", config["arm"])
        tables.append(table)
    columns = ["arm", "seed", "index", "mean", "variance", "evidence"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
