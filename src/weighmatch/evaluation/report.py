"""The numbers of a job, and one self-contained page that a person reads."""

import base64
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import resources
from types import MappingProxyType
from typing import Any

import jinja2
import pandas as pd

from weighmatch.arms import (
    LEARNED,
    ORACLE,
    POOL_HELPS,
    SCHEDULES,
    all_arms,
    get_comparison,
)
from weighmatch.data.ood import describe_ood
from weighmatch.evaluation.chosen import EVERYTHING
from weighmatch.evaluation.ihvp_figures import at_the_end, largest_network
from weighmatch.evaluation.judging import CELL, SERIES
from weighmatch.evaluation.origin import Origin
from weighmatch.evaluation.pile import fold_overlap
from weighmatch.evaluation.statistics import PairedDifference, holm
from weighmatch.evaluation.tables import DIFFERENCE, by_cell, label_series
from weighmatch.evaluation.verdict import Verdict, in_digits, in_words, judge, judge_nothing
from weighmatch.studies.methods import get_method, get_methods

Row = Mapping[str, Any]


def summarise(
    table: pd.DataFrame,
    comparison: pd.DataFrame,
    manifest: Row,
    pile: Row = MappingProxyType({}),
) -> dict[str, Any]:
    """What `summary.json` holds: the setting, the verdict and the numbers of each arm.

    All of these belong to the first cell of the manifest; the settings of other cells are listed.

    Args:
        table: from `arm_table`.
        comparison: from `compare_arms`.
        manifest: `cells`, a list with the columns of `CELL`, `ood_source` and `seed` for each set
            of splits; and `primary`, the names of the arms of the declared comparison.
        pile: from `judge_pile`; its verdict is that of a pool as it was found.

    Returns:
        `setting`, with `others` if there are other cells; the fields of a `Verdict`, with the
        `question` that it answers; `arms`, by name; `learned_minus`, the paired differences of
        learned weights to each other arm, by name; and `pile`, if given. An arm of several
        schedules is here in the last of `SCHEDULES`. Differences that are not the declared one
        have `p_holm`, corrected for how many there are.
    """
    cells = pd.DataFrame(manifest["cells"])[list(CELL)]
    first = cells.head(1).astype(table[list(CELL)].dtypes)
    mine = table.merge(first).sort_values("schedule", key=lambda s: s.map(SCHEDULES.index))
    mine = mine.drop_duplicates("arm", keep="last").sort_index()
    arms = {
        row["arm"]: {str(k): _number(v) for k, v in row.items() if k not in SERIES}
        for row in mine.to_dict("records")
    }
    # The tables are files of two kinds, which keep an empty column as another type.
    pairs = comparison.merge(cells.head(1).astype(comparison[list(CELL)].dtypes))
    pairs = pairs.merge(mine[["arm", "schedule"]])
    pairs = pairs[pairs["arm"] == LEARNED.name].set_index("against")[list(DIFFERENCE)]
    known: Any = pairs.astype(object).where(pairs.notna(), None)
    against = {str(arm): PairedDifference(*row) for arm, *row in known.itertuples()}
    primary = manifest["primary"]["against"]
    settings = _settings(manifest)
    found = {
        "question": get_comparison(primary).question,
        "setting": settings[0] | ({"others": settings[1:]} if len(settings) > 1 else {}),
        **asdict(_verdict(arms, against, primary)),
        "arms": arms,
        "learned_minus": _differences(against, primary),
    }
    if pile:
        own = ("verdict", "light", "sure") if primary == POOL_HELPS.against.name else ()
        found |= {**{name: pile[name] for name in own}, "pile": pile}
    return found


def _verdict(
    arms: Mapping[str, Row], against: Mapping[str, PairedDifference], primary: str
) -> Verdict:
    """The verdict on the declared comparison of learned weights with the arm `primary`."""
    comparison = get_comparison(primary)
    accuracy = {arm: row["accuracy"] for arm, row in arms.items() if row["accuracy"] is not None}
    if primary in against:
        return judge(comparison, (accuracy[LEARNED.name], accuracy[primary]), against[primary])
    return judge_nothing(comparison, accuracy)


def _differences(against: Mapping[str, PairedDifference], primary: str) -> dict[str, Row]:
    """The differences as JSON holds them; the declared one is not corrected, the others are."""
    others = [arm for arm in against if arm != primary]
    corrected = dict(zip(others, holm([against[arm].p_value for arm in others]), strict=True))
    return {
        arm: {
            name: None if value is None else _number(value)
            for name, value in {**asdict(found), "p_holm": corrected.get(arm)}.items()
        }
        for arm, found in against.items()
    }


def _settings(manifest: Row) -> list[dict[str, Any]]:
    """The setting of each cell of the manifest that is judged, in order, with its seeds."""
    settings = []
    cells = pd.DataFrame(manifest["cells"])
    judged = cells[cells["setting"] != EVERYTHING]
    for _, cell in judged.groupby(list(CELL), sort=False, dropna=False):
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


def describe(setting: Row, folds: bool = False) -> str:
    """The setting in a sentence; `folds`: seeds are folds of the labelled images."""
    count = len(setting["seeds"])
    repeats = "seed" if count == 1 else "seeds"
    if folds:
        repeats = f"{'fold' if count == 1 else 'folds'} of the labelled images"
    pool = ""
    if not _is_unknown(setting["ratio"]):
        pool = (
            f" In the pool of unlabelled images, {100 * setting['ratio']:.0f} % are foreign: "
            f"{describe_ood(setting['ood_source'])}."
        )
    labels = setting["labels_per_class"]
    return (
        f"Training had {labels} {'label' if labels == 1 else 'labels'} a class and was repeated "
        f"over {in_words(count)} {repeats}.{pool}"
    )


