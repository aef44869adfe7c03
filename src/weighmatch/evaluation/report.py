"""The verdict in words and numbers, and one self-contained page that a person reads."""

import base64
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import resources
from types import MappingProxyType
from typing import Any

import jinja2
import pandas as pd

from weighmatch.arms import FIXMATCH, LEARNED, ORACLE, SCHEDULES, all_arms, get_arm
from weighmatch.data.ood import describe_ood
from weighmatch.evaluation.ihvp_figures import base_cells
from weighmatch.evaluation.judging import CELL, SERIES
from weighmatch.evaluation.pile import fold_overlap
from weighmatch.evaluation.statistics import PairedDifference
from weighmatch.evaluation.tables import DIFFERENCE, by_cell, label_series

Row = Mapping[str, Any]


def summarise(table: pd.DataFrame, comparison: pd.DataFrame, manifest: Row) -> dict[str, Any]:
    """What `summary.json` holds: the setting, the verdict and the numbers of each arm.

    All of these belong to the first cell of the manifest; the settings of other cells are listed.

    Args:
        table: from `arm_table`.
        comparison: from `compare_arms`.
        manifest: `cells`, a list with the columns of `CELL`, `ood_source` and `seed` for each set
            of splits.

    Returns:
        `setting`, with `others` if there are other cells; `verdict`; `arms`, by name; and
        `learned_minus`, the paired differences of learned weights to each other arm, by name. An
        arm of several schedules is here in the last of `SCHEDULES`.
    """
    cells = pd.DataFrame(manifest["cells"])[list(CELL)]
    first = cells.head(1).astype(table[list(CELL)].dtypes)
    mine = table.merge(first).sort_values("schedule", key=lambda s: s.map(SCHEDULES.index))
    mine = mine.drop_duplicates("arm", keep="last").sort_index()
    arms = {
        row["arm"]: {str(k): _number(v) for k, v in row.items() if k not in SERIES}
        for row in mine.to_dict("records")
    }
    pairs = comparison.merge(first).merge(mine[["arm", "schedule"]])
    pairs = pairs[pairs["arm"] == LEARNED.name].set_index("against")[list(DIFFERENCE)]
    known: Any = pairs.astype(object).where(pairs.notna(), None)
    against = {str(arm): PairedDifference(*row) for arm, *row in known.itertuples()}
    settings = _settings(manifest)
    setting = settings[0] | ({"others": settings[1:]} if len(settings) > 1 else {})
    learned_minus = {
        arm: {name: None if value is None else _number(value) for name, value in asdict(d).items()}
        for arm, d in against.items()
    }
    return {
        "setting": setting,
        "verdict": verdict(arms, against, setting, bool(fold_overlap(manifest))),
        "arms": arms,
        "learned_minus": learned_minus,
    }


def _settings(manifest: Row) -> list[dict[str, Any]]:
    """The setting of each cell of the manifest, in order, with its seeds."""
    settings = []
    for _, cell in pd.DataFrame(manifest["cells"]).groupby(list(CELL), sort=False, dropna=False):
        first = cell.to_dict("records")[0]
        names = ("ood_source", "ratio", "regime", "labels_per_class")
        known = {name: None if _is_unknown(first[name]) else first[name] for name in names}
        title = {} if first["setting"] == first["ood_source"] else {"name": first["setting"]}
        settings.append({**title, **known, "seeds": cell["seed"].tolist()})
    return settings


def _is_unknown(value: Any) -> bool:
    return value is None or value != value


