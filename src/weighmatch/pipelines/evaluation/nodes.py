"""Nodes of `evaluation`. Imports are kept in the functions: scipy and scikit-learn take seconds."""

from typing import Any

from weighmatch.data.splits import SOURCE_NAMES
from weighmatch.semisup.config import TrainingConfig

# A pandas.DataFrame: pandas itself would take half a second of every start.
Table = Any


def join_truth(predictions: Table, ood_truth: dict[str, Any], test_labels: dict[str, Any]) -> Table:
    """Predictions with what the images really are."""
    from weighmatch.evaluation import tables

    return tables.join_truth(predictions, ood_truth, test_labels, list(SOURCE_NAMES))


def score_runs(runs: Table, judgements: Table, manifest: dict[str, Any]) -> Table:
    """One row a run.

    Raises:
        ValueError: if a run was trained on other data than the manifest describes.
    """
    from weighmatch.evaluation import tables

    pools = {s["seed"]: s["fingerprints"]["unlabelled_images"] for s in manifest["seeds"]}
    for run in runs.to_dict("records"):
        if run["pool"] not in ("", pools.get(run["seed"])):
            raise ValueError(
                f"the checkpoint of {run['arm']}, seed {run['seed']}, was trained on other data "
                "than lie in the data folder; run the pipelines training and scoring"
            )
    return tables.score_runs(runs.drop(columns="pool"), judgements)


def bin_confidences(judgements: Table) -> Table:
    """Reliability bins of each arm."""
    from weighmatch.evaluation import tables

    return tables.calibration_table(judgements)


def trace_weights(
    pool_weights: Table, ood_truth: dict[str, Any], training: TrainingConfig
) -> Table:
    """Mean weight and mask rate by source, through training."""
    from weighmatch.evaluation import tables

    return tables.trace_weights(pool_weights, ood_truth, list(SOURCE_NAMES), training.threshold)


def compare_arms(run_scores: Table) -> Table:
    """Arms against FixMatch over paired seeds."""
    from weighmatch.evaluation import tables

    return tables.compare_arms(run_scores)


def summarise(comparison: Table, run_scores: Table, manifest: dict[str, Any]) -> dict[str, Any]:
    """Setting, verdict and numbers of each arm; the setting is that of the data on disk."""
    from weighmatch.evaluation import report, tables

    names = ("ood_source", "ratio", "regime", "labels_per_class", "seeds")
    setting = {name: manifest["parameters"][name] for name in names}
    against = tables.learned_against(run_scores)
    return report.summarise(comparison, against, {**setting, "seeds": list(setting["seeds"])})
