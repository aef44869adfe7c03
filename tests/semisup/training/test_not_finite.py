"""Numbers that go bad: they are noticed where they arise, undone, counted, or named."""

import math

import numpy as np
import pytest
import torch

from tests.semisup.helpers import parameters, same
from weighmatch.arms import all_arms
from weighmatch.semisup import make_schedule
from weighmatch.semisup.training import ranking
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.weightings.base import is_finite
from weighmatch.semisup.weightings.meter import InfluenceMeter

LEARNING = [arm.name for arm in all_arms() if arm.weighs and arm.name != "softmatch"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("weighmatch.semisup.training.batches.CHUNK", 8)


def break_once(monkeypatch, owner, name, broken, call=2):
    """Let the `call`-th call of a method give `broken(its answer)`."""
    original, calls = getattr(owner, name), []

    def maybe(self, *args, **kwargs):
        calls.append(1)
        answer = original(self, *args, **kwargs)
        return broken(answer) if len(calls) == call else answer

    monkeypatch.setattr(owner, name, maybe)


@pytest.mark.integration
@pytest.mark.parametrize("what", ["outer_gradient", "influence"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(
    what, training_set, run_config, tmp_path, monkeypatch, caplog
):
    break_once(monkeypatch, InfluenceMeter, what, lambda found: found * math.nan)
    run = make_schedule(run_config("learned")).fit(training_set, tmp_path)
    assert [line["updates_skipped"] for line in run.log if "updates_skipped" in line][-1] == 1
    assert "learned, seed 0: at step 15 an update of the weights met numbers" in caplog.text
    assert is_finite(run.to_state())
    assert np.isfinite(run.score(training_set.unlabelled_images).scores).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_curvature_that_is_not_finite_is_skipped(
    value, training_set, run_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "weighmatch.semisup.weightings.meter.extreme_eigenvalues", lambda *_, **__: (value, value)
    )
    run = make_schedule(run_config("learned", weighting={"warmup": 0.0})).fit(
        training_set, tmp_path
    )
    assert run.log[-1]["updates_skipped"] == 8  # each of them: none is ever probed well
    assert is_finite(run.to_state())


@pytest.mark.integration
@pytest.mark.parametrize("arm", LEARNING)
def test_an_update_that_spoils_the_weighting_is_undone(
    arm, training_set, run_config, tmp_path, monkeypatch
):
    run = Run(run_config(arm, weighting={"warmup": 0.0}), training_set, tmp_path)
    run.train_steps(8)
    weighting = run.weighting
    before = [t.clone() for t in tensors(weighting.state_dict())]
    with torch.no_grad():
        for parameter in run.classifier.parameters():
            parameter.fill_(math.nan)
    assert is_finite(weighting.state_dict())
    if weighting.try_update(run.classifier) is None:
        after = tensors(weighting.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert is_finite(weighting.state_dict())


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [t for value in state.values() for t in tensors(value)]
    return []


def test_the_last_step_goes_back_too(training_set, run_config, tmp_path, monkeypatch, caplog):
    """A run whose last update diverges returned NaN: nothing looked at it any more."""
    step, broken = Run._train_step, []

    def spoil(self, batch):
        entry = step(self, batch)
        if self.step == self.config.steps and not broken:
            broken.append(1)
            with torch.no_grad():
                next(self.classifier.parameters()).fill_(math.inf)
        return entry

    monkeypatch.setattr(Run, "_train_step", spoil)
    run = make_schedule(run_config("fixmatch")).fit(training_set, tmp_path)
    assert "no longer finite after 40 steps; the run goes back to step 32" in caplog.text
    assert is_finite(parameters(run))
    assert run.log[-1]["step"] == 40


def test_an_error_names_arm_and_seed_as_given(training_set, run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ranking, "decide_by_cut", lambda *_: pytest.fail("scores were taken as they are")
    )
    monkeypatch.setattr(ranking, "_criterion", lambda kind, run, found: (found * math.nan, 0.0))
    for schedule in ("rounds", "two_stages"):
        config = run_config("max_prob", seed=3, schedule=schedule, rounds=2)
        message = r"^max_prob, seed 3: the scores of the pool are not finite; lower training"
        with pytest.raises(FloatingPointError, match=message):
            make_schedule(config).fit(training_set, tmp_path / schedule)


def test_scores_that_are_not_finite_never_come_out(training_set, run_config, tmp_path):
    run = make_schedule(run_config("fixmatch", seed=5)).fit(training_set, tmp_path)
    with torch.no_grad():
        run.classifier.head.weight[0, 0] = math.nan
    message = r"fixmatch, seed 5: the scores of 40 of 40 images are not finite; train it again"
    with pytest.raises(FloatingPointError, match=message):
        run.score(training_set.unlabelled_images)


def test_a_checkpoint_that_was_damaged_while_training_sends_the_run_further_back(
    training_set, run_config, tmp_path, monkeypatch
):
    whole = make_schedule(run_config("fixmatch")).fit(training_set, tmp_path / "a")
    step, broken = Run._train_step, []

    def spoil(self, batch):
        entry = step(self, batch)
        if self.step == 30 and not broken:
            broken.append(1)
            (tmp_path / "b" / "checkpoint.pt").write_bytes(b"rubbish")
            entry["loss"] = torch.tensor(math.nan)
        return entry

    monkeypatch.setattr(Run, "_train_step", spoil)
    run = make_schedule(run_config("fixmatch")).fit(training_set, tmp_path / "b")
    assert is_finite(parameters(run))
    assert not same(run, whole)  # half of the learning rate
