"""A weighting and an arm from outside of the package train and score like any other."""

import sys

import numpy as np
import pytest
import torch

from weighmatch import arms
from weighmatch.arms import SCHEDULES, Arm
from weighmatch.semisup import TrainedRun, make_schedule
from weighmatch.semisup.config import RunsConfig, require_effect
from weighmatch.semisup.training.code import training_code
from weighmatch.semisup.training.jobs import finish_jobs, plan_jobs, read_job
from weighmatch.semisup.weightings import Weighting
from weighmatch.semisup.weightings.base import otsu_cut


@pytest.fixture
def darkness():
    """The arm `dark`: bright images count little, and ever less with every update."""

    class Darkness(Weighting):
        name = "darkness"

        def __init__(self, context):
            super().__init__(context)
            self.updates = 0

        def criterion(self, images, features, pseudo):
            return 1 - images.mean(dim=(1, 2, 3))

        def sized(self, scores):
            return scores.clamp(min=0) ** self.updates

        def update(self, classifier):
            self.updates += 1
            self.cut = otsu_cut(torch.tensor([0.0, float(self.updates)]))
            return {"darkness_updates": float(self.updates)}

        def state_dict(self):
            return {**super().state_dict(), "updates": self.updates}

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.updates = state["updates"]

    row = Arm("dark", "dark images", "#010203", weighting="darkness", schedules=SCHEDULES)
    arms.register(row)
    try:
        yield row
    finally:
        arms.unregister("dark")
        Weighting.registry.pop("darkness")


@pytest.fixture
def half_bright(training_set):
    """The pool with images from 20 on made bright."""
    pool = training_set.unlabelled_images
    pool[20:] = np.clip(pool[20:].astype(int) + 90, 0, 255).astype(np.uint8)
    return training_set


def darkness_of(images):
    return 1 - images.astype(np.float32).mean(axis=(1, 2, 3)) / 255


def test_it_learns_online_and_scores_any_image(darkness, half_bright, run_config, tmp_path):
    run = make_schedule(run_config("dark")).fit(half_bright, tmp_path)
    # Updates at steps 10, 15, …, 40: the warm-up takes 8 steps.
    assert run.weighting["updates"] == 7
    assert run.log[-1]["darkness_updates"] > 0
    assert run.update_seconds > 0
    last = run.history.weights[-1].numpy()
    expected = darkness_of(half_bright.unlabelled_images) ** 7
    np.testing.assert_allclose(last, expected / expected.mean(), rtol=1e-4)
    foreign = np.random.default_rng(0).integers(0, 256, (9, 1, 8, 8), dtype=np.uint8)
    scored = run.score(foreign)
    np.testing.assert_allclose(scored.scores, darkness_of(foreign), rtol=1e-5)
    np.testing.assert_allclose(scored.weights, scored.scores**7 / np.mean(scored.scores**7))


@pytest.mark.integration
@pytest.mark.parametrize("schedule", ["two_stages", "rounds"])
def test_it_ranks_the_pool_between_stages_and_rounds(
    schedule, darkness, half_bright, run_config, tmp_path
):
    config = run_config("dark", schedule=schedule, rounds=2)
    run = make_schedule(config).fit(half_bright, tmp_path)
    np.testing.assert_allclose(
        run.pool.scores, darkness_of(half_bright.unlabelled_images), rtol=1e-5
    )
    # As many as lie above the cut are kept, or a few of each pseudo-class at least.
    assert 0 < run.pool.cut < 1
    assert run.pool.kept[:20].float().mean() > run.pool.kept[20:].float().mean()
    assert torch.equal(run.history.weights[-1] > 0, run.pool.kept)
    scored = run.score(half_bright.unlabelled_images)
    np.testing.assert_allclose(scored.scores, run.pool.scores, rtol=1e-5)
    assert scored.weights[:20].min() > scored.weights[20:].max()


@pytest.mark.integration
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_its_runs_are_saved_and_loaded(schedule, darkness, half_bright, run_config, tmp_path):
    config = run_config("dark", steps=20, schedule=schedule, rounds=2)
    run = make_schedule(config).fit(half_bright, tmp_path / "folder")
    run.save(tmp_path / "run.pt")
    loaded = TrainedRun.load(tmp_path / "run.pt")
    before, after = (r.score(half_bright.unlabelled_images) for r in (run, loaded))
    assert np.array_equal(before.scores, after.scores)
    assert np.array_equal(before.weights, after.weights)
    arms.unregister("dark")
    with pytest.raises(ValueError, match=r"run\.pt is no trained run .*arm 'dark' is unknown"):
        TrainedRun.load(tmp_path / "run.pt")


@pytest.mark.integration
def test_it_is_planned_and_trained_as_a_job(darkness, sets, run_config, tmp_path):
    runs = RunsConfig(arms="dark", schedule="online+two_stages+rounds", rounds=2)
    require_effect({"weighting": {"interval": 5}}, ["dark"], runs)
    with pytest.raises(ValueError, match=r"training\.influence\.damping has no effect"):
        require_effect({"influence": {"damping": 1.0}}, ["dark"], runs)
    one = {"seed_0001": sets["seed_0001"]}
    jobs = plan_jobs(runs.arms, one, run_config(steps=20).training, runs)
    assert [job.name for job in jobs] == [f"dark-{name}-seed_0001" for name in SCHEDULES]
    finish_jobs(jobs, tmp_path, workers=1)
    assert [read_job(job, tmp_path).config.arm for job in jobs] == ["dark"] * 3


def test_the_digest_of_the_code_includes_its_module(darkness, monkeypatch):
    before = training_code()
    module = sys.modules[Weighting.registry["darkness"].__module__]
    sources = {module: "x = 1"}
    monkeypatch.setattr("inspect.getsource", lambda m: sources[m])
    first = training_code()
    sources[module] = "x = 1  # a remark"
    assert training_code() == first != before
    sources[module] = "x = 2"
    assert training_code() != first
    with monkeypatch.context() as changes:
        changes.delitem(Weighting.registry, "darkness")
        assert training_code() not in (before, first)


def test_weightings_without_a_name_are_no_weightings_of_the_register():
    before = dict(Weighting.registry)
    type("Nameless", (Weighting,), {})
    assert Weighting.registry == before
    with pytest.raises(ValueError, match="weighting 'nameless' is unknown; choose from"):
        Weighting.kind("nameless")
