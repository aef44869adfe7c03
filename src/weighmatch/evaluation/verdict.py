"""The verdict on the declared comparison: one sentence, and in plain words how sure it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from weighmatch.arms import Comparison, get_arm
from weighmatch.evaluation.statistics import LEVEL, PairedDifference, seeds_to_show

Light = Literal["green", "amber", "red", "none"]
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Odds beyond this are not told apart.
LONGEST_ODDS = 1000


@dataclass(frozen=True)
class Verdict:
    """What a comparison came to.

    Attributes:
        verdict: a sentence with at most three numbers.
        light: "green": the arm is better; "red": it is worse, or not better, though that could have
            been shown; "amber": so few seeds or labels cannot show it; "none": there is no
            comparison.
        sure: the same in plain words.
    """

    verdict: str
    light: Light
    sure: str


def judge(
    comparison: Comparison,
    accuracies: tuple[float, float],
    difference: PairedDifference,
    labels: int | None = None,
    test_images: int | None = None,
) -> Verdict:
    """The verdict on a comparison that was made.

    Args:
        comparison: the arms, and the words for the outcome.
        accuracies: those of the arm and of its rival (%).
        difference: of the arm's accuracy to its rival's (points).
        labels: how many labels there are where seeds are folds of them; None: seeds are not folds.
        test_images: how many test images would show the difference, if they are too few.
    """
    light, sure = _how_sure(difference, labels, test_images)
    lead = comparison.unknown
    if difference.p_value <= LEVEL:
        lead = comparison.better if difference.mean > 0 else comparison.worse
    mine, theirs = accuracies
    text = (
        f"{lead}: {comparison.arm.label} classify {mine:.1f} % of the test images right and "
        f"{comparison.rival} {theirs:.1f} %, a difference of "
        f"{in_digits(difference.mean, sign=True)} percentage points."
    )
    return Verdict(text, light, sure)


def judge_nothing(comparison: Comparison, accuracies: Mapping[str, float]) -> Verdict:
    """The verdict without a comparison.

    Args:
        comparison: the one that was to be made.
        accuracies: the mean accuracy (%) of each arm that has one, by name.
    """
    if not accuracies:
        return Verdict(
            "There is no verdict, and no accuracy is known, as there are no labelled test images.",
            "none",
            "That cannot be told without labelled images to test on.",
        )
    best = max(accuracies, key=lambda arm: accuracies[arm])
    needed = f"{comparison.arm.name} and {comparison.against.name}"
    return Verdict(
        f"There is no verdict, as the arms {needed} were not both run; the highest mean accuracy "
        f"is {accuracies[best]:.1f} % ({get_arm(best).label}).",
        "none",
        f"That cannot be told without the arms {needed}: add them to runs.arms.",
    )


def _how_sure(
    difference: PairedDifference, labels: int | None, test_images: int | None
) -> tuple[Light, str]:
    odds = (
        "If both were equally good, a difference as large would turn up in "
        f"{_one_of(difference.p_value)} such experiments."
    )
    if difference.p_value <= LEVEL:
        return "green" if difference.mean > 0 else "red", f"Yes. {odds}"
    folder = f"a test folder of about {test_images:,} images" if test_images is not None else ""
    if labels is not None:
        return "amber", f"Not yet. {labels} labels cannot show it{folder and f'; {folder} can'}."
    enough = seeds_to_show()
    if difference.seeds < enough:
        seeds = "seed" if difference.seeds == 1 else "seeds"
        few = f"{in_words(difference.seeds)} {seeds} cannot show it; {in_words(enough)} can."
        return "amber", f"Not yet. {few.capitalize()}"
    return "red", f"No. {odds}" + (f" {folder.capitalize()} would tell." if folder else "")


def _one_of(p_value: float) -> str:
    """A p-value as odds, such as "about one of 32"."""
    if p_value * LONGEST_ODDS < 1:
        return f"fewer than one of {LONGEST_ODDS:,}"
    return "most" if p_value > 0.5 else f"about one of {in_words(round(1 / p_value))}"


def in_digits(value: float, digits: int = 1, sign: bool = False) -> str:
    """A number with so many decimals: a minus sign and no hyphen before it, nothing before 0.0."""
    return format(value, f"{'+' if sign else ''}z.{digits}f").replace("-", "−")


def in_words(number: int) -> str:
    """A number as a word, up to ten."""
    return WORDS[number] if number < len(WORDS) else f"{number:,}"
