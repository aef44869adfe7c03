"""Parameters of training and of runs: what is refused, in a sentence with the cure."""

import pytest

from weighmatch.arms import arm_names
from weighmatch.semisup.config import RunsConfig, TrainingConfig, require_effect


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"training\.distribution_alignment"):
        TrainingConfig(distribution_alignment="yes")
    with pytest.raises(ValueError, match="softmatch, energy"):
        RunsConfig(arms=("openmatch",))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedule": "rouns"}, "runs.schedule 'rouns' is unknown; choose from online, two_stages"),
        ({"schedule": "online+online"}, "runs.schedule must be a list of different values"),
        ({"schedule": []}, "runs.schedule must be a list of different values"),
        ({"rounds": 0}, "runs.rounds must be an integer of at least 1, got 0"),
        ({"rounds": 101}, "runs.rounds must be at most 100, got 101"),
        ({"workers": 0}, r"runs.workers \(or auto\) must be an integer of at least 1"),
        ({"arms": "pu+pu"}, "runs.arms must be a list of different names from supervised, fixmat"),
    ],
)
def test_runs_that_there_are_none_of_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RunsConfig(**given)


def test_schedules_and_arms_are_lists_or_joined_names():
    joined = RunsConfig(arms="pu+learned", schedule="online+rounds")
    assert joined == RunsConfig(arms=["pu", "learned"], schedule=["online", "rounds"])
    assert joined.schedule == ("online", "rounds")
    assert RunsConfig().arms == arm_names()


@pytest.mark.parametrize(
    ("group", "parameter", "arms", "schedule"),
    [
        # No arm weighs anything.
        ("weighting", "interval", ["supervised", "fixmatch", "oracle"], "online"),
        ("influence", "damping", ["fixmatch", "fixmatch_rounds"], "rounds"),
        ("ranking", "steps", ["fixmatch", "fixmatch_rounds"], "rounds"),
        # Rounds learn no weights while they train.
        ("weighting", "interval", ["learned", "pu"], "rounds"),
        # These arms measure nothing.
        ("influence", "damping", ["pu", "max_prob", "energy"], "online+two_stages"),
        ("influence", "damping", ["pu", "max_prob"], "rounds"),
        # Nothing is ranked, or by no head.
        ("ranking", "steps", ["learned", "pu"], "online"),
        ("ranking", "steps", ["max_prob", "ds3l", "free"], "two_stages"),
        ("ranking", "steps", ["max_prob"], "rounds"),
        # There is one stage.
        ("two_stages", "first_share", ["learned", "pu"], "online+rounds"),
        ("two_stages", "first_share", ["fixmatch"], "two_stages"),
    ],
)
def test_a_parameter_that_no_run_reads_is_refused(group, parameter, arms, schedule):
    runs = RunsConfig(arms=arms, schedule=schedule)
    with pytest.raises(ValueError, match=rf"training\.{group}\.{parameter} has no effect") as error:
        require_effect({group: {parameter: 1}}, arms, runs)
    # It says what is set, and which schedules would read it.
    assert "+".join(runs.schedule) in str(error.value)
    assert "+".join(arms) in str(error.value)
    assert "is read by the schedules" in str(error.value)


@pytest.mark.parametrize(
    ("groups", "arms", "schedule"),
    [
        ({"weighting"}, ["max_prob"], "online"),
        ({"weighting", "influence"}, ["fixmatch", "ds3l"], "online"),
        ({"weighting", "influence", "ranking", "two_stages"}, ["learned"], "two_stages"),
        ({"weighting", "two_stages"}, ["energy"], "two_stages"),
        ({"influence", "ranking"}, ["learned"], "rounds"),
        ({"ranking"}, ["pu"], "rounds"),
        # An arm that cannot be trained in rounds is trained online beside them.
        ({"weighting", "influence"}, ["free"], "rounds"),
        ({"weighting", "ranking"}, ["pu"], "online+rounds"),
    ],
)
def test_parameters_that_a_run_reads_are_taken(groups, arms, schedule):
    given = {group: {"a": 1} for group in groups}
    runs = RunsConfig(arms=arms, schedule=schedule)
    assert require_effect(given, arms, runs) is None
    # Every run reads these; an empty group sets nothing.
    require_effect({**given, "steps": 3, "augmentation": {"shift": 0.1}}, arms, runs)
    nothing = {group: {} for group in ("weighting", "influence", "ranking", "two_stages")}
    require_effect(nothing, arms, runs)


def test_without_arms_no_group_has_an_effect():
    for group in ("weighting", "influence", "ranking", "two_stages"):
        with pytest.raises(ValueError, match=rf"training\.{group}\.a has no effect"):
            require_effect({group: {"a": 1}}, [], RunsConfig())
