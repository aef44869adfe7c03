import dataclasses

import pytest
import torch
from weighmatch.semisup.runs import Job, finish_all, make_jobs, train_all
from weighmatch.semisup.trainer import Run

from weighmatch.semisup.config import RunsConfig


@pytest.fixture
def sets(training_set):
    arrays = {f.name: getattr(training_set, f.name) for f in dataclasses.fields(training_set)}
    return {"seed_0000": arrays, "seed_0001": arrays}


def test_processes_give_what_one_process_gives_and_finished_runs_are_kept(
    sets, run_config, tmp_path, monkeypatch
):
    jobs = make_jobs(("fixmatch", "learned"), sets, run_config().training)
    parallel = train_all(jobs, tmp_path / "parallel", workers=2)
    single = train_all(jobs, tmp_path / "single", workers=1)
    assert list(parallel) == list(single) == [job.name for job in jobs]
    for name, result in parallel.items():
        for key, value in result["classifier"].items():
            assert torch.equal(value, single[name]["classifier"][key])
    monkeypatch.setattr(Run, "train_steps", lambda self: pytest.fail("trained again"))
    train_all(jobs, tmp_path / "parallel", workers=1)


def test_no_jobs_give_no_results(tmp_path):
    assert train_all([], tmp_path) == {}


def test_jobs_have_the_seed_of_their_data(sets, run_config):
    jobs = make_jobs(("supervised",), sets, run_config().training)
    assert [(job.name, job.config.seed) for job in jobs] == [
        ("supervised-seed_0000", 0),
        ("supervised-seed_0001", 1),
    ]


def test_converged_fixmatch_has_twice_the_matched_steps(sets, run_config):
    arms = (
        "fixmatch_converged",
        "fixmatch_realigned",
        "fixmatch_rounds",
        "fixmatch_matched",
        "fixmatch",
    )
    jobs = make_jobs(arms, sets, run_config().training, (3,))
    converged, realigned, restarted, matched, plain = (job.config.steps for job in jobs[:5])
    assert converged == 2 * matched
    assert realigned == restarted == matched
    assert matched > plain == 40
    alone = make_jobs(("fixmatch_converged",), sets, run_config().training, (3,))
    assert alone[0].config == jobs[0].config


def test_restarts_need_rounds(sets, run_config, caplog):
    arms = ("fixmatch_rounds", "fixmatch")
    jobs = make_jobs(arms, sets, run_config().training, (1, 2))
    assert {job.config.arm for job in jobs} == {"fixmatch"}
    assert "fixmatch_rounds is left out" in caplog.text
    with pytest.raises(ValueError, match=r"runs\.stages has no number of rounds; make it 3"):
        RunsConfig(arms=arms[:1], stages=2)
    assert RunsConfig(arms=arms[:1], stages=3).stages == 3


def test_the_bar_counts_what_other_calls_do(sets, run_config, tmp_path, capsys):
    jobs = make_jobs(("fixmatch",), sets, run_config().training)
    finish_all(jobs, tmp_path, workers=1, others=(100, 20))
    assert "180/200" in capsys.readouterr().err


def test_a_failing_run_stops_the_others_and_names_itself(sets, run_config, tmp_path):
    good = make_jobs(("fixmatch",), sets, run_config(steps=4000).training)
    wild = run_config("supervised", learning_rate=99.0, momentum=0.99, weight_decay=0.9)
    bad = [Job("bad", wild, good[0].data)]
    with pytest.raises(FloatingPointError, match="supervised, seed 0"):
        train_all([*good[:1], *bad], tmp_path, workers=2)
    # A new pool is there for the next call.
    short = make_jobs(("fixmatch",), sets, run_config().training)
    assert len(train_all(short, tmp_path, workers=2)) == 2


def test_an_edit_while_runs_go_on_splits_none(sets, run_config, tmp_path, monkeypatch):
    jobs = make_jobs(("fixmatch",), sets, run_config().training)
    first = train_all(jobs, tmp_path, workers=1)
    monkeypatch.setattr("weighmatch.semisup.trainer.code_digest", lambda: "another")
    monkeypatch.setattr(Run, "train_steps", lambda self: pytest.fail("trained again"))
    again = train_all(jobs, tmp_path, workers=1)
    assert [r["seconds"] for r in again.values()] == [r["seconds"] for r in first.values()]
