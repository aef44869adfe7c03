import numpy as np
import pytest

from weighmatch.evaluation.scores import (
    auroc,
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
    assert reliability(probabilities, labels)["count"].tolist() == [1, 2]
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.45)


def test_a_confidence_of_one_has_a_bin():
    assert reliability(np.array([[1.0, 0.0]]), np.array([0]))["accuracy"].tolist() == [1.0]


def test_auroc_counts_ordered_pairs():
    scores, is_id = np.array([0.9, 0.2, 0.5, 0.1]), np.array([True, True, False, False])
    assert auroc(scores, is_id) == pytest.approx(0.75)
    assert auroc(np.ones(4), is_id) == 0.5
    assert auroc(scores, np.ones(4, dtype=bool)) is None