def render_report(
    metrics: Row,
    table: pd.DataFrame,
    study: pd.DataFrame | None,
    manifest: Row,
    figures: Mapping[str, bytes],
    sizes: Mapping[str, int] = MappingProxyType({}),
    parameters: Row = MappingProxyType({}),
    origin: Origin | None = None,
    frozen: bool = False,
) -> str:
    """The page, with its figures inside.

    Args:
        metrics: from `summarise`.
        table: from `arm_table`, against the rival of the declared comparison.
        study: from `weighmatch.studies.ihvp.compare_all`, or None for a page without it.
        manifest: `cells`, a list with the counts, fingerprints and names of classes of each set
            of splits; `primary`; and the `recipe` of the source.
        figures: PNG bytes by name: accuracy, differences, weights, auroc, calibration, gallery,
            samples and, with a study, ihvp.
        sizes: bytes of the gallery and of the files of the exported model, by name.
        parameters: groups of parameters, such as `training`.
        origin: how the page was made; None: it is not told.
        frozen: whether the network is a pretrained backbone that was not trained further.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _format
    template = (
        resources.files("weighmatch.evaluation").joinpath("report.html.j2").read_text("utf-8")
    )
    encoded = {name: base64.b64encode(png).decode() for name, png in figures.items()}
    chosen = dict(_flat(manifest.get("recipe") or {}))
    return environment.from_string(template).render(
        metrics={"pile": None, "time_limit": None, **metrics},
        other_settings=metrics["setting"].get("others", []),
        comparison=get_comparison(manifest["primary"]["against"]),
        setting=describe(metrics["setting"], bool(fold_overlap(manifest))),
        knows_truth=bool(table["auroc_confidence"].notna().any()),
        everything=EVERYTHING,
        towards_oracle=_towards_oracle(metrics["arms"]),
        cells=[
            (title, rows.sort_values("accuracy").to_dict("records"))
            for title, rows in by_cell(table)
        ],
        labels=label_series(table),
        learned_arm=LEARNED.name,
        learned=metrics["arms"].get(LEARNED.name),
        differences=[
            (arm, metrics["learned_minus"][arm.name])
            for arm in all_arms()
            if arm.name in metrics["learned_minus"]
        ],
        update_in_steps=_update_in_steps(metrics["arms"]),
        network="" if study is None else largest_network(study),
        study=[] if study is None else summarise_study(study),
        manifest=manifest,
        parameters=[
            (name, value, chosen.get(name) == value)
            for name, value in {**chosen, **dict(_flat(parameters))}.items()
        ],
        figures=encoded,
        model=[(name, _size(size)) for name, size in sizes.items() if name != "gallery.html"],
        gallery=_size(sizes["gallery.html"]) if "gallery.html" in sizes else "",
        origin=origin,
        backbone=parameters["training"]["network"] if frozen else "",
    )


def _towards_oracle(arms: Mapping[str, Row]) -> str:
    """How much of what foreign images cost learned weights win back; "" without the arms."""
    if LEARNED.name not in arms or arms.get(ORACLE.name, {}).get("accuracy") is None:
        return ""
    text = (
        f"With every foreign image removed, FixMatch reaches {arms[ORACLE.name]['accuracy']:.1f} %"
    )
    share = arms[LEARNED.name]["gap_closed"]
    if share is None:
        return f"{text}, no more than with them, so there is no gap to close."
    return f"{text}; learned weights close {in_digits(100 * share, 0)} % of the gap to it."


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
    learned = arms.get(LEARNED.name)
    plain = next((arms[arm.name] for arm in all_arms() if arm.rival and arm.name in arms), None)
    if learned is None or plain is None or learned["update_seconds"] is None:
        return None
    return float(learned["update_seconds"] * plain["steps"] / plain["seconds"])


def _format(value: Any, digits: int = 1, sign: bool = False) -> str:
    if _is_unknown(value):
        return "–"
    return in_digits(value, digits, sign)


def _size(count: int) -> str:
    """A number of bytes, such as "0.56 MB"."""
    return f"{count / 1e6:.2g} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def summarise_study(study: pd.DataFrame) -> list[Row]:
    """The main methods on the largest network: medians over seeds at the middle budget.

    Returns:
        Rows with `label`, `products`, `hypergradient_error` and `hypergradient_cosine`, the
        smallest error first.
    """
    rows = at_the_end(study)
    rows = rows[rows["network"] == largest_network(study)]
    main = {method.name for method in get_methods(rows["method"]) if method.is_main}
    rows = rows[rows["method"].isin(main)]
    budgets = sorted(rows["max_products"].unique())
    middle = budgets[len(budgets) // 2]
    single = rows.groupby("method")["max_products"].transform("nunique") == 1
    rows = rows[single | (rows["max_products"] == middle)]
    columns = ["products", "hypergradient_error", "hypergradient_cosine"]
    grouped = rows.groupby("method")[columns].median().sort_values("hypergradient_error")
    return [
        {"label": get_method(row["method"]).label, **{name: row[name] for name in columns}}
        for row in grouped.reset_index().to_dict("records")
    ]
