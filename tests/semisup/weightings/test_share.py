"""The posterior of the useful share, on measurements whose answer is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from weighmatch.semisup.weightings.share import Share, Slope, odds_of_test


def measured(root, shares, steepness=0.3, noise=0.0, seed=0):
    """Measurements c = k log(q / q*) at some shares."""
    rng = np.random.default_rng(seed)
    return [
        Slope(q, steepness * math.log(q / root) + noise * rng.standard_normal(), 0.02)
        for q in shares
    ]


def test_nothing_measured_leaves_the_prior():
    share = Share([], 0.3)
    assert share.chance_clean() == pytest.approx(0.5, abs=0.01)
    assert share.quantile(0.5) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("root", [0.1, 0.2, 0.3])
def test_measurements_at_different_shares_meet_at_the_root(root):
    share = Share(measured(root, [1.0, 0.4, 0.2, 0.3, 0.5, 0.25]), 0.25)
    assert share.chance_clean() < 0.05
    assert share.quantile(0.5) == pytest.approx(root, rel=0.2)
    low, high = share.quantile(0.025), share.quantile(0.975)
    assert low < root < high


def test_a_pool_whose_lower_half_helps_is_clean():
    assert Share(measured(1.6, [1.0, 1.0, 1.0]), 0.4).chance_clean() > 0.8


def test_a_decision_is_taken_back_when_later_measurements_speak_against_it():
    early = measured(0.5, [1.0])
    doubtful = Share(early, 0.4).chance_clean()
    later = Share([*early, *measured(2.0, [0.5, 0.5, 0.5])], 0.4)
    assert later.chance_clean() > doubtful


def test_clean_pools_are_rarely_called_contaminated():
    """With the spread that classifiers of one training have."""
    found = [
        Share(measured(1.3, [1.0, 1.0, 1.0], noise=0.1, seed=s), 0.4).chance_clean()
        for s in range(200)
    ]
    assert np.mean(np.array(found) < 0.2) < 0.05
    missed = [
        Share(measured(0.3, [1.0, 1.0, 1.0], noise=0.1, seed=s), 0.4).chance_clean()
        for s in range(200)
    ]
    assert np.mean(np.array(missed) < 0.2) > 0.95


def test_a_measurement_is_the_mean_influence_of_the_lower_half_with_the_sign_turned():
    ranks = torch.tensor([[0.1, 0.4, 0.6, 0.9]] * 3)
    influences = torch.tensor(
        [[-1.0, -3.0, 9.0, 9.0], [-2.0, -2.0, 0.0, 1.0], [-1.0, -1.0, 5.0, 5.0]]
    )
    found = Slope.of(0.7, ranks, influences)
    assert (found.share, found.value) == (0.7, pytest.approx(5 / 3))
    assert found.error == pytest.approx(np.std([2, 2, 1], ddof=1) / math.sqrt(3))


def test_a_small_p_raises_the_odds_of_a_contaminated_pool():
    odds = [odds_of_test(p) for p in (0.9, 0.5, 0.2, 0.05, 1e-3, 1e-12)]
    assert all(a < b for a, b in pairwise(odds))
    assert odds[1] < 1 < odds[2]
    assert odds_of_test(None) == 1
    assert Share([], 0.3, 0.01).chance_clean() < 0.1 < 0.5 < Share([], 0.3, 0.8).chance_clean()
