"""At most twenty numbers that tell one run of the project from another, for `dvc metrics diff`."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from weighmatch.arms import FIXMATCH, LEARNED, MATCHED, ORACLE, SUPERVISED, all_arms

# Arms whose accuracy is told first, and how many are told.
FIRST = (SUPERVISED, FIXMATCH, MATCHED, LEARNED, ORACLE)
ARMS = 5
# Differences that are told: those of the declared comparisons, and that to plain FixMatch.
RIVALS = (MATCHED, SUPERVISED, FIXMATCH)


def key_numbers(
    summary: Mapping[str, Any], influences: pd.DataFrame, training_log: pd.DataFrame
) -> dict[str, dict[str, float]]:
    """What `metrics.json` holds.

    Args:
        summary: from `summarise`.
        influences: from `collect_influences`.
        training_log: the lines of each run, in order, with `run` and `loss`.

    Returns:
        Groups of numbers by names that say what they are and their unit; what is not known is
        left out. Accuracies, calibration errors and shares are in percent, differences in points
        with their 95 % interval; the loss is the mean over runs at their end. A harmful image is
        one that, measured, raises the loss.
    """
    arms, minus, pile = summary["arms"], summary["learned_minus"], summary.get("pile") or {}
    order = [*FIRST, *(arm for arm in all_arms() if arm not in FIRST)]
    there = [arm.name for arm in order if arm.name in arms][:ARMS]
    learned: Mapping[str, Any] = arms.get(LEARNED.name, {})
    harmful = (influences["mean"] < 0).mean() if len(influences) else None
    groups: dict[str, dict[str, Any]] = {
        "accuracy_percent": {name: arms[name]["accuracy"] for name in there},
        **{
            f"learned_minus_{arm.name}_points": {
                part: minus.get(arm.name, {}).get(part) for part in ("mean", "low", "high")
            }
            for arm in RIVALS
        },
        "auroc_of_seen_against_foreign": {
            "learned_weight": learned.get("auroc_weight"),
            "confidence": learned.get("auroc_confidence"),
        },
        "last_training_loss": {LEARNED.name: _last_loss(training_log)},
        "calibration_error_percent": {LEARNED.name: _percent(learned.get("ece"))},
        "pool_percent": {
            "useful": _percent(pile.get("useful", {}).get("share")),
            "harmful": _percent(harmful),
        },
    }
    return {name: numbers for name, group in groups.items() if (numbers := dict(_known(group)))}


def _last_loss(log: pd.DataFrame) -> float | None:
    """The loss of learned weights at the end of training, over runs."""
    mine = log[log["run"].str.startswith(f"{LEARNED.name}-")]
    return float(mine.groupby("run")["loss"].last().mean()) if len(mine) else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _known(group: Mapping[str, float | None]) -> Iterator[tuple[str, float]]:
    """The numbers that there are, to six digits."""
    for name, value in group.items():
        if value is not None and value == value:
            yield name, float(f"{value:.6g}")
