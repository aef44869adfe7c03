"""Many runs: what is planned, what is trained and kept, and what an error says."""

import pytest

from tests.semisup.helpers import arrays_of, parameters, same
from weighmatch.semisup.config import RunsConfig
from weighmatch.semisup.training import config as training_config
from weighmatch.semisup.training.compute import Sizes, matched_steps
from weighmatch.semisup.training.config import RunConfig
from weighmatch.semisup.training.jobs import Job, finish_jobs, kept_steps, plan_jobs, read_job
from weighmatch.semisup.training.loop import Run


def plan(arms, sets, config, *schedules, rounds=3):
    runs = RunsConfig(schedule=schedules or ("online",), rounds=rounds)
    return plan_jobs(arms, sets, config.training, runs)


def train_all(jobs, folder, workers=1):
    """The runs by the names of their jobs."""
    finish_jobs(jobs, folder, workers)
    return {job.name: read_job(job, folder) for job in jobs}


@pytest.mark.integration
def test_processes_give_what_one_process_gives_and_finished_runs_are_kept(
    sets, run_config, tmp_path, monkeypatch
):
    jobs = plan(("fixmatch", "learned"), sets, run_config())
    parallel = train_all(jobs, tmp_path / "parallel", workers=2)
    single = train_all(jobs, tmp_path / "single", workers=1)
    assert list(parallel) == list(single) == [job.name for job in jobs]
    for name, result in parallel.items():
        assert same(parameters(result), parameters(single[name]))
    monkeypatch.setattr(Run, "train_steps", lambda *_: pytest.fail("trained again"))
    train_all(jobs, tmp_path / "parallel", workers=1)


def test_no_jobs_give_no_results(tmp_path):
    assert train_all([], tmp_path / "runs") == {}
    assert not (tmp_path / "runs").exists()


def test_jobs_have_the_seed_of_their_data(sets, run_config):
    jobs = plan(("supervised",), sets, run_config())
    assert [(job.name, job.key, job.config.seed) for job in jobs] == [
        ("supervised-online-seed_0000", "seed_0000", 0),
        ("supervised-online-seed_0001", "seed_0001", 1),
    ]


def test_a_pool_of_several_sets_is_hashed_once(sets, run_config, tmp_path, monkeypatch):
    hashed = []
    fingerprint = training_config.array_fingerprint
    monkeypatch.setattr(
        training_config,
        "array_fingerprint",
        lambda array: hashed.append(array) or fingerprint(array),
    )
    shared = next(iter(sets.values()))["unlabelled_images"]
    folds = {key: {**arrays, "unlabelled_images": shared} for key, arrays in sets.items()}
    jobs = plan(("fixmatch",), folds, run_config(steps=2))
    trained = train_all(jobs, tmp_path)
    assert {run.pool_fingerprint for run in trained.values()} == {fingerprint(shared)}
    assert sum(array is shared for array in hashed) == 1


@pytest.mark.integration
def test_converged_fixmatch_has_twice_the_matched_steps(sets, run_config):
    arms = (
        "fixmatch_converged",
        "fixmatch_realigned",
        "fixmatch_rounds",
        "fixmatch_matched",
        "fixmatch",
    )
    jobs = plan(arms, sets, run_config(), "rounds")
    converged, realigned, restarted, matched, plain = (job.config.steps for job in jobs[:5])
    assert converged == 2 * matched
    assert realigned == restarted == matched
    assert matched > plain == 40
    alone = plan(("fixmatch_converged",), sets, run_config(), "rounds")
    assert alone[0].config == jobs[0].config


@pytest.mark.integration
def test_fixmatch_is_matched_to_the_dearest_schedule(training_set, run_config):
    config = run_config()
    sizes = Sizes.of(training_set, 3, config.training)
    sets = {"a_1": arrays_of(training_set)}
    jobs = plan(("fixmatch_matched",), sets, config, "online", "rounds")
    dearest = max(matched_steps(schedule, 3, sizes) for schedule in ("online", "rounds"))
    assert jobs[0].config.steps == dearest


def test_restarts_need_rounds(sets, run_config, caplog):
    arms = ("fixmatch_rounds", "fixmatch")
    jobs = plan(arms, sets, run_config(), "online", "two_stages")
    assert {job.config.arm for job in jobs} == {"fixmatch"}
    assert "fixmatch_rounds is left out" in caplog.text
    with pytest.raises(ValueError, match="fixmatch_rounds can be trained in rounds alone; set run"):
        RunsConfig(arms=arms[:1], schedule="two_stages")
    assert RunsConfig(arms=arms[:1], schedule="rounds").schedule == ("rounds",)


