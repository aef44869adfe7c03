"""The verdict in words and numbers, and one self-contained page that a person reads."""

import base64
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from typing import Any

import jinja2
import pandas as pd

from weighmatch.evaluation.figures import ARM_NAMES
from weighmatch.evaluation.ihvp_figures import base_cells
from weighmatch.evaluation.statistics import PairedDifference
from weighmatch.evaluation.tables import BASELINE, CEILING, LEARNED

# What learned weights must be held against before they are said to be of use.
CONTROLS = {
    "fixmatch_matched": "FixMatch with the learned arm's total compute",
    "fixmatch_realigned": "FixMatch with that compute and the other choice of alignment",
    "fixmatch_rounds": "FixMatch with that compute and as many restarts, which ranks nothing",
    "pu": "weights from a classifier of labelled against pool images, which need no hypergradient",
}
SOURCES = {
    "unseen": "images of unseen classes",
    "patches": "patches of photographs",
    "noise": "noise",
    "mix": "a mix of unseen classes, photograph patches and noise",
}


def summarise(
    comparison: pd.DataFrame, against: Mapping[str, PairedDifference], setting: Mapping[str, Any]
) -> dict[str, Any]:
    """What `metrics.json` holds: the setting, the verdict and the numbers of each arm.

    Args:
        comparison: from `compare_arms`.
        against: from `learned_against`.
        setting: `ratio`, `regime`, `ood_source`, `labels_per_class`, `seeds`.
    """
    arms: dict[str, dict[str, float | None]] = {
        row["arm"]: {str(k): _number(v) for k, v in row.items() if k != "arm"}
        for row in comparison.to_dict("records")
    }
    learned_minus = {
        arm: {k: None if v is None else _number(v) for k, v in asdict(difference).items()}
        for arm, difference in against.items()
    }
    return {
        "setting": dict(setting),
        "verdict": verdict(arms, against, setting),
        "arms": arms,
        "learned_minus": learned_minus,
    }


def _number(value: Any) -> float | None:
    """A number that JSON can hold: 6 significant digits, None for NaN."""
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def verdict(
    arms: Mapping[str, Mapping[str, Any]],
    against: Mapping[str, PairedDifference],
    setting: Mapping[str, Any],
) -> str:
    """Who won, by how much and how sure that is, and whether the controls do as well."""
    where = describe(setting)
    if BASELINE not in against:
        best = max(arms, key=lambda arm: arms[arm]["accuracy"])
        return (
            f"{where}, the highest mean accuracy is {arms[best]['accuracy']:.1f} % "
            f"({ARM_NAMES[best]}); learned weights and FixMatch were not both run, so there is "
            f"no verdict between them."
        )
    learned, baseline = arms[LEARNED]["accuracy"], arms[BASELINE]["accuracy"]
    sentences = [
        f"{where}, learned-weight FixMatch classifies {learned:.1f} % of the test images and "
        f"FixMatch {baseline:.1f} %: {_difference(against[BASELINE])}, "
        f"sign-flip p = {against[BASELINE].p_value:.2g}. {_conclusion(against[BASELINE])}"
    ]
    for arm, name in CONTROLS.items():
        if arm in against:
            sentences.append(
                f"Against {name} ({arms[arm]['accuracy']:.1f} %) the difference is "
                f"{_difference(against[arm])}."
            )
    if CEILING in arms:
        sentences.append(_towards_oracle(arms[LEARNED], arms[CEILING]))
    return " ".join(sentences)


def describe(setting: Mapping[str, Any]) -> str:
    """The setting as the opening of a sentence."""
    seeds = len(setting["seeds"])
    return (
        f"With {setting['labels_per_class']} labels a class and "
        f"{100 * setting['ratio']:.0f} % of the unlabelled pool out-of-distribution "
        f"({_sources(setting['ood_source'])}), over {seeds} paired "
        f"{'seed' if seeds == 1 else 'seeds'}"
    )


def _sources(ood_source: str) -> str:
    """A source, or several joined by +, in words."""
    return " and ".join(SOURCES[name] for name in ood_source.split("+"))


def _difference(difference: PairedDifference) -> str:
    points = f"{difference.mean:+.1f} points"
    if difference.low is None:
        return f"{points} (one seed: no interval)"
    return f"{points}, 95 % interval {difference.low:+.1f} to {difference.high:+.1f}"


def _conclusion(difference: PairedDifference) -> str:
    low, high = difference.low, difference.high
    if low is None or high is None or low <= 0 <= high:
        return "Neither is shown to be better."
    return (
        "Learned weights beat FixMatch at equal steps."
        if low > 0
        else "Learned weights fall behind FixMatch at equal steps."
    )


def _towards_oracle(learned: Mapping[str, Any], oracle: Mapping[str, Any]) -> str:
    text = f"With every OOD image removed FixMatch reaches {oracle['accuracy']:.1f} %"
    share = learned.get("gap_closed")
    if share is None:
        return f"{text}, no more than with them, so there is no gap to close."
    return f"{text}; learned weights close {100 * share:.0f} % of that gap."


def render_report(
    metrics: Mapping[str, Any],
    comparison: pd.DataFrame,
    study: pd.DataFrame,
    manifest: Mapping[str, Any],
    figures: Mapping[str, bytes],
) -> str:
    """The page, with its figures inside.

    Args:
        metrics: from `summarise`.
        comparison: from `compare_arms`.
        study: from `weighmatch.studies.runs.compare_all`.
        manifest: counts, seeds and fingerprints of the data.
        figures: PNG bytes by name.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _format
    template = (
        resources.files("weighmatch.evaluation").joinpath("report.html.j2").read_text("utf-8")
    )
    encoded = {name: base64.b64encode(png).decode() for name, png in figures.items()}
    rows = [
        {**row, "name": ARM_NAMES[row["arm"]]}
        for row in comparison.sort_values("accuracy").to_dict("records")
    ]
    return environment.from_string(template).render(
        metrics=metrics,
        rows=rows,
        learned=metrics["arms"].get("learned"),
        update_in_steps=_update_in_steps(metrics["arms"]),
        study=_summarise_study(study),
        manifest=manifest,
        figures=encoded,
        sources=SOURCES,
    )


def _update_in_steps(arms: Mapping[str, Mapping[str, Any]]) -> float | None:
    """What one update of the learned weights takes, in steps of FixMatch; None: not both run."""
    if LEARNED not in arms or BASELINE not in arms or arms[LEARNED]["update_seconds"] is None:
        return None
    step = arms[BASELINE]["seconds"] / arms[BASELINE]["steps"]
    return float(arms[LEARNED]["update_seconds"] / step)


def _format(value: Any, digits: int = 1, sign: bool = False) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def _summarise_study(study: pd.DataFrame) -> list[dict[str, Any]]:
    """The end of training at the first L2 and damping: medians over seeds at the middle budget."""
    rows = base_cells(study)
    rows = rows[rows["stage"] == ("1.0" if "1.0" in set(rows["stage"]) else rows["stage"].iloc[0])]
    budgets = sorted(rows.loc[rows["method"] == "neumann", "max_products"].unique())
    middle = budgets[len(budgets) // 2]
    single = rows.groupby("method")["max_products"].transform("nunique") == 1
    rows = rows[single | (rows["max_products"] == middle)]
    columns = ["products", "hypergradient_error", "hypergradient_cosine", "gradients"]
    grouped = rows.groupby(["network", "method"], sort=False)[columns]
    found: list[dict[str, Any]] = grouped.median().reset_index().to_dict("records")
    return found
