"""Nodes of `evaluation`."""

import pandas as pd

from weighmatch.evaluation import judging, report, tables
from weighmatch.evaluation.judging import Arrays, Predictions
from weighmatch.semisup.config import TrainingConfig

Truth = dict[str, Arrays]


def judge_runs(
    runs: pd.DataFrame,
    predictions: Predictions,
    ood_truth: Truth,
    test_labels: Truth,
    manifest: report.Row,
) -> pd.DataFrame:
    """One row a run.

    Raises:
        ValueError: if a run was trained on other data than the manifest describes.
    """
    judging.require_same_data(runs, manifest)
    return judging.judge_runs(runs, predictions, ood_truth, test_labels)


def bin_confidences(
    runs: pd.DataFrame, predictions: Predictions, test_labels: Truth
) -> pd.DataFrame:
    """Reliability bins of each arm."""
    return judging.calibration_table(runs, predictions, test_labels)


def trace_weights(
    runs: pd.DataFrame, predictions: Predictions, ood_truth: Truth, training: TrainingConfig
) -> pd.DataFrame:
    """Mean weight and mask rate of each kind of image, through training."""
    return judging.trace_weights(runs, predictions, ood_truth, training.threshold)


def collect_influences(runs: pd.DataFrame, predictions: Predictions) -> pd.DataFrame:
    """Mean and variance of each pool image's measured influence."""
    return judging.collect_influences(runs, predictions)


def compare_arms(run_scores: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row an arm, and a row a pair of arms, in each cell over paired seeds."""
    return tables.arm_table(run_scores), tables.compare_arms(run_scores)


def summarise(
    arm_table: pd.DataFrame, comparison: pd.DataFrame, manifest: report.Row
) -> report.Row:
    """Setting, verdict and numbers of each arm; the setting is that of the data on disk."""
    return report.summarise(arm_table, comparison, manifest)
