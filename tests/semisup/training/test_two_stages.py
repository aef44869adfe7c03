from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.semisup.helpers import fit_until_killed, parameters, same
from weighmatch.arms import all_arms
from weighmatch.semisup import make_schedule

pytestmark = pytest.mark.integration

WEIGHTED = [arm.name for arm in all_arms() if arm.weighs and "two_stages" in arm.schedules]


@pytest.mark.parametrize("arm", WEIGHTED)
def test_every_weighted_arm_has_two_stages(arm, training_set, run_config, tmp_path):
    found = make_schedule(run_config(arm, schedule="two_stages")).fit(training_set, tmp_path)
    kept = found.pool.kept
    assert 0 < kept.sum() <= len(kept) == 40
    assert found.history.weights.shape == (1, 40)
    # Weight goes to what was kept, and to nothing else.
    assert torch.equal(found.history.weights[0] > 0, kept)
    scored = found.score(training_set.unlabelled_images)
    if arm != "free":  # has no opinion of images as such
        ranked = found.pool.scores.double().numpy()
        np.testing.assert_allclose(scored.scores, ranked, rtol=1e-5, atol=1e-6)


def test_the_second_stage_is_fixmatch_on_what_was_kept(training_set, run_config, tmp_path):
    found = make_schedule(run_config("pu", schedule="two_stages")).fit(
        training_set, tmp_path / "two"
    )
    kept = training_set.unlabelled_images[found.pool.kept.numpy()]
    alone = make_schedule(run_config("fixmatch")).fit(
        replace(training_set, unlabelled_images=kept), tmp_path / "alone"
    )
    assert same(parameters(alone), parameters(found))


@pytest.mark.parametrize("arm", ["pu", "learned"])
@pytest.mark.parametrize("killed_at", [10, 30])
def test_a_killed_run_resumes_to_the_same_end(arm, killed_at, training_set, run_config, tmp_path):
    trainer = make_schedule(run_config(arm, schedule="two_stages"))
    whole = trainer.fit(training_set, tmp_path / "whole")

    fit_until_killed(trainer, training_set, tmp_path / "killed", killed_at)
    assert same(trainer.fit(training_set, tmp_path / "killed"), whole)


def test_an_old_ranking_is_not_taken_for_another_run(training_set, run_config, tmp_path):
    make_schedule(run_config("pu", schedule="two_stages")).fit(training_set, tmp_path)
    other = make_schedule(run_config("pu", seed=7, schedule="two_stages"))
    again = other.fit(training_set, tmp_path)
    assert same(again, other.fit(training_set, tmp_path / "fresh"))


@pytest.mark.parametrize("arm", ["free", "inlier"])
def test_a_pool_of_which_nothing_is_known_is_kept_whole(arm, training_set, run_config, tmp_path):
    # Without an update of the weights in the first stage.
    config = run_config(arm, schedule="two_stages", weighting={"interval": 1000})
    assert make_schedule(config).fit(training_set, tmp_path).pool.kept.all()


def test_a_damaged_ranking_is_named_and_made_again(training_set, run_config, tmp_path, caplog):
    for schedule, place in (("two_stages", "two"), ("rounds", "rounds/round_1")):
        trainer = make_schedule(run_config("pu", schedule=schedule, rounds=3))
        first = trainer.fit(training_set, tmp_path / place.partition("/")[0])
        (tmp_path / place.partition("/")[0] / "run.pt").unlink()
        path = tmp_path / place / "ranking.pt"
        path.write_bytes(path.read_bytes()[:100])
        caplog.clear()
        assert same(trainer.fit(training_set, tmp_path / place.partition("/")[0]), first)
        assert "ranking.pt is damaged" in caplog.text
