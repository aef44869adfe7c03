import numpy as np
import pytest

from weighmatch.evaluation.scores import (
    auroc,
    confidence_and_correct,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)


def test_negative_log_likelihood():
    probabilities = np.array([[0.5, 0.5], [0.9, 0.1]])
    expected = -(np.log(0.5) + np.log(0.1)) / 2
    assert negative_log_likelihood(probabilities, np.array([0, 1])) == pytest.approx(expected)
    certain = np.array([[1.0, 0.0]])
    assert np.isfinite(negative_log_likelihood(certain, np.array([1])))


def test_calibration_error_by_hand():
    # Two images at .95, one right: gap .45; one at .55, right: gap .45.
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.45, 0.55]])
    labels = np.array([0, 1, 1])
    bins = reliability(*confidence_and_correct(probabilities, labels))
    assert bins["count"].tolist() == [1, 2]
    assert bins["accuracy"].tolist() == [1, 0.5]
    assert bins["confidence"].tolist() == pytest.approx([0.55, 0.95])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.45)


def test_a_confidence_of_one_has_a_bin():
    assert reliability(np.array([1.0]), np.array([True]))["accuracy"].tolist() == [1.0]


def test_auroc_counts_ordered_pairs():
    scores = np.array([0.9, 0.2, 0.5, 0.1, 0.3])
    high, low = (
        np.array([True, True, False, False, False]),
        np.array([False, False, True, True, False]),
    )
    assert auroc(scores, high, low) == pytest.approx(0.75)
    assert auroc(np.ones(5), high, low) == 0.5
    assert np.isnan(auroc(scores, high, np.zeros(5, dtype=bool)))
