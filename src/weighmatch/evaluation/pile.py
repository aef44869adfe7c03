"""What somebody with a pile of unlabelled images asks: did it help, what is in it, what next?

The first comparison is the declared one, `weighmatch.arms.POOL_HELPS`: the arm that ranks the pool
against the labelled images alone. The one against plain FixMatch is the second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from weighmatch.arms import FIXMATCH, POOL_HELPS, get_arm
from weighmatch.checks import counted
from weighmatch.evaluation.chosen import EVERYTHING, HeldOut
from weighmatch.evaluation.judging import CELL
from weighmatch.evaluation.ranking import copies_of
from weighmatch.evaluation.statistics import (
    LEVEL,
    PairedDifference,
    images_to_tell,
    paired_difference,
)
from weighmatch.evaluation.tables import accuracies, overlap_of
from weighmatch.evaluation.verdict import Verdict, judge, judge_nothing

Row = dict[str, object]

PRIMARY, SECONDARY = POOL_HELPS.against, FIXMATCH
# A test folder is to tell a difference to so many points at the best and at the worst.
FINEST, COARSEST = 1.0, 10.0
ADVICE = 3
# Evidence is strong where the chance of the opposite is below this.
STRONG = 0.1


@dataclass(frozen=True)
class Lists:
    """The tables about single files that advice is drawn from.

    Attributes:
        ranking: from `ranking_table`.
        to_check: from `labels_to_check`.
        to_label: from `label_next`.
        files: the rows of `image_files` of the ranked pool and its labelled images.
        rejected: the table `rejected_files`.
        class_names: the classes, in the order of their labels.
        held: what was held out.
        temperature: from `fit_temperature`.
    """

    ranking: pd.DataFrame
    to_check: pd.DataFrame
    to_label: pd.DataFrame
    files: pd.DataFrame
    rejected: pd.DataFrame
    class_names: Sequence[str]
    held: HeldOut | None
    temperature: float | None


# A test folder is advised of at most so many times the images that are labelled.
REACHABLE = 10
# What is advised where the pile did harm.
HARM = (
    "Use the labelled images alone: the model and the ranking of this job learned from the pile. "
    "Train with runs.arms=supervised and another data_folder."
)


def fold_overlap(manifest: Mapping[str, Any]) -> float:
    """Images tested on for each image trained on where seeds are folds of one set; else 0."""
    cells = [cell for cell in manifest["cells"] if cell["setting"] != EVERYTHING]
    if not cells or cells[0]["source"] != "folder" or not all(cell["test"] for cell in cells):
        return 0.0
    tests = {cell["fingerprints"].get("test_images") for cell in cells}
    if len(cells) > 1 and len(tests) == 1:
        return 0.0
    return float(np.mean([cell["test"] / cell["labelled"] for cell in cells]))


def judge_pile(
    run_scores: pd.DataFrame,
    run: Mapping[Any, Any],
    manifest: Mapping[str, Any],
    lists: Lists,
) -> Row:
    """What `summary.json` holds under `pile`.

    Args:
        run_scores: from `judge_runs`.
        run: the run whose ranking is handed out.
        manifest: `cells`, with the counts of each set of splits.
        lists: tables about single files.

    Returns:
        The fields of a `Verdict`; `primary` and `secondary`, the comparisons behind it, or None;
        `useful`, how much of the pile is kept, with a `sentence`; `test_images_needed`, how many
        would settle the first, or None; `temperature`; `files`, how many were `rejected` and are
        `copies`; and `advice`, the three things that would help most.
    """
    scores = run_scores.merge(run_scores[list(CELL)].head(1))
    mine = accuracies(scores).get((run["arm"], run["schedule"]))
    overlap = overlap_of(scores)
    found: dict[str, PairedDifference] = {}
    for other in (PRIMARY, SECONDARY):
        theirs = accuracies(scores).get((other.name, "online"))
        if mine is not None and theirs is not None and other.name != run["arm"]:
            both = pd.concat([mine, theirs], axis=1, join="inner").to_numpy()
            if len(both):
                found[other.name] = paired_difference(both[:, 0] - both[:, 1], overlap)
    means = {
        str(name): float(rows["accuracy"].mean()) / 100
        for name, rows in scores.groupby("arm")
        if rows["accuracy"].notna().any()
    }
    primary = found.get(PRIMARY.name)
    needed = None
    if (
        primary is not None
        and primary.p_value > LEVEL
        and manifest["cells"][0]["source"] == "folder"
    ):
        half = half_width(primary) / 100
        needed = images_to_tell(means[run["arm"]], means[PRIMARY.name], half)
    useful = _useful(scores, run, lists.ranking)
    harm = primary is not None and primary.p_value <= LEVEL and primary.mean < 0
    return {
        **asdict(_verdict(run, means, primary, manifest, overlap, needed)),
        "primary": _described(primary, PRIMARY.name, overlap),
        "secondary": _described(found.get(SECONDARY.name), SECONDARY.name, overlap),
        "useful": useful,
        "test_images_needed": needed,
        "temperature": lists.temperature,
        "files": {"rejected": len(lists.rejected), "copies": _copies(lists)},
        "advice": _advise(lists, needed, HARM if harm else ""),
    }


def half_width(difference: PairedDifference) -> float:
    """To how many points a difference must be known to be told from 0: to half of itself."""
    return min(max(abs(difference.mean) / 2, FINEST), COARSEST)


def _described(difference: PairedDifference | None, against: str, overlap: float) -> Row | None:
    if difference is None:
        return None
    numbers = {
        name: value if value is None or isinstance(value, int) else float(f"{value:.6g}")
        for name, value in asdict(difference).items()
    }
    test = "corrected resampled t test" if overlap else "t interval and sign-flip test"
    return {"against": against, **numbers, "told": difference.p_value <= LEVEL, "test": test}


def _verdict(
    run: Mapping[Any, Any],
    means: Mapping[str, float],
    primary: PairedDifference | None,
    manifest: Mapping[str, Any],
    overlap: float,
    needed: int | None,
) -> Verdict:
    comparison = POOL_HELPS
    if run["arm"] != PRIMARY.name:
        comparison = replace(POOL_HELPS, arm=get_arm(run["arm"]))
    percent = {name: 100 * mean for name, mean in means.items()}
    if primary is None:
        return judge_nothing(comparison, percent)
    cells = [cell for cell in manifest["cells"] if cell["setting"] != EVERYTHING]
    labels = cells[0]["labelled"] + cells[0]["test"] if overlap else None
    rounded = None if needed is None else _rounded(needed)
    return judge(comparison, (percent[run["arm"]], percent[PRIMARY.name]), primary, labels, rounded)


def _rounded(count: int) -> int:
    """Two digits are as many as an approximation deserves."""
    digits = max(len(str(count)) - 2, 0)
    return int(-(-count // 10**digits) * 10**digits)


def _useful(scores: pd.DataFrame, run: Mapping[Any, Any], ranking: pd.DataFrame) -> Row:
    """How much of the pile is kept by the chosen run, and by those of its arm on other splits."""
    alike_runs = scores[(scores["arm"] == run["arm"]) & (scores["schedule"] == run["schedule"])]
    shares = alike_runs["pool_kept"].dropna().to_numpy()
    images = int((ranking["near_duplicate_of"] == "").sum())
    kept = int(ranking["kept"].sum())
    share = kept / max(images, 1)
    low, high = (float(shares.min()), float(shares.max())) if len(shares) else (None, None)
    text = f"{100 * share:.0f} % of the pile looks useful ({kept:,} of {images:,} images)"
    if not get_arm(run["arm"]).weighs:
        text = f"No arm that ranks was trained, so that all {images:,} images of the pile are kept"
    elif kept == images:
        text = f"Nothing speaks against any part of the pile: all {images:,} images are kept"
    if low is not None and high is not None and len(shares) > 1:
        least, most = f"{100 * low:.0f} %", f"{100 * high:.0f} %"
        alike = f"{most} in each of" if least == most else f"{least} to {most} over"
        text += f"; the share is {alike} {len(shares)} runs"
    return {
        "sentence": text + "." + _believed(alike_runs, kept < images),
        "share": float(f"{share:.6g}"),
        "lowest": None if low is None else float(f"{low:.6g}"),
        "highest": None if high is None else float(f"{high:.6g}"),
        "runs": len(shares),
    }


def _believed(runs: pd.DataFrame, dropped: bool) -> str:
    """What the posterior of the first run says, if it has one: a sentence with a space before it.

    Args:
        runs: the runs of the chosen arm, that of the ranking first.
        dropped: whether part of the pile was left out.
    """
    if not len(runs) or not np.isfinite(runs["useful_low"].iloc[0]):
        return ""
    run = runs.iloc[0]
    doubt = run["clean_chance"] if dropped else 1 - run["clean_chance"]
    sure = "strong" if doubt < STRONG else "weak"
    if not dropped:
        return f" The evidence that all of it helps is {sure}."
    low, high = (f"{100 * run[name]:.0f}" for name in ("useful_low", "useful_high"))
    return f" Between {low} and {high} % are worth training on; the evidence is {sure}."


def _advise(lists: Lists, test_images: int | None, harm: str) -> list[str]:
    """The three things that would help most, the most helpful first."""
    found = [harm] if harm else []
    if len(lists.to_check):
        first = lists.to_check.iloc[0]
        found.append(
            f"Check {counted(len(lists.to_check), 'label')} (labels_to_check.csv): {first['path']} "
            f"is labelled {first['label']} and looks like {first['suggested']}."
        )
    weakest = _weakest(lists)
    if weakest:
        found.append(weakest)
    labelled = int((lists.files["split"] == "labelled").sum())
    if test_images is not None and test_images <= REACHABLE * labelled:
        found.append(f"Put about {_rounded(test_images):,} labelled images in a test folder.")
    if len(lists.rejected):
        found.append(
            f"Repair or remove {counted(len(lists.rejected), 'file')} that could not be used "
            "(rejected_files.csv)."
        )
    copies = _copies(lists)
    if copies:
        found.append(
            f"{counted(copies, 'file of those used is a copy', 'files of those used are copies')}"
            " of others, or nearly (near_duplicate_of in ranking.csv): they add nothing new."
        )
    if len(lists.to_label):
        found.append(
            f"Label {counted(len(lists.to_label), 'image')} of label_next.csv: they are useful, "
            "and the classifier is unsure of them."
        )
    ranking = lists.ranking
    left = int((~ranking["kept"] & (ranking["near_duplicate_of"] == "")).sum())
    if left:
        found.append(f"Look through {counted(left, 'image')} that were left out (gallery.html).")
    return found[:ADVICE]


def _copies(lists: Lists) -> int:
    return sum(path != "" for path in copies_of(lists.files))


def _weakest(lists: Lists) -> str:
    """The class that most needs labels: that recognised least, or with fewest labels."""
    labelled = lists.files[lists.files["split"] == "labelled"]
    counts = labelled["label"].value_counts()
    counts = counts[counts.index != ""]
    if lists.held is not None:
        held = lists.held
        right = held.probabilities.argmax(axis=1) == held.labels
        shares = {
            name: float(right[held.labels == k].mean())
            for k, name in enumerate(lists.class_names)
            if (held.labels == k).any()
        }
        name = min(shares, key=lambda known: shares[known])
        if shares[name] < 1:
            return (
                f"Label more images of class {name}: {100 * shares[name]:.0f} % of those held out "
                "are recognised, fewer than of any other class."
            )
    if len(counts) and counts.min() < counts.max():
        name = str(counts.index[-1])
        return f"Label more images of class {name}: it has {counts.min()}, the fewest."
    return ""
