"""Steps and seeds that fit into the time somebody has, and what happens when it is up."""

import json
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from tests.semisup.helpers import arrays_of
from weighmatch.pipelines.training import nodes
from weighmatch.semisup.config import RunsConfig, TrainingConfig
from weighmatch.semisup.training import batches, deadline, time_limit
from weighmatch.semisup.training.jobs import finish_jobs, plan_jobs
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.training.time_limit import choose_runs, make_deadline

SETTINGS = {"width": 8, "batch_size": 6, "unlabelled_ratio": 2, "device": "cpu"}
KEYS = ["folder-all-seed_0004", *(f"folder-seed_000{k}" for k in range(4, 10))]


@pytest.fixture
def sets(training_set):
    """Six folds, and the set of all labelled images, which has the seed of the first."""
    arrays = arrays_of(training_set)
    del arrays["rows"]
    arrays["class_names"] = np.array(["a", "b", "c"])
    return dict.fromkeys(KEYS, arrays)


class Hand:
    """A clock that is set by hand."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def hand(monkeypatch):
    """A clock that stands still, of a command that just began; a step takes .1 s by it."""
    hand = Hand()
    clock = deadline.Clock(hand)
    clock.start()
    for module in ("deadline.CLOCK", "time_limit.CLOCK", "jobs.CLOCK"):
        monkeypatch.setattr(f"weighmatch.semisup.training.{module}", clock)
    monkeypatch.setattr(time_limit, "_seconds_of_a_step", lambda arrays, training: 0.1)
    return hand


@pytest.fixture
def ticking(hand, monkeypatch):
    """The clock goes on as steps are taken; it can be made to go slower or faster."""
    train, hand.speed = Run.train_steps, 0.1
    monkeypatch.setattr(batches, "CHUNK", 5)

    def step(run, limit=None):
        done = train(run, limit)
        hand.time += done * hand.speed
        return done

    monkeypatch.setattr(Run, "train_steps", step)
    return hand


def choose(sets, folder, limit, steps=1000, arms=("fixmatch",), **runs):
    training = TrainingConfig(steps=steps, **SETTINGS)
    return choose_runs(
        sets, training, RunsConfig(arms=arms, workers=1, time_limit=limit, **runs), folder
    )


# --- what is chosen --------------------------------------------------------------------------


def test_without_a_limit_nothing_is_chosen(sets, tmp_path):
    assert choose(sets, tmp_path, None) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("hand")
@pytest.mark.parametrize(
    ("limit", "steps", "seeds"),
    [
        # Seven runs of 1,000 steps at .1 s take 700 s, which are .7 of 1,000 s.
        ("1001s", 1000, 6),
        ("9h", 1000, 6),
        # Fewer steps first, down to half.
        ("800s", 800, 6),
        ("501s", 501, 6),
        # Then fewer seeds; six runs have time for 583 steps each.
        ("500s", 500, 6),
        ("499s", 582, 5),
        ("400s", 560, 4),
        ("290s", 507, 3),
        # Then fewer steps again.
        ("200s", 350, 3),
        ("60s", 105, 3),
    ],
)
def test_steps_go_to_half_then_seeds_to_three_then_steps(sets, tmp_path, limit, steps, seeds):
    found = choose(sets, tmp_path, limit)
    assert found.steps == pytest.approx(steps, abs=1)
    assert found.seeds == tuple(range(4, 4 + seeds))


@pytest.mark.usefixtures("hand")
def test_a_choice_is_kept_for_the_same_settings(sets, tmp_path, monkeypatch):
    found = choose(sets, tmp_path, "400s")
    monkeypatch.setattr(time_limit, "_seconds_of_a_step", lambda *_: 9.0)
    assert choose(sets, tmp_path, "400s") == found
    assert choose(sets, tmp_path, "401s").steps == 100
    (path,) = (p for p in tmp_path.iterdir() if json.loads(p.read_text())["steps"] != 100)
    path.write_text('{"steps": 3')
    assert choose(sets, tmp_path, "400s").steps == 100


def test_time_that_has_passed_is_not_there_for_training(sets, tmp_path, hand):
    hand.time += 300
    assert choose(sets, tmp_path, "1000s").steps == pytest.approx(571, abs=1)


@pytest.mark.usefixtures("hand")
def test_a_limit_that_is_too_short_is_told(sets, tmp_path, caplog):
    choose(sets, tmp_path, "9h", arms=["fixmatch", "supervised"])
    assert "for training, and even" not in caplog.text
    found = choose(sets, tmp_path, "2s", arms=["fixmatch", "supervised"])
    assert (found.steps, len(found.seeds)) == (100, 3)
    assert "runs.time_limit 2s leaves 1 s for training, and even 100 steps of 2 arms" in caplog.text


def test_a_step_is_timed(sets, monkeypatch):
    monkeypatch.setattr(time_limit, "TIMED", 0.1)
    training = TrainingConfig(steps=300, **SETTINGS)
    seconds = time_limit._seconds_of_a_step(sets[KEYS[0]], training)
    assert 1e-4 < seconds < 5


@pytest.mark.parametrize("given", ["15", "fast", "", "-3m", "0m", 15])
def test_a_limit_that_is_none_is_told(given):
    with pytest.raises(ValueError, match=r"runs\.time_limit must be a number with s, m or h"):
        RunsConfig(time_limit=given)
    assert asdict(RunsConfig(time_limit="1.5h"))["time_limit"] == "1.5h"
    assert RunsConfig(time_limit="1.5h").seconds() == 5400


# --- how it is kept --------------------------------------------------------------------------

ARMS = ("supervised", "fixmatch")


@pytest.fixture
def train(sets, tmp_path, run_config):
    """Trains the arms on all sets by the node; returns the seeds of the rows, and the keys."""

    def call(limit, steps=20):
        training = replace(run_config(steps=steps).training, steps=steps)
        runs = RunsConfig(arms=ARMS, workers=1, time_limit=limit)
        finished, rows = nodes.train_arms(
            sets, tmp_path / "features", training, runs, str(tmp_path / "runs")
        )
        assert list(finished) == list(rows["run"])
        return rows

    return call


@pytest.fixture
def chosen(monkeypatch):
    """The choice is all seeds and 20 steps, however little time there is."""
    choice = time_limit.Choice(20, tuple(range(4, 10)), 0.1)
    monkeypatch.setattr(nodes, "choose_runs", lambda *_: choice)


def seeds_of(rows):
    """The seeds of the runs, each with all of its runs."""
    counts = rows["seed"].value_counts().to_dict()
    assert all(count == len(ARMS) * (2 if seed == 4 else 1) for seed, count in counts.items())
    return sorted(counts)


@pytest.mark.usefixtures("chosen")
def test_whole_seeds_are_left_out_when_the_time_is_nearly_up(train, ticking, caplog):
    # Twelve of 28 s have time: four runs of the first seed take 8 s, two of another one 4 s.
    assert seeds_of(train(f"{12.5 / time_limit.STOPPED}s")) == [4, 5]
    assert "is up: the seeds 6, 7, 8, 9 are left out" in caplog.text
    assert ticking.time == pytest.approx(1012, abs=0.5)


@pytest.mark.usefixtures("chosen")
def test_a_run_that_takes_longer_than_expected_is_stopped(train, ticking, caplog):
    ticking.speed = 0.2
    # The second seed was to end after 20 s by what a step was said to take. It is stopped in its
    # second run, after the five steps that are under way, and is left out with its first.
    assert seeds_of(train(f"{21 / time_limit.STOPPED}s")) == [4]
    assert "is up: the seeds 5, 6, 7, 8, 9 are left out" in caplog.text
    assert 1021 <= ticking.time <= 1022.5


@pytest.mark.usefixtures("chosen")
def test_the_first_seed_is_trained_to_the_end(train, ticking):
    ticking.speed = 50.0
    assert seeds_of(train("1s")) == [4]


@pytest.mark.usefixtures("chosen")
def test_another_call_goes_on_with_what_was_left_out(train, ticking, monkeypatch):
    ticking.speed = 0.2
    train(f"{21 / time_limit.STOPPED}s")
    stopped, ticking.speed = ticking.time, 0.1
    deadline.CLOCK.start()
    assert seeds_of(train("9h")) == [4, 5, 6, 7, 8, 9]
    # Five runs were finished, and one had the steps of its last checkpoint.
    assert ticking.time - stopped < 9 * 2
    monkeypatch.setattr(nodes, "choose_runs", lambda *_: None)
    monkeypatch.setattr(Run, "train_steps", lambda *_: pytest.fail("trained again"))
    assert seeds_of(train(None)) == [4, 5, 6, 7, 8, 9]


def test_seeds_that_do_not_fit_are_not_planned_and_the_oracle_has_those_of_the_others(
    sets, tmp_path, hand, run_config
):
    training = replace(run_config(steps=400).training, steps=400)
    runs = RunsConfig(arms=("fixmatch", "oracle"), workers=1, time_limit="60s")
    # Two arms on four sets, a quarter of the way to half of the steps.
    choice = choose_runs(sets, training, runs, tmp_path)
    assert len(choice.seeds) == 3
    ends = make_deadline(choice, sets, training, runs).ends
    # The oracle's four runs come after the deadline of the others.
    assert ends == pytest.approx(hand.time + 0.85 * 60 - 4 * choice.steps * 0.1, abs=0.5)
    trained = pd.DataFrame({"key": KEYS[:3]})
    useful = {key: {"rows": np.arange(20)} for key in KEYS}
    training, runs = replace(training, steps=20), replace(runs, time_limit=None)
    finished, _ = nodes.train_oracle(
        useful, sets, tmp_path / "features", trained, training, runs, str(tmp_path)
    )
    assert list(finished) == [f"oracle-online-{key}" for key in KEYS[:3]]


@pytest.mark.integration
def test_processes_stop_at_the_deadline_too(sets, tmp_path, run_config):
    config = run_config("fixmatch", steps=40)
    runs = RunsConfig(arms=("fixmatch",), schedule="online")
    jobs = plan_jobs(("fixmatch",), sets, config.training, runs)
    # A time that is past: the first seed alone is trained.
    finished = finish_jobs(jobs, tmp_path, workers=2, deadline=deadline.Deadline(0.0, 0.1))
    assert [job.key for job in finished] == KEYS[:2]
    assert len(finish_jobs(jobs, tmp_path, workers=2)) == 7