def test_the_bar_counts_what_other_calls_do(sets, run_config, tmp_path, capsys):
    jobs = plan(("fixmatch",), sets, run_config())
    finish_jobs(jobs, tmp_path, workers=1, others=(100, 0))
    shown = capsys.readouterr().err
    assert " 56 % " in shown
    assert shown.endswith("left\n")
    # A bar that another call goes on with leaves no line; here all that it has is finished before.
    finish_jobs(jobs, tmp_path, workers=1, others=(0, 20))
    shown = capsys.readouterr().err
    assert " 80 % " in shown
    assert shown.endswith("\r")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arm", "schedule", "steps"),
    [("fixmatch", "online", 40), ("pu", "two_stages", 60), ("learned", "rounds", 40)],
)
def test_a_run_says_where_it_goes_on(arm, schedule, steps, sets, run_config, tmp_path, caplog):
    caplog.set_level("INFO")
    job = plan((arm,), sets, run_config(), schedule)[0]
    assert kept_steps(job, tmp_path) == 0
    train_steps, trained = Run.train_steps, []

    def interrupt(self, limit):
        trained.append(train_steps(self, min(limit, 10)))
        if sum(trained) >= steps - 10:
            raise KeyboardInterrupt
        return trained[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "train_steps", interrupt)
        with pytest.raises(KeyboardInterrupt) as stopped:
            finish_jobs([job], tmp_path, workers=1)
    kept = kept_steps(job, tmp_path)
    assert steps - 20 <= kept <= sum(trained) < steps
    text = f"{job.name} goes on from step {kept} of {steps}"
    assert stopped.value.__notes__ == [f"Of 1 runs, {text}"]
    finish_jobs([job], tmp_path, workers=1)
    assert f"training 1 runs, 1 at a time: {text}" in caplog.text
    finish_jobs([job], tmp_path, workers=1)
    assert "training 1 runs, 1 at a time: 1 is finished" in caplog.text


@pytest.mark.integration
def test_finished_runs_count_in_the_bar_as_well(sets, run_config, tmp_path, capsys):
    jobs = plan(("pu",), sets, run_config(), "two_stages")[:1]
    for _ in range(2):
        finish_jobs(jobs, tmp_path, workers=1)
        assert "100 % " in capsys.readouterr().err


@pytest.mark.integration
def test_only_arms_that_can_rank_anew_are_run_in_rounds(training_set, run_config, tmp_path):
    sets = {"seed_0003": arrays_of(training_set)}
    arms = ("fixmatch", "softmatch", "pu")
    jobs = plan(arms, sets, run_config(), "rounds", rounds=4)
    assert [(job.name, job.config.schedule, job.config.rounds) for job in jobs[:2]] == [
        ("fixmatch-online-seed_0003", "online", 1),
        ("softmatch-online-seed_0003", "online", 1),
    ]
    jobs = plan(arms, sets, run_config(), "online", "rounds", rounds=4)
    assert [(job.name, job.config.rounds, job.steps) for job in jobs] == [
        ("fixmatch-online-seed_0003", 1, 40),
        ("softmatch-online-seed_0003", 1, 40),
        ("pu-online-seed_0003", 1, 40),
        ("pu-rounds-seed_0003", 4, 40),
    ]
    found = train_all(jobs, tmp_path)
    assert [run.config.rounds for run in found.values()] == [1, 1, 1, 4]
    assert [run.config.schedule for run in found.values()][-1] == "rounds"


@pytest.mark.integration
def test_jobs_of_both_schedules_are_told_apart(training_set, run_config, tmp_path):
    sets = {"seed_0003": arrays_of(training_set)}
    jobs = plan(("fixmatch", "pu"), sets, run_config(), "online", "two_stages")
    assert [(job.config.arm, job.config.schedule, job.steps) for job in jobs] == [
        ("fixmatch", "online", 40),
        ("pu", "online", 40),
        ("pu", "two_stages", 60),
    ]
    assert [job.cost for job in jobs] == sorted(job.cost for job in jobs)
    assert jobs[0].cost == 40
    found = train_all(jobs, tmp_path)
    schedules = [run.config.schedule for run in found.values()]
    assert schedules == ["online", "online", "two_stages"]


@pytest.mark.integration
def test_a_failing_run_stops_the_others_and_names_itself(sets, run_config, tmp_path):
    good = plan(("fixmatch",), sets, run_config(steps=4000))
    wild = run_config("supervised", learning_rate=99.0, momentum=0.99, weight_decay=0.9)
    bad = [Job("bad", "seed_0000", wild, good[0].data, 40.0)]
    with pytest.raises(FloatingPointError, match="supervised, seed 0"):
        train_all([*good[:1], *bad], tmp_path, workers=2)
    # A new pool is there for the next call.
    short = plan(("fixmatch",), sets, run_config())
    assert len(train_all(short, tmp_path, workers=2)) == 2


def test_an_edit_while_runs_go_on_splits_none(sets, run_config, tmp_path, monkeypatch):
    jobs = plan(("fixmatch",), sets, run_config())
    first = train_all(jobs, tmp_path)
    monkeypatch.setattr("weighmatch.code.code_digest", lambda module: "another")
    monkeypatch.setattr(Run, "train_steps", lambda *_: pytest.fail("trained again"))
    again = train_all(jobs, tmp_path)
    assert [run.seconds for run in again.values()] == [run.seconds for run in first.values()]
    made_now = RunConfig("fixmatch", 0, 40, 3, jobs[0].config.training)
    assert made_now.code != jobs[0].config.code
