"""Nodes of `ihvp_analysis`."""

from typing import Any

import pandas as pd

from weighmatch.studies.config import StudyConfig


def compare_ihvps(training_sets: dict[str, Any], ihvp_analysis: StudyConfig) -> pd.DataFrame:
    """Each method against the exact solve, at the trained point of each of the first seeds."""
    from weighmatch.semisup import TrainingSet
    from weighmatch.semisup.runs import one_thread
    from weighmatch.studies.ihvp import compare_methods

    chosen = list(training_sets.items())[: ihvp_analysis.seeds]
    with one_thread():
        tables = [
            compare_methods(TrainingSet(**arrays), ihvp_analysis, int(key.rpartition("_")[2]))
            for key, arrays in chosen
        ]
    return pd.concat(tables, ignore_index=True)


def draw_ihvps(ihvp_comparison: pd.DataFrame) -> Any:
    """Error of the hypergradient against products."""
    from weighmatch.evaluation.figures import draw_ihvp

    return draw_ihvp(ihvp_comparison)
