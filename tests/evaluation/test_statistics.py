import numpy as np
import pytest
from scipy import stats

from weighmatch.evaluation.statistics import (
    gap_closed,
    holm,
    mean_interval,
    paired_difference,
    sign_flip_test,
)


def test_interval_is_students():
    values = np.array([1.0, 2.0, 4.0, 4.5])
    expected = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected)
    assert mean_interval(np.array([1.0])) == (None, None)


def test_sign_flips_are_exact_for_few_seeds():
    assert sign_flip_test(np.array([1.0, 1.0, 1.0])) == 2 / 8
    assert sign_flip_test(np.array([1.0, -1.0])) == 1.0
    assert sign_flip_test(np.zeros(4)) == 1.0
    assert sign_flip_test(np.arange(1.0, 11.0)) == 2 / 1024


def test_sign_flips_of_many_seeds_are_sampled_and_repeat():
    differences = np.random.default_rng(0).normal(1.0, 1.0, 25)
    p = sign_flip_test(differences)
    assert 0 < p < 0.01
    assert p == sign_flip_test(differences)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_paired_difference_of_one_seed_has_no_interval():
    result = paired_difference(np.array([2.0]))
    assert (result.mean, result.low, result.high, result.p_value) == (2.0, None, None, 1.0)
    with pytest.raises(ValueError, match="at least one seed"):
        paired_difference(np.array([]))


def test_gap_closed():
    baseline, oracle = np.array([80.0, 82.0, 84.0]), np.array([90.0, 92.0, 94.0])
    closed = gap_closed(baseline + 5, baseline, oracle)
    assert closed.share == pytest.approx(0.5)
    assert (closed.low, closed.high) == pytest.approx((0.5, 0.5))
    assert gap_closed(baseline, oracle, baseline).share is None
    assert gap_closed(baseline[:1] + 5, baseline[:1], oracle[:1]).low is None


def test_a_gap_of_no_image_is_none_whatever_rounding_leaves_of_it():
    def of(*right):
        return 100 * np.array(right) / 270

    none = gap_closed(of(255, 255), of(251, 253), of(250, 254))
    assert (none.share, none.low, none.high) == (None, None, None)
    # Of seeds with a gap of no image on some resamples.
    some = gap_closed(of(254, 255, 252), of(252, 253, 251), of(251, 255, 251))
    assert some.share == pytest.approx(5)
    assert 0 < some.low < some.high < 10
