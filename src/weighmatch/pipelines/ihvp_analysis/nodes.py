"""Nodes of `ihvp_analysis`."""

from typing import Any

import pandas as pd

from weighmatch.studies.config import StudyConfig


def compare_ihvps(ihvp_analysis: StudyConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every method in every cell of the study on digits; and the spectra behind them."""
    from weighmatch.data.sources import load_digits
    from weighmatch.studies.runs import compare_all

    return compare_all(*load_digits(), ihvp_analysis)


def measure_memory(ihvp_analysis: StudyConfig) -> pd.DataFrame:
    """Peak memory of a solve against the number of parameters."""
    from weighmatch.studies.memory import measure_memory

    return measure_memory(ihvp_analysis)


def draw_ihvps(
    ihvp_comparison: pd.DataFrame, ihvp_spectra: pd.DataFrame, ihvp_memory: pd.DataFrame
) -> tuple[Any, Any, Any, Any, Any]:
    """Cost, progress, stability, spectra, memory."""
    from weighmatch.evaluation import ihvp_figures as figures

    return (
        figures.draw_cost(ihvp_comparison),
        figures.draw_progress(ihvp_comparison),
        figures.draw_stability(ihvp_comparison),
        figures.draw_spectra(ihvp_spectra),
        figures.draw_memory(ihvp_memory),
    )
