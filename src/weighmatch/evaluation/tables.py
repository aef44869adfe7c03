"""From a row a run to a row an arm, and to paired differences between arms."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import astuple

import numpy as np
import pandas as pd

from weighmatch.arms import (
    FIXMATCH,
    LEARNED,
    ORACLE,
    SCHEDULES,
    Arm,
    all_arms,
    get_arm,
    in_order,
)
from weighmatch.evaluation.judging import CELL, SERIES
from weighmatch.evaluation.statistics import gap_closed, holm, mean_interval, paired_difference

# The columns of a run of which an arm's row holds the mean over seeds.
MEANS = (
    *("steps", "seconds", "update_seconds", "ece", "nll", "auroc_weight", "auroc_confidence"),
    *("weight_id", "weight_ood", "mask_rate"),
)
# The columns that compare two arms: the fields of a `PairedDifference` and of a `GapClosed`.
DIFFERENCE = ("difference", "difference_low", "difference_high", "p_value", "seeds")
GAP = ("gap_closed", "gap_closed_low", "gap_closed_high")
NUMBERS = (*DIFFERENCE[:-1], "p_holm", *GAP)
ONLINE = "online"
CEILING = (ORACLE.name, ONLINE)

# An arm and a schedule.
Series = tuple[str, str]
Accuracies = dict[Series, "pd.Series[float]"]


def by_cell(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each cell, after its title, such as "unseen: 75 % of the pool OOD".

    Cells are in the order of the table, those that differ in the ratio alone by the ratio.
    """
    told = [name for name in ("regime", "source") if table[name].nunique() > 1]
    labels_differ = table["labels_per_class"].nunique() > 1
    cells: dict[str, list[tuple[float, str, pd.DataFrame]]] = {}
    for _, rows in table.groupby(list(CELL), sort=False, dropna=False):
        cell = rows.iloc[0]
        name = ", ".join(
            [str(cell["setting"]), *(str(cell[column]).replace("_", " ") for column in told)]
        )
        name += f", {cell['labels_per_class']} labels a class" if labels_differ else ""
        ratio = float(cell["ratio"])
        title = name if np.isnan(ratio) else f"{name}: {100 * ratio:.0f} % of the pool OOD"
        cells.setdefault(name, []).append((ratio, title, rows))
    return [
        (title, rows)
        for alike in cells.values()
        for _, title, rows in sorted(alike, key=lambda found: found[0])
    ]


def label_series(table: pd.DataFrame) -> dict[Series, str]:
    """What figures and the report call each arm and schedule of a table, in the order of all arms.

    An arm that was trained in several schedules has that of each in its label.
    """
    there = {(str(arm), str(schedule)) for arm, schedule in table[["arm", "schedule"]].to_numpy()}
    labels = {}
    for arm in in_order([name for name, _ in there]):
        schedules = [schedule for schedule in SCHEDULES if (arm.name, schedule) in there]
        for schedule in schedules:
            words = f", {schedule.replace('_', ' ')}" if len(schedules) > 1 else ""
            labels[arm.name, str(schedule)] = f"{arm.label}{words}"
    return labels


def of_series(table: pd.DataFrame, series: Series) -> pd.DataFrame:
    """The rows of one arm and schedule."""
    return table[(table["arm"] == series[0]) & (table["schedule"] == series[1])]


def arm_table(scores: pd.DataFrame, against: Arm = FIXMATCH) -> pd.DataFrame:
    """One row an arm and schedule in each cell, also against one of them over paired seeds.

    Args:
        scores: from `judge_runs`.
        against: the arm that all others are held against.

    Returns:
        The columns of `SERIES`, `seeds`, `accuracy` with its 95 % t interval `accuracy_low`,
        `accuracy_high` (%), and the means over seeds of the columns `MEANS`. Against that arm:
        `difference`, `difference_low`, `difference_high` (points), `p_value` (sign-flip),
        `p_holm` (over the arms of a cell) and, where the oracle was run, `gap_closed` with its
        bootstrap interval `gap_closed_low`, `gap_closed_high`. NaN where not defined.
    """
    rows = []
    for series, mine in scores.groupby(list(SERIES), sort=False, dropna=False):
        accuracy = mine["accuracy"].dropna()
        low, high = mean_interval(accuracy.to_numpy(), overlap_of(scores))
        row = {"accuracy": accuracy.mean(), "accuracy_low": low, "accuracy_high": high}
        means = mine[list(MEANS)].astype(float).mean()
        rows.append({**dict(zip(SERIES, series, strict=True)), "seeds": len(mine), **row, **means})
    own = pd.DataFrame(rows)
    own[["accuracy_low", "accuracy_high"]] = own[["accuracy_low", "accuracy_high"]].astype(float)
    others = _pairs(scores, lambda arm, _: [] if arm == against else [against])
    table = own.merge(others.drop(columns=["against", "seeds"]), how="left", on=list(SERIES))
    return _with_holm(table, CELL)


