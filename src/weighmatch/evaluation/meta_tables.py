"""Tables of the meta-learning study: a row a training, and means over seeds."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weighmatch.evaluation.statistics import mean_interval

# A classifier that has overflowed gives everything its first class, one of ten or of six.
CHANCE = 0.1
CHANCES = {"contaminated_pool": 1 / 6}
RUN = (
    "experiment",
    "case",
    "problem",
    "parameters",
    "outer_images",
    "method",
    "budget",
    "damping",
    "inner_steps",
    "step",
    "seed",
)

# A training but for its seed.
GROUP = RUN[:-1]
# What runs have in common whose costs can be compared.
PROBLEM = ("experiment", "case", "problem", "parameters", "outer_images")


def summarise_runs(steps: pd.DataFrame) -> pd.DataFrame:
    """A row a training.

    Args:
        steps: of `weighmatch.studies.meta_learning.run_all`, a row an outer step.

    Returns:
        The columns `RUN`; `final`, `best` and `drop` (best − final), test accuracies, where a
        run that diverged ends at chance; `outer_loss`, `outer_accuracy` and `gap` (outer less
        test accuracy) at the end, NaN where it diverged; `retrained_drop` (the same of θ*(φ)
        retrained from scratch, where diagnosed); `cost` (inner gradients), `equal_cost` (that of
        the cheapest run that learns φ on the same problem) and `at_equal_cost` (test accuracy at
        the last outer step that is within it, NaN where none is), `memory` (bytes of one
        hypergradient), `diverged`, `rejected` (share of outer steps whose update was taken
        back), `worst_residual` (largest that the solver left), `residual_growth` (share of outer
        steps at which the residual grew, so that the solver stopped and gave its best iterate),
        `unguarded_residual` (largest that Neumann's series would have left, had nothing stopped
        it, where diagnosed), `batch_cosine` (of hypergradients of two mini-batches), `cosine`
        (with the exact one), `low_share` (means over diagnosed steps), `sharpness` (largest
        α·λ_max that was measured).
    """
    learns = steps[steps["method"] != "none"]
    ends = learns.groupby(list(RUN), sort=False)["cost"].max().reset_index()
    budgets = ends.groupby(list(PROBLEM))["cost"].min()
    rows = []
    for key, run in steps.groupby(list(RUN), sort=False):
        accuracy = run["test_accuracy"].dropna()
        retrained = run["retrained_accuracy"].dropna()
        last = run.iloc[-1]
        diverged = bool(last["diverged"])
        values = dict(zip(RUN, key, strict=True))
        chance = CHANCES.get(str(values["problem"]), CHANCE)
        final = chance if diverged else float(accuracy.iloc[-1])
        best = float(accuracy.max()) if len(accuracy) else chance
        budget = float(budgets.get(tuple(values[name] for name in PROBLEM), np.nan))
        affordable = run.loc[run["cost"] <= budget, "test_accuracy"].dropna()
        rows.append(
            {
                **values,
                "final": final,
                "best": best,
                "drop": best - final,
                "outer_loss": float(last["outer_loss"]),
                "outer_accuracy": float(last["outer_accuracy"]),
                "gap": float(last["outer_accuracy"]) - (np.nan if diverged else final),
                "retrained_drop": float(retrained.max() - retrained.iloc[-1])
                if len(retrained)
                else np.nan,
                "cost": float(last["cost"]),
                "equal_cost": budget,
                "at_equal_cost": float(affordable.iloc[-1]) if len(affordable) else np.nan,
                "memory": float(last["memory"]),
                "diverged": diverged,
                "rejected": float(run["rejected"].mean()),
                "worst_residual": float(run["residual"].max()),
                "residual_growth": float((run["status"] == "diverged").mean()),
                "unguarded_residual": float(run["unguarded_residual"].max()),
                "batch_cosine": float(run["batch_cosine"].mean()),
                "cosine": float(run["cosine"].mean()),
                "low_share": float(run["low_share"].mean()),
                "sharpness": float(run["step_sharpness"].max()),
            }
        )
    return pd.DataFrame(rows)


def compare_to(runs: pd.DataFrame, baseline: str = "conjugate_gradient") -> pd.DataFrame:
    """Paired differences of every method to `baseline`, seed by seed.

    Args:
        runs: of `summarise_runs`.
        baseline: a method; its runs with the same problem and the same seed are the pairs. In the
            map of dampings it is that with the least damping.

    Returns:
        `GROUP`; for each of `final`, `outer_loss`, `gap` and `at_equal_cost` the mean difference
        and its 95 % t interval, `…_low` and `…_high`; and `seeds`.
    """
    chosen = runs[(runs["method"] == baseline) & (runs["experiment"] != "instability")]
    least = chosen.groupby(list(PROBLEM))["damping"].transform("min")
    most = chosen.groupby(list(PROBLEM))["budget"].transform("max")
    chosen = chosen[(chosen["damping"] == least) & (chosen["budget"] == most)]
    pairs = runs.merge(chosen, on=[*PROBLEM, "seed"], suffixes=("", "_base"))
    same = pairs["method"] == baseline
    same &= (pairs["damping"] == pairs["damping_base"]) & (pairs["budget"] == pairs["budget_base"])
    pairs = pairs[~same]
    rows = []
    for key, group in pairs.groupby(list(GROUP), sort=False):
        row = dict(zip(GROUP, key, strict=True))
        for column in ("final", "outer_loss", "gap", "at_equal_cost"):
            differences = (group[column] - group[f"{column}_base"]).dropna().to_numpy(np.float64)
            row[column] = float(differences.mean()) if len(differences) else np.nan
            row[f"{column}_low"], row[f"{column}_high"] = interval(differences)
        rows.append({**row, "seeds": len(group)})
    return pd.DataFrame(rows)


def interval(values: NDArray[np.float64], single: float = np.nan) -> tuple[float, float]:
    """95 % t interval of a mean; twice `single` where there are fewer than two values."""
    low, high = mean_interval(values)
    return (single, single) if low is None or high is None else (low, high)


def means(runs: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """Mean of a column with its 95 % t interval over seeds.

    Args:
        runs: a row a training.
        by: columns that tell the groups apart.
        column: whose mean.

    Returns:
        `by`, `mean`, `low`, `high`, `count`, in the order in which the groups come.
    """
    rows = []
    for key, group in runs.groupby(list(by), sort=False):
        values = group[column].dropna().to_numpy(np.float64)
        if len(values) == 0:
            continue
        mean = float(values.mean())
        # One seed has no interval: a dot is drawn.
        low, high = interval(values, single=mean)
        found = {"mean": mean, "low": low, "high": high, "count": len(values)}
        rows.append({**dict(zip(by, key, strict=True)), **found})
    return pd.DataFrame(rows)


def pareto(cost: Sequence[float], value: Sequence[float]) -> list[int]:
    """Numbers of the points that no other one beats at no more cost, in the order of cost."""
    best, found = -np.inf, []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], -value[i])):
        if value[i] > best:
            best = value[i]
            found.append(i)
    return found
