"""What runs cost, in operations of FixMatch's steps."""

from dataclasses import replace

import numpy as np
import pytest

from tests.semisup.training.test_processes import on_features
from weighmatch.arms import all_arms, get_arm
from weighmatch.semisup.training.compute import (
    Sizes,
    flops_per_step,
    matched_steps,
    relative_cost,
)

pytestmark = pytest.mark.integration

FIXMATCH, SUPERVISED, LEARNED = map(get_arm, ("fixmatch", "supervised", "learned"))


@pytest.fixture
def sizes(training_set, run_config):
    return Sizes.of(training_set, 3, run_config().training)


def test_matched_fixmatch_has_the_learned_arms_operations(sizes):
    training = sizes.training
    steps = matched_steps("online", 1, sizes)
    plain, learned = flops_per_step(FIXMATCH, sizes), flops_per_step(LEARNED, sizes)
    warm = training.weighting.warmup * training.steps
    total = warm * plain + (training.steps - warm) * learned
    assert steps > training.steps
    assert steps * plain == pytest.approx(total, rel=1 / training.steps)


def test_costs_are_those_of_whole_runs_beside_fixmatch(sizes):
    arms = ("fixmatch", "supervised", "learned", "oracle")
    plain, supervised, learned, oracle = (
        relative_cost(get_arm(arm), "online", 1, sizes) for arm in arms
    )
    assert plain == oracle == 1
    ratio = flops_per_step(SUPERVISED, sizes) / flops_per_step(FIXMATCH, sizes)
    assert supervised == pytest.approx(ratio)
    steps = matched_steps("online", 1, sizes)
    assert learned * sizes.training.steps == pytest.approx(steps, abs=1)


def test_rounds_cost_their_rankings(sizes):
    arms = ("fixmatch", "max_prob", "pu", "learned")
    costs = [relative_cost(get_arm(arm), "rounds", 3, sizes) for arm in arms]
    assert costs[0] == 1.0 < costs[1] < costs[2] < costs[3]
    more = relative_cost(LEARNED, "rounds", 6, sizes)
    assert more - 1 == pytest.approx(2 * (costs[3] - 1))


def test_a_pool_may_have_fewer_images_than_are_labelled(training_set, run_config):
    frozen = on_features(run_config)[0]
    for data, training in (
        (training_set, run_config().training),
        (frozen.data, frozen.config.training),
    ):
        few = Sizes.of(data.select(np.arange(data.pool_size) < 4), 3, training)
        many = Sizes.of(data, 3, training)
        costs = [relative_cost(LEARNED, "rounds", 2, sizes) for sizes in (few, many)]
        assert 1 < costs[0] < costs[1]


def test_the_test_of_a_clean_pool_is_counted(sizes):
    told, prior = (
        relative_cost(get_arm(arm), "rounds", 3, sizes) for arm in ("gate_told", "gate_prior")
    )
    assert told < prior


def test_two_stages_cost_more_and_fixmatch_is_matched_to_them(sizes):
    one = relative_cost(LEARNED, "online", 1, sizes)
    two = relative_cost(LEARNED, "two_stages", 1, sizes)
    training = sizes.training
    assert two > 1 + training.two_stages.first_share * one
    assert matched_steps("two_stages", 1, sizes) == int(np.ceil(training.steps * two))
    assert relative_cost(FIXMATCH, "two_stages", 1, sizes) == 1.0


def test_costs_depend_on_sizes_alone(sizes, training_set, run_config):
    darker = replace(training_set, unlabelled_images=training_set.unlabelled_images // 2)
    assert Sizes.of(darker, 3, run_config().training) == sizes
    blank = sizes.blank()
    assert Sizes.of(blank, 3, sizes.training) == sizes
    assert not blank.labelled_images.any()
    wider = replace(sizes, training=replace(sizes.training, width=16))
    assert flops_per_step(FIXMATCH, wider) > 2 * flops_per_step(FIXMATCH, sizes)


def test_arms_have_a_cost_in_each_of_their_schedules(sizes):
    # The dearest of the others have tests of their own.
    for arm in (arm for arm in all_arms() if arm.name not in ("learned", "ds3l")):
        for schedule in arm.schedules:
            cost = relative_cost(arm, schedule, 2, sizes)
            assert np.isfinite(cost)
            assert cost >= 1 or arm.pool == "none"
