"""Paired differences in the study of FixMatch's snapshots."""

import math

import numpy as np
import pandas as pd

from weighmatch.evaluation.meta_tables import interval

# What tells the rows of one seed apart.
POINT = ["stage", "score"]


def compare_influence(quality: pd.DataFrame) -> pd.DataFrame:
    """Differences of AUROC at the same snapshot, score and seed.

    "exact − identity": the exact solve at a damping less no curvature. "CG − exact": conjugate
    gradients less the exact solve at the same damping. "optimum − …": the exact solve at the best
    damping less the weight decay alone, and less no curvature; each seed's optimum is the damping
    with the largest mean over the *other* seeds, so that it is not chosen on what it is judged by.

    Args:
        quality: of `weighmatch.studies.snapshots.influence_quality`, seeds stacked.

    Returns:
        `stage`, `score`, `comparison`, `damping_ratio` (NaN for the optimum, which differs by
        seed), `auroc` (mean difference), `auroc_low` and `auroc_high` (95 % t interval; NaN with
        one seed) and `seeds`. Without a second seed no optimum can be chosen: no such rows.
    """
    rows = []
    for (stage, score), point in quality.groupby(POINT, sort=False):
        exact = _by_seed(point[point["solver"] == "exact"])
        near = _by_seed(point[~point["solver"].isin(["exact", "identity"])])
        identity = _by_seed(point[point["solver"] == "identity"])[math.inf]
        found = [("exact − identity", ratio, exact[ratio] - identity) for ratio in exact]
        found += [("CG − exact", ratio, near[ratio] - exact[ratio]) for ratio in near]
        if len(exact) > 1:
            best = _best_elsewhere(exact)
            if 0.0 in exact:
                found.append(("optimum − weight decay only", np.nan, best - exact[0.0]))
            found.append(("optimum − identity", np.nan, best - identity))
        for comparison, ratio, differences in found:
            values = differences.to_numpy(np.float64)
            low, high = interval(values)
            rows.append(
                {
                    "stage": stage,
                    "score": score,
                    "comparison": comparison,
                    "damping_ratio": ratio,
                    "auroc": float(values.mean()),
                    "auroc_low": low,
                    "auroc_high": high,
                    "seeds": len(values),
                }
            )
    return pd.DataFrame(rows)


def _by_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Seeds × dampings."""
    wide: pd.DataFrame = rows.pivot(index="seed", columns="damping_ratio", values="auroc")
    return wide


def _best_elsewhere(exact: pd.DataFrame) -> pd.Series:
    """Each seed's AUROC at the damping that is best in the mean of the others."""
    chosen = {seed: exact.drop(index=seed).mean().idxmax() for seed in exact.index}
    return pd.Series({seed: exact.loc[seed, ratio] for seed, ratio in chosen.items()})