def _number(value: Any) -> float | None:
    """A number that JSON can hold: 6 significant digits, None for NaN."""
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def verdict(
    arms: Mapping[str, Row],
    against: Mapping[str, PairedDifference],
    setting: Row,
    folds: bool = False,
) -> str:
    """Who won, by how much and how sure that is, and whether the controls do as well.

    `folds` says that the seeds are folds of one set.
    """
    where = describe(setting)
    accuracy = {arm: row["accuracy"] for arm, row in arms.items() if row["accuracy"] is not None}
    if not accuracy:
        return f"{where}, no accuracy is known, as there are no labelled test images."
    if FIXMATCH.name not in against:
        best = max(accuracy, key=lambda arm: accuracy[arm])
        return (
            f"{where}, the highest mean accuracy is {accuracy[best]:.1f} % "
            f"({get_arm(best).label}); learned weights and FixMatch were not both "
            "run, so there is no verdict between them."
        )
    baseline = against[FIXMATCH.name]
    sentences = [
        f"{where}, learned-weight FixMatch classifies {accuracy[LEARNED.name]:.1f} % of the test "
        f"images and FixMatch {accuracy[FIXMATCH.name]:.1f} %: {_difference(baseline)}, "
        f"{'corrected' if folds else 'sign-flip'} p = {baseline.p_value:.2g}. "
        f"{_conclusion(baseline)}"
    ]
    for arm in all_arms():
        if arm.control and arm.name in against:
            sentences.append(
                f"Against {arm.control} ({accuracy[arm.name]:.1f} %) the difference is "
                f"{_difference(against[arm.name])}."
            )
    if ORACLE.name in accuracy:
        sentences.append(_towards_oracle(arms[LEARNED.name], accuracy[ORACLE.name]))
    return " ".join(sentences)


def describe(setting: Row) -> str:
    """The setting as the opening of a sentence."""
    seeds = len(setting["seeds"])
    pool = ""
    if not _is_unknown(setting["ratio"]):
        pool = (
            f" and {100 * setting['ratio']:.0f} % of the unlabelled pool out-of-distribution "
            f"({describe_ood(setting['ood_source'])})"
        )
    return (
        f"With {setting['labels_per_class']} labels a class{pool}, over {seeds} paired "
        f"{'seed' if seeds == 1 else 'seeds'}"
    )


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


def _towards_oracle(learned: Row, oracle: float) -> str:
    text = f"With every OOD image removed FixMatch reaches {oracle:.1f} %"
    share = learned["gap_closed"]
    if share is None:
        return f"{text}, no more than with them, so there is no gap to close."
    return f"{text}; learned weights close {100 * share:.0f} % of that gap."


def render_report(
    metrics: Row,
    table: pd.DataFrame,
    study: pd.DataFrame | None,
    manifest: Row,
    figures: Mapping[str, bytes],
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """The page, with its figures inside.

    Args:
        metrics: from `summarise`.
        table: from `arm_table`.
        study: from `weighmatch.studies.ihvp.compare_all`, or None for a page without it.
        manifest: `cells`, a list with the counts, fingerprints and names of classes of each set
            of splits.
        figures: PNG bytes by name: accuracy, differences, weights, auroc, calibration, gallery,
            samples and, with a study, ihvp.
        sizes: bytes of the gallery and of the files of the exported model, by name.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _format
    template = (
        resources.files("weighmatch.evaluation").joinpath("report.html.j2").read_text("utf-8")
    )
    cells = by_cell(table)
    encoded = {name: base64.b64encode(png).decode() for name, png in figures.items()}
    return environment.from_string(template).render(
        metrics={"pile": None, **metrics},
        cells=[(title, rows.sort_values("accuracy").to_dict("records")) for title, rows in cells],
        labels=label_series(table),
        learned_arm=LEARNED.name,
        learned=metrics["arms"].get(LEARNED.name),
        update_in_steps=_update_in_steps(metrics["arms"]),
        study=None if study is None else _summarise_study(study),
        manifest=manifest,
        recipe=list(_flat(manifest.get("recipe") or {})),
        figures=encoded,
        model=[(name, size / 1e6) for name, size in sizes.items() if name != "gallery.html"],
        gallery=sizes.get("gallery.html", 0) / 1e6,
    )


def _flat(group: Row, above: str = "") -> Iterator[tuple[str, str]]:
    """Parameters of groups within groups, such as training.influence.damping, with their values."""
    for name, value in group.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            listed = isinstance(value, list | tuple)
            yield f"{above}{name}", ", ".join(map(str, value)) if listed else str(value)


def _update_in_steps(arms: Mapping[str, Row]) -> float | None:
    """What one update of the learned weights takes, in steps of FixMatch; None: not both run."""
    learned, fixmatch = arms.get(LEARNED.name), arms.get(FIXMATCH.name)
    if learned is None or fixmatch is None or learned["update_seconds"] is None:
        return None
    return float(learned["update_seconds"] * fixmatch["steps"] / fixmatch["seconds"])


def _format(value: Any, digits: int = 1, sign: bool = False) -> str:
    if _is_unknown(value):
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
