"""Steps that fit into the time somebody has."""

from dataclasses import asdict

import pytest

from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.semisup.training import time_limit
from weighmatch.semisup.training.time_limit import fit_steps

SETTINGS = {"width": 8, "batch_size": 6, "unlabelled_ratio": 2, "device": "cpu"}


@pytest.fixture
def sets(training_set):
    names = ("labelled_images", "labels", "unlabelled_images")
    return {f"folder-seed_{k}": {n: getattr(training_set, n) for n in names} for k in range(3)}


@pytest.fixture
def ticks(monkeypatch):
    """A step takes as long as this says, in seconds."""
    monkeypatch.setattr(time_limit, "_seconds_of_a_step", lambda arrays, training: 0.1)


def test_without_a_limit_nothing_changes(sets, tmp_path):
    training = TrainingConfig(steps=700)
    assert fit_steps(sets, training, RunsConfig(), tmp_path) is training
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ticks")
def test_steps_fit_the_limit_and_are_kept(sets, tmp_path, monkeypatch):
    training = TrainingConfig(steps=10_000, **SETTINGS)
    runs = RunsConfig(arms=["fixmatch"], workers=1, time_limit="10m")
    # Three runs of FixMatch at .1 s a step in .8 of 600 s.
    found = fit_steps(sets, training, runs, tmp_path)
    assert found.steps == pytest.approx(1600, abs=2)
    monkeypatch.setattr(time_limit, "_seconds_of_a_step", lambda *_: 9.0)
    assert fit_steps(sets, training, runs, tmp_path) == found
    other = RunsConfig(arms=["fixmatch"], workers=1, time_limit="20m")
    assert fit_steps(sets, training, other, tmp_path).steps < 100 + 1


@pytest.mark.usefixtures("ticks")
def test_no_more_steps_than_asked_for_and_no_fewer_than_make_sense(sets, tmp_path, caplog):
    training = TrainingConfig(steps=500, **SETTINGS)
    long = RunsConfig(arms=["fixmatch", "supervised"], workers=1, time_limit="9h")
    assert fit_steps(sets, training, long, tmp_path).steps == 500
    assert "too short" not in caplog.text
    short = RunsConfig(arms=["fixmatch", "supervised"], workers=1, time_limit="2s")
    assert fit_steps(sets, training, short, tmp_path).steps == 100
    assert "runs.time_limit 2s is too short for 2 arms on 3 sets" in caplog.text


def test_a_step_is_timed(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(time_limit, "TIMED", 0.1)
    training = TrainingConfig(steps=300, **SETTINGS)
    seconds = time_limit._seconds_of_a_step(sets["folder-seed_0"], training)
    assert 1e-4 < seconds < 5


@pytest.mark.parametrize("given", ["15", "fast", "", "-3m", "0m", 15])
def test_a_limit_that_is_none_is_told(given):
    with pytest.raises(ValueError, match=r"runs\.time_limit must be a number with s, m or h"):
        RunsConfig(time_limit=given)
    assert asdict(RunsConfig(time_limit="1.5h"))["time_limit"] == "1.5h"
    assert RunsConfig(time_limit="1.5h").seconds() == 5400
