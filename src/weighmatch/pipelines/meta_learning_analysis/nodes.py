"""Nodes of `meta_learning_analysis`."""

import pandas as pd
from matplotlib.figure import Figure

from weighmatch.data.sources.digits import load_digits
from weighmatch.evaluation import meta_figures as figures
from weighmatch.evaluation import meta_tables as tables
from weighmatch.evaluation.snapshot_figures import draw_influence
from weighmatch.evaluation.snapshot_tables import compare_influence
from weighmatch.studies.meta_config import MetaLearningConfig
from weighmatch.studies.meta_learning import run_all


def run_meta_learning(
    meta_learning_analysis: MetaLearningConfig, run_folder: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every training of the study, step by step; and influence in FixMatch's snapshots."""
    return run_all(*load_digits(), meta_learning_analysis, run_folder)


def summarise_meta_learning(
    meta_learning_steps: pd.DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a training; and paired differences to conjugate gradients."""
    runs = tables.summarise_runs(meta_learning_steps)
    return runs, tables.compare_to(runs)


def compare_snapshots(influence_quality: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of AUROC between dampings and solvers."""
    return compare_influence(influence_quality)


def draw_meta_learning(
    meta_learning_steps: pd.DataFrame,
    meta_learning_runs: pd.DataFrame,
    influence_quality: pd.DataFrame,
) -> dict[str, Figure]:
    """A figure each, by name."""
    return {
        "generalisation": figures.draw_generalisation(meta_learning_runs),
        "forgetting": figures.draw_forgetting(meta_learning_steps),
        "influence": draw_influence(influence_quality),
        "instability": figures.draw_instability(meta_learning_runs),
        "efficiency": figures.draw_efficiency(meta_learning_runs),
    }
