"""Checks of parameters that more than one group uses."""

import pytest

from weighmatch.checks import counted, find_nearest, lacks, with_changes
from weighmatch.semisup.config import TrainingConfig


def test_changes_reach_into_groups_and_leave_the_rest():
    before = TrainingConfig(width=8)
    changed = with_changes("a", before, {"steps": 7, "influence": {"damping": 0.5}})
    assert (changed.steps, changed.width, changed.influence.damping) == (7, 8, 0.5)
    assert changed.influence.memory == before.influence.memory
    assert before.influence.damping == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (3, "a must be a group of parameters, got 3"),
        ({"influence": 3}, "a.influence must be a group of parameters, got 3"),
        ({"influence": {"dampng": 1}}, "a.influence has no parameter dampng; did you mean damping"),
        ({"moon": 1}, "a has no parameter moon; it has augmentation, batch_size"),
        ({"steps": 0}, "training.steps must be an integer of at least 1, got 0"),
    ],
)
def test_changes_that_fit_nowhere_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        with_changes("a", TrainingConfig(), changes)


def test_the_nearest_name_may_be_the_last_part_of_one():
    known = ["torchvision/resnet18", "evaluation.judge_runs"]
    assert find_nearest("resnet18", known) == "torchvision/resnet18"
    assert find_nearest("judge_run", known) == "evaluation.judge_runs"
    assert find_nearest("moon", known) is None


def test_each_unknown_parameter_is_told_with_what_was_meant():
    known = {"source", "root", "size"}
    assert lacks("data", ["rot", "sorce"], known).endswith(
        "did you mean root for rot, source for sorce?"
    )
    assert lacks("data", ["moon"], known).endswith("moon; it has root, size, source")


def test_counts_are_told_in_the_singular_and_the_plural():
    assert [counted(n, "file") for n in (0, 1, 2_000)] == ["0 files", "1 file", "2,000 files"]
    assert counted(2, "file is", "files are") == "2 files are"
