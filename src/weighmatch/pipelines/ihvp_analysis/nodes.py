"""Nodes of `ihvp_analysis`."""

from typing import Any

from weighmatch.studies.config import StudyConfig

# A pandas.DataFrame: pandas itself would take half a second of every start.
Table = Any


def compare_ihvps(ihvp_analysis: StudyConfig) -> tuple[Table, Table]:
    """Every method in every cell of the study on digits; and the spectra behind them."""
    from weighmatch.data.sources import load_digits
    from weighmatch.studies.runs import compare_all

    return compare_all(*load_digits(), ihvp_analysis)


def measure_memory(ihvp_analysis: StudyConfig) -> Table:
    """Peak memory of a solve against the number of parameters."""
    from weighmatch.studies.memory import measure_memory

    return measure_memory(ihvp_analysis)


def draw_ihvps(
    ihvp_comparison: Table, ihvp_spectra: Table, ihvp_memory: Table
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
