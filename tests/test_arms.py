"""The rows of arms: what they refer to exists, and they can be told apart."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from weighmatch import arms
from weighmatch.arms import Arm, all_arms, arm_names, get_arm, in_order, require_arms
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.training.judges import JUDGES
from weighmatch.semisup.weightings import Weighting


@pytest.mark.parametrize("arm", all_arms(), ids=arm_names())
def test_what_a_row_refers_to_exists(arm):
    kind = Weighting.registry[arm.weighting]
    assert kind.name == arm.weighting
    assert arm.schedules
    assert set(arm.schedules) <= set(arms.SCHEDULES)
    assert set(arm.reads) <= {"weighting", "influence", "ranking"}
    assert all(hasattr(TrainingConfig(), group) for group in arm.reads)
    assert re.fullmatch("#[0-9A-F]{6}", arm.colour)
    assert re.fullmatch("[a-z0-9_]+", arm.name)  # it is part of the names of runs
    # What weighs by measured influences reads how they are measured, and nothing else does.
    assert ("influence" in arm.reads) == kind.lowers_outer_loss
    assert (arm.judge == "hypergradient") <= kind.lowers_outer_loss
    assert ("ranking" in arm.reads) == (arm.judge != "otsu")
    assert arm.judge == "otsu" or arm.judge in JUDGES
    # What is told of the truth is trained apart from the others.
    assert arm.knows_truth == (arm.pool == "clean" or arm.judge == "truth")
    assert arm.inductive != kind.transductive


def test_every_weighting_has_an_arm():
    assert {arm.weighting for arm in all_arms()} == set(Weighting.registry)


@pytest.mark.parametrize("attribute", ["name", "label", "colour"])
def test_arms_are_told_apart(attribute):
    values = [getattr(arm, attribute) for arm in all_arms()]
    assert len(set(values)) == len(values) == 17


def test_controls_have_words_of_their_own():
    controls = [arm.control for arm in all_arms() if arm.control]
    assert len(set(controls)) == len(controls) > 0


def test_an_arm_is_trained_in_the_wanted_schedules_or_else_online():
    learned, free = get_arm("learned"), get_arm("free")
    assert learned.schedules_among(("rounds", "online")) == ("rounds", "online")
    assert learned.schedules_among(("two_stages",)) == ("two_stages",)
    assert free.schedules_among(("rounds",)) == ("online",)
    assert free.schedules_among(("rounds", "two_stages")) == ("two_stages",)
    assert get_arm("fixmatch").schedules_among(("rounds", "two_stages")) == ("online",)
    assert get_arm("fixmatch_rounds").schedules_among(("online", "rounds")) == ("rounds",)
    assert get_arm("fixmatch_rounds").schedules_among(("online", "two_stages")) == ()


def test_arms_keep_the_order_of_their_rows():
    assert [arm.name for arm in in_order(["oracle", "pu", "supervised"])] == [
        "supervised",
        "pu",
        "oracle",
    ]
    assert in_order([]) == []


def test_names_of_arms_are_a_list_or_joined():
    assert require_arms("runs.arms", "pu+learned") == ("pu", "learned")
    assert require_arms("runs.arms", ["pu", "learned"]) == ("pu", "learned")
    assert require_arms("runs.arms", ("pu",)) == ("pu",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("pu+lerned", "runs.arms 'lerned' is unknown; choose from supervised, fixmatch"),
        ("", "runs.arms '' is unknown"),
        (
            ["pu", "pu"],
            "runs.arms must be a list of different names from supervised, .* got \\['pu'",
        ),
        ([], "runs.arms must be a list of different names"),
        ([3], "runs.arms must be a list of different names"),
        ({"pu": 1}, "runs.arms must be a list of different names"),
        (None, "runs.arms must be a list of different names"),
    ],
)
def test_what_names_no_arms_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        require_arms("runs.arms", given)


def test_an_arm_that_a_test_registers_can_be_taken_out_again():
    before = all_arms()
    mine = Arm("mine", "my own", "#123456", weighting="energy")
    try:
        assert arms.register(mine) is mine
        assert all_arms() == (*before, mine)
        assert get_arm("mine") is mine
        assert require_arms("runs.arms", "mine+pu") == ("mine", "pu")
        arms.register(mine)  # the very same row again, as when a module is run twice
        with pytest.raises(ValueError, match="there is an arm 'mine' already; choose another name"):
            arms.register(replace(mine, label="another"))
        assert get_arm("mine") is mine
    finally:
        arms.unregister("mine")
    assert all_arms() == before
    with pytest.raises(ValueError, match="arm 'mine' is unknown; choose from supervised"):
        get_arm("mine")
    arms.unregister("mine")


def test_what_an_arm_weighs():
    weighs = {arm.name for arm in all_arms() if arm.weighs}
    fitted = {"pu", "gate_prior", "gate_told", "inlier", "ds3l", "free", "learned"}
    assert weighs == {"max_prob", "softmatch", "energy"} | fitted
    others = [arm.name for arm in all_arms() if arm.pool != "whole"]
    assert others == ["supervised", "gate_told", "oracle"]


def test_importing_the_arms_and_parameters_imports_no_torch():
    code = (
        "import sys, weighmatch.arms, weighmatch.semisup.config; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
