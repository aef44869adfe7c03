"""The table of a GPU in docs/results/speed.md from a `gpu.json`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import markdown

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        what: is measured.
        goal: on one H100; empty: none.
        part: of the file.
        value: from the part's result; None where it has not got it.
    """

    what: str
    goal: str
    part: str
    value: Callable[[Any], str | None]


def _number(name: str, form: str = ",.0f", unit: str = "") -> Callable[[Any], str | None]:
    def value(result: Any) -> str | None:
        found = result[name]
        return None if found is None else f"{found:{form}}{unit}"

    return value


def _fastest(name: str, form: str) -> Callable[[Any], str | None]:
    """Of the way to run the network that takes most images a second."""

    def value(result: Any) -> str | None:
        ways = [way for way in result["variants"] if way["images_a_second"] is not None]
        best = max(ways, key=lambda way: way["images_a_second"], default=None)
        if best is None or best[name] is None:
            return None
        return f"{best[name]:{form}} ({best['name']})"

    return value


def _arms(result: Any) -> str | None:
    said = [
        f"{arm['arm']} {'equal' if arm['equal'] else 'NOT equal'} "
        f"(parameters {arm['parameters']:.1e}, losses {arm['loss']:.1e})"
        for arm in result["arms"]
    ]
    return "; ".join(said) or None


def _reference(curvature: str) -> Callable[[Any], str | None]:
    def value(result: Any) -> str | None:
        for found in result["references"]:
            if found["curvature"] == curvature:
                reached = "" if found["reached"] else ", above 1e-6: no errors below"
                return (
                    f"{found['products']} products, {found['seconds']:.1f} s, residual "
                    f"{found['residual']:.1e}{reached}"
                )
        return None

    return value


def _accuracy(arm: str) -> Callable[[Any], str | None]:
    def value(result: Any) -> str | None:
        for found in result["arms"]:
            if found["arm"].startswith(arm) and found["accuracy"] is not None:
                return (
                    f"{100 * found['accuracy']:.1f} % after {found['steps']:,} steps on "
                    f"{result['images']}"
                )
        return None

    return value


ENTRIES = (
    Entry("GPU tests", "pass", "agreement", lambda result: result["tests"]),
    Entry("a tiny training, CPU against GPU", "within 1e-3", "agreement", _arms),
    Entry("pairs of views a second", "≥ 1,000,000", "augmentation", _number("pairs_a_second")),
    Entry("pairs over the memory's limit", "", "augmentation", _number("share_of_limit", ".1%")),
    Entry("training, images a second", "≥ 60,000", "training", _fastest("images_a_second", ",.0f")),
    Entry("training, steps a second", "", "training", _fastest("steps_a_second", ",.1f")),
    Entry("bare loop / step", "≥ 95 %", "training", _fastest("share_of_bare", ".1%")),
    Entry("synchronisations in a step", "0", "training", _fastest("synchronisations", ".2f")),
    Entry("peak memory, MiB", "", "training", _fastest("peak_memory", ",.0f")),
    Entry(
        "bare loop as CUDA graphs, steps a second",
        "",
        "training",
        _number("graphed_bare_steps_a_second", ",.1f"),
    ),
    Entry("learned arm / FixMatch, one stage", "≤ 1.25", "learned", _number("overhead", ".2f")),
    Entry(
        "learned arm / FixMatch, rounds", "≤ 1.25", "learned", _number("overhead_in_rounds", ".2f")
    ),
    Entry("a ranking of the pool", "", "learned", _number("ranking", ".1f", " s")),
    Entry("reference, Gauss-Newton", "", "ihvps", _reference("Gauss-Newton")),
    Entry("reference, Hessian", "", "ihvps", _reference("Hessian")),
    Entry("FixMatch, six classes seen", "", "openset", _accuracy("fixmatch")),
    Entry("learned weights, six classes seen", "", "openset", _accuracy("learned")),
)


def lines(document: Any) -> list[str]:
    """The table, and of the IHVPs and the profile their own; {} or a whole `gpu.json`.

    Args:
        document: parsed.
    """
    parts = document.get("parts", {})
    rows = []
    for entry in ENTRIES:
        found = entry.value(parts[entry.part]["result"]) if entry.part in parts else None
        rows.append([entry.what, entry.goal, found or NOT_MEASURED])
    return [
        _conditions(document),
        "",
        *markdown(["what", "goal on one H100", "measured"], rows),
        *_part_lines(parts),
        *_profile(parts.get("training", {}).get("result")),
        *_solves(parts.get("ihvps", {}).get("result")),
    ]


def _conditions(document: Any) -> str:
    if not document:
        return f"Device, date, versions, commit: {NOT_MEASURED}."
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    rehearsal = " A rehearsal at tiny sizes: no figure means anything." * document["rehearsal"]
    return (
        f"{document['device']}, {document['date']}, {versions}, commit {document['commit']}; "
        f"{document['images']}.{rehearsal}"
    )


def _part_lines(parts: Any) -> list[str]:
    """What failed and what was cut."""
    said = [f"`{n}` failed: {part['error']}." for n, part in parts.items() if part["error"]]
    said += [
        f"`{name}` was cut by the time; not done: {'; '.join(part['not_done'])}."
        for name, part in parts.items()
        if part["cut"]
    ]
    return [line for text in said for line in ("", text)]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", f"### {title}", "", *markdown(header, rows)] if rows else []


def _profile(result: Any) -> list[str]:
    if result is None:
        return []
    rows = [[o["name"], f"{o['share']:.1%}", f"{o['calls']:.3g}"] for o in result["operations"]]
    waits = [[place["line"], f"{place['times']}"] for place in result["places"]]
    steps = result["counted_steps"]
    return [
        *_table("Where a step goes", ["operation", "share of the time", "calls a step"], rows),
        *_table("Where the host waits", ["line", f"times in {steps} steps"], waits),
    ]


def _solves(result: Any) -> list[str]:
    if result is None:
        return []
    rows = []
    for solve in result["solves"]:
        own, error = solve["own_memory"], solve["error"]
        rows.append(
            [
                solve["curvature"],
                solve["precision"],
                f"{solve['method']}{', ' if solve['note'] else ''}{solve['note']}",
                f"{solve['budget'] or ''}",
                f"{solve['products']}",
                f"{solve['seconds']:.3g}",
                "" if own is None else f"{own:,.0f}",
                f"{solve['residual']:.1e}",
                "no reference" if error is None else f"{error:.1e}",
                solve["status"],
            ]
        )
    header = ["curvature", "passes", "method", "budget", "products", "seconds", "MiB of its own"]
    header += ["residual", "error", "status"]
    title = f"IHVPs of {result['parameters'] or 0:,} parameters on {result['images']} images"
    return _table(title, header, rows)
