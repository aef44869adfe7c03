"""Nodes of `evaluation`."""

import pandas as pd

from weighmatch.arms import get_arm
from weighmatch.evaluation import judging, lists, pile, ranking, report, tables
from weighmatch.evaluation.chosen import (
    EVERYTHING,
    choose_run,
    describe_limit,
    files_of,
    held_out,
    held_out_by_best,
    trained_part,
)
from weighmatch.evaluation.judging import Arrays, Predictions
from weighmatch.evaluation.key_numbers import key_numbers
from weighmatch.semisup.config import RunsConfig, TrainingConfig

Truth = dict[str, Arrays]


def judge_runs(
    runs: pd.DataFrame,
    predictions: Predictions,
    ood_truth: Truth,
    test_labels: Truth,
    manifest: report.Row,
) -> pd.DataFrame:
    """One row a run that has something to be judged by, and how far their training sets overlap.

    Raises:
        ValueError: if a run was trained on other data than the manifest describes.
    """
    judging.require_same_data(runs, manifest)
    judged = runs[runs["setting"] != EVERYTHING]
    scores = judging.judge_runs(judged, predictions, ood_truth, test_labels)
    return scores.assign(overlap=pile.fold_overlap(manifest))


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


def compare_arms(
    run_scores: pd.DataFrame, manifest: report.Row
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row an arm, and a row a pair of arms, in each cell over paired seeds or folds."""
    against = get_arm(manifest["primary"]["against"])
    return tables.arm_table(run_scores, against), tables.compare_arms(run_scores)


def rank_files(
    ranked_pool: Arrays,
    runs: pd.DataFrame,
    predictions: Predictions,
    test_labels: Truth,
    image_files: pd.DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The ranking of the pool, twice; the images to label next; and the labels to check."""
    key = choose_run(runs)["key"]
    pool, labelled = (files_of(image_files, key, split) for split in ("pool", "labelled"))
    every = image_files[(image_files["key"] == key) & (image_files["split"] == "pool")]
    held = held_out(runs, predictions, test_labels, image_files)
    table = ranking.ranking_table(ranked_pool, every, ranking.fit_temperature(held))
    best = held_out_by_best(runs, predictions, test_labels, image_files)
    check = lists.labels_to_check(ranked_pool, labelled, best)
    return table, table, lists.label_next(ranked_pool, pool), check


def judge_pile(
    run_scores: pd.DataFrame,
    manifest: report.Row,
    runs: pd.DataFrame,
    predictions: Predictions,
    test_labels: Truth,
    image_files: pd.DataFrame,
    rejected_files: pd.DataFrame,
    **tables: pd.DataFrame,
) -> report.Row:
    """Whether the pile helped, how much of it is useful, and what would help most."""
    run = choose_run(runs)
    names = next(cell["classes"] for cell in manifest["cells"] if cell["key"] == run["key"])
    held = held_out(runs, predictions, test_labels, image_files)
    mine = image_files[image_files["key"] == run["key"]]
    found = pile.Lists(
        files=mine,
        rejected=rejected_files,
        class_names=names,
        held=held,
        temperature=ranking.fit_temperature(held),
        **tables,
    )
    return pile.judge_pile(run_scores, run, manifest, found)


def summarise(
    arm_table: pd.DataFrame,
    comparison: pd.DataFrame,
    manifest: report.Row,
    pile_verdict: report.Row,
    runs_done: pd.DataFrame,
    training: TrainingConfig,
    runs: RunsConfig,
) -> report.Row:
    """Setting, verdicts and numbers of each arm; the setting is that of the data on disk."""
    done = trained_part(manifest, runs_done)
    summary = report.summarise(arm_table, comparison, done, pile_verdict)
    limit = describe_limit(manifest, runs_done, training.steps, runs.time_limit)
    return {**summary, "time_limit": limit}


def pick_key_numbers(
    summary: report.Row, influences: pd.DataFrame, training_log: pd.DataFrame
) -> dict[str, dict[str, float]]:
    """The numbers that DVC compares."""
    return key_numbers(summary, influences, training_log)