def compare_arms(scores: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of accuracy between arms within each cell.

    Every arm is compared with each rival, a rival with the rivals before it, and learned weights
    with all other arms. Both arms have the same schedule. If the other arm was not run in that
    schedule, its online runs stand in for it, unless it is a rival with more schedules than that.

    Args:
        scores: from `judge_runs`.

    Returns:
        The columns of `SERIES`, `against`, `difference` (points) with its 95 % t interval
        `difference_low`, `difference_high`, `p_value` (sign-flip), `p_holm` (over the ratios of a
        setting and pair), `seeds`, and `gap_closed`, the share of the way from `against`, a
        FixMatch, to the oracle, with its bootstrap interval `gap_closed_low`, `gap_closed_high`.
        NaN where not defined.
    """
    families = [column for column in (*SERIES, "against") if column != "ratio"]
    return _with_holm(_pairs(scores, _rivals), families)


def _pairs(
    scores: pd.DataFrame,
    rivals: Callable[[Arm, Collection[str]], Sequence[Arm]],
) -> pd.DataFrame:
    """One row a pair in a cell: every arm beside those that `rivals` names for it."""
    rows = []
    for values, cell in scores.groupby(list(CELL), sort=False, dropna=False):
        arms = accuracies(cell)
        for (name, schedule), accuracy in arms.items():
            for other in rivals(get_arm(name), dict.fromkeys(arm for arm, _ in arms)):
                needs_schedule = other.rival and other.schedules != (ONLINE,)
                alone = None if needs_schedule else arms.get((other.name, ONLINE))
                baseline = arms.get((other.name, schedule), alone)
                if baseline is None:
                    continue
                plain = other.pool == "whole" and not other.weighs
                goal = arms.get(CEILING) if plain and name != ORACLE.name else None
                if numbers := _compare(accuracy, baseline, goal, overlap_of(scores)):
                    names = dict(zip(SERIES, (*values, name, schedule), strict=True))
                    rows.append({**names, "against": other.name, **numbers})
    table = pd.DataFrame(rows, columns=[*SERIES, "against", *NUMBERS, "seeds"])
    return table.astype(dict.fromkeys(NUMBERS, float))


def overlap_of(scores: pd.DataFrame) -> float:
    """How far training sets overlap, see `statistics.paired_difference`; 0 without the column."""
    return float(scores["overlap"].iloc[0]) if "overlap" in scores and len(scores) else 0.0


def accuracies(cell: pd.DataFrame) -> Accuracies:
    """The accuracies (%) of each arm and schedule by seed, without runs that have none."""
    return {
        (str(arm), str(schedule)): mine.set_index("seed")["accuracy"].dropna().sort_index()
        for (arm, schedule), mine in cell.groupby(["arm", "schedule"], sort=False)
    }


def _rivals(arm: Arm, there: Collection[str]) -> list[Arm]:
    """The arms that an arm is compared with; `there` are the names of those that were run."""
    rivals = [other for other in all_arms() if other.rival]
    if arm == LEARNED:
        others = [get_arm(name) for name in there]
        return rivals + [other for other in others if not other.rival and other != LEARNED]
    return rivals[: rivals.index(arm)] if arm.rival else rivals


def _compare(
    accuracy: "pd.Series[float]",
    baseline: "pd.Series[float]",
    goal: "pd.Series[float] | None",
    overlap: float,
) -> dict[str, float | None]:
    """The numbers of one comparison over the seeds that all have; none without such a seed."""
    pairs = pd.concat([accuracy, baseline], axis=1, join="inner").to_numpy()
    if not len(pairs):
        return {}
    difference = paired_difference(pairs[:, 0] - pairs[:, 1], overlap)
    row = dict(zip(DIFFERENCE, astuple(difference), strict=True))
    if goal is not None:
        triples = pd.concat([accuracy, baseline, goal], axis=1, join="inner").to_numpy()
        if len(triples):
            row |= dict(zip(GAP, astuple(gap_closed(*triples.T)), strict=True))
    return row


def _with_holm(table: pd.DataFrame, families: Iterable[str]) -> pd.DataFrame:
    """The table with `p_holm`: the p-values, adjusted within each family of tests."""
    tested = table[table["p_value"].notna()]
    for _, family in tested.groupby(list(families), sort=False, dropna=False):
        table.loc[family.index, "p_holm"] = holm(family["p_value"].tolist())
    return table
