"""Nodes of `ihvp_analysis`."""

import pandas as pd
from matplotlib.figure import Figure

from weighmatch.data.sources.digits import load_digits
from weighmatch.evaluation import ihvp_figures as figures
from weighmatch.studies import memory
from weighmatch.studies.config import StudyConfig
from weighmatch.studies.ihvp import compare_all


def compare_ihvps(ihvp_analysis: StudyConfig, run_folder: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every method in every cell of the study on digits; and the spectra behind them."""
    return compare_all(*load_digits(), ihvp_analysis, run_folder)


def measure_memory(ihvp_analysis: StudyConfig) -> pd.DataFrame:
    """Peak memory of a solve against the number of parameters."""
    return memory.measure_memory(ihvp_analysis)


def draw_ihvps(
    ihvp_comparison: pd.DataFrame, ihvp_spectra: pd.DataFrame, ihvp_memory: pd.DataFrame
) -> dict[str, Figure]:
    """A figure each, by name."""
    return {
        "summary": figures.draw_summary(ihvp_comparison),
        "cost": figures.draw_cost(ihvp_comparison),
        "progress": figures.draw_progress(ihvp_comparison),
        "stability": figures.draw_stability(ihvp_comparison),
        "spectra": figures.draw_spectra(ihvp_spectra),
        "memory": figures.draw_memory(ihvp_memory),
    }
