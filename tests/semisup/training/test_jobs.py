import dataclasses
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from weighmatch.semisup.compute import flops_per_step, matched_steps, relative_costs
from weighmatch.semisup.config import ARMS, UNWEIGHTED, RunsConfig
from weighmatch.semisup.runs import Job, finish_all, make_jobs, one_thread, train_all
from weighmatch.semisup.scoring import score_images
from weighmatch.semisup.trainer import Run


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


def test_matched_fixmatch_has_the_learned_arms_operations(training_set, run_config):
    training = run_config().training
    steps = matched_steps(3, training, training_set)
    plain = flops_per_step("fixmatch", 3, training, training_set)
    learned = flops_per_step("learned", 3, training, training_set)
    warm = training.weighing.warmup * training.steps
    total = warm * plain + (training.steps - warm) * learned
    assert steps > training.steps
    assert steps * plain == pytest.approx(total, rel=1 / training.steps)


def test_costs_are_those_of_whole_runs_beside_fixmatch(training_set, run_config):
    training = run_config().training
    arms = ("fixmatch", "supervised", "learned", "oracle")
    plain, supervised, learned, oracle = relative_costs(arms, 3, training, training_set)
    assert plain == oracle == 1
    ratio = flops_per_step("supervised", 3, training, training_set) / flops_per_step(
        "fixmatch", 3, training, training_set
    )
    assert supervised == pytest.approx(ratio)
    assert learned * training.steps == pytest.approx(
        matched_steps(3, training, training_set), abs=1
    )


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


def test_one_thread_is_undone():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_workers_leave_with_the_process_that_started_them(tmp_path):
    """A worker whose parent was killed must not go on writing where a new run resumes."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from weighmatch.semisup.runs import _leave_with\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    child = context.Process(target=_leave_with, args=(os.getpid(),))\n"
        "    child.start()\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(300):
        if not _alive(child):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def _alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("supervised", "oracle")])
def test_scoring_is_the_trained_run(arm, sets, run_config, tmp_path):
    jobs = make_jobs((arm,), sets, run_config().training, (1, 3))[:1]
    (checkpoint,) = train_all(jobs, tmp_path, workers=1).values()
    images = sets["seed_0000"]["unlabelled_images"]
    scored = score_images(checkpoint, images)
    assert scored.probabilities.shape == (40, 3)
    assert scored.probabilities.sum(axis=1) == pytest.approx(1)
    assert scored.weights.mean() == pytest.approx(1)
    last = checkpoint["history"]["weights"][-1]
    if arm == "learned":  # φ is on the image alone: the same weights as recorded in training
        assert scored.weights == pytest.approx(last.double().numpy(), abs=1e-5)
    confidence = scored.probabilities.max(axis=1)
    ranked = len(set(scored.scores)) > 1
    assert ranked == (arm not in (*UNWEIGHTED, "free"))
    if arm in ("max_prob", "softmatch"):
        assert scored.scores == pytest.approx(confidence)
    if arm in ("energy", "pu", "inlier", "learned"):  # two sizes, the larger ones ranked first
        high = scored.weights > 1
        assert len(set(scored.weights)) <= 2
        assert not high.any() or scored.scores[high].min() > scored.scores[~high].max()
    with pytest.raises(ValueError, match="1 channel"):
        score_images(checkpoint, images.repeat(3, 1))


def test_softmatch_weighs_new_images_by_the_gaussian_of_its_run(sets, run_config, tmp_path):
    jobs = make_jobs(("softmatch",), sets, run_config().training)[:1]
    (checkpoint,) = train_all(jobs, tmp_path, workers=1).values()
    images = sets["seed_0000"]["unlabelled_images"]
    mean, spread = np.median(score_images(checkpoint, images).scores), 0.01
    checkpoint["weighting"]["moments"]["value"] = torch.tensor([mean, spread**2])
    scored = score_images(checkpoint, images)
    below = np.minimum(scored.scores - mean, 0)
    expected = np.exp(-(below**2) / (2 * (spread / 2) ** 2))
    assert len(set(expected)) > 10
    assert scored.weights == pytest.approx(expected / expected.mean(), rel=1e-2, abs=1e-6)


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
