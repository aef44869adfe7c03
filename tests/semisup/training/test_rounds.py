import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from weighmatch.semisup.compute import matched_steps, relative_costs
from weighmatch.semisup.rounds import measure_pool
from weighmatch.semisup.runs import make_jobs, train_all
from weighmatch.semisup.scoring import load_classifier, score_images

from tests.semisup.test_trainer import fit_until_killed, same
from weighmatch.semisup import RoundsTrainer, Trainer
from weighmatch.semisup.config import RANKED_ANEW, RESTARTED, schedules


def test_restarts_alone_keep_the_whole_pool(training_set, run_config, tmp_path):
    found = RoundsTrainer(run_config(RESTARTED), 4).fit(training_set, tmp_path)
    first = Trainer(run_config("fixmatch", steps=10)).fit(training_set, tmp_path / "alone")
    assert found["history"]["step"] == [10, 20, 30, 40]
    assert bool((found["history"]["weights"] == 1).all())
    alone = score_images(first, training_set.unlabelled_images, torch.device("cpu"))
    expected = torch.from_numpy(alone.probabilities.max(axis=1)).float()
    torch.testing.assert_close(found["history"]["confidence"][0], expected)
    assert math.isnan(found["update_seconds"])
    assert "ranker" not in found
    assert schedules(RESTARTED, (1, 2, 4)) == (4,)
    assert schedules(RESTARTED, (1, 2)) == ()


def test_confidences_of_the_pool_are_the_same_measure_in_every_schedule(
    training_set, run_config, tmp_path
):
    clean = {"contamination_level": 0}
    config = run_config("fixmatch", weighing=clean, distribution_alignment=True)
    alone = Trainer(config).fit(training_set, tmp_path / "alone")
    rounds = RoundsTrainer(replace(config, arm="pu"), 4).fit(training_set, tmp_path / "rounds")
    assert same(alone["classifier"], rounds["classifier"])
    last = [found["history"]["confidence"][-1] for found in (alone, rounds)]
    torch.testing.assert_close(*last)


@pytest.mark.parametrize("arm", RANKED_ANEW)
def test_rounds_rank_the_whole_pool(arm, training_set, run_config, tmp_path):
    found = RoundsTrainer(run_config(arm), 3).fit(training_set, tmp_path)
    weighting = found["weighting"]
    assert 0 < weighting["kept"].sum() <= len(weighting["kept"]) == 40
    assert torch.equal(found["history"]["weights"][-1] > 0, weighting["kept"])
    assert found["history"]["step"] == [13, 26, 40]
    # The first round trains on everything.
    assert (found["history"]["weights"][0] == 1).all()
    # Every ranking takes time, and all of it is in the total.
    assert 0 < 3 * found["update_seconds"] < found["seconds"]
    scored = score_images(found, training_set.unlabelled_images)
    ranked = weighting["scores"].double().numpy()
    np.testing.assert_allclose(scored.scores, ranked, rtol=1e-5, atol=1e-6)
    assert found["config"]["stages"] == 3
    assert found["metrics"][-1]["step"] == 40


def test_the_first_round_is_fixmatch_and_the_next_goes_on_with_its_classifier(
    training_set, run_config, tmp_path
):
    config = run_config("pu")
    RoundsTrainer(config, 4).fit(training_set, tmp_path / "rounds")
    first = Trainer(run_config("fixmatch")).fit(training_set, tmp_path / "alone", until=10)
    state = torch.load(tmp_path / "rounds" / "round_0" / "checkpoint.pt", weights_only=True)
    assert same(state["average"], first["classifier"])
    # Ten steps from there end nearer to it than ten steps from anywhere else.
    second = torch.load(tmp_path / "rounds" / "round_1" / "checkpoint.pt", weights_only=True)

    def distance(a, b):
        return sum(float((a[k] - b[k]).square().sum()) for k in a)

    fresh = Trainer(run_config("fixmatch", steps=10, seed=9)).fit(training_set, tmp_path / "fresh")
    near = distance(second["average"], first["classifier"])
    assert near < 0.5 * distance(fresh["classifier"], first["classifier"])


@pytest.mark.parametrize("arm", ["pu", "learned"])
def test_a_pool_that_never_looks_contaminated_is_trained_on_as_fixmatch_does(
    arm, training_set, run_config, tmp_path
):
    told = []
    config = run_config(arm, weighing={"contamination_level": 0.0})
    found = RoundsTrainer(config, 3).fit(training_set, tmp_path / "rounds", told.append)
    assert found["weighting"]["kept"].all()
    alone = Trainer(run_config("fixmatch")).fit(training_set, tmp_path / "alone")
    assert same(found["classifier"], alone["classifier"])
    assert sum(told) == 40
    assert [line["step"] for line in found["metrics"]] == [13, 26, 40]
    assert found["seconds"] >= found["metrics"][-1]["seconds"] > found["metrics"][0]["seconds"]


def test_other_rounds_of_the_same_run_do_not_go_on_from_too_far(training_set, run_config, tmp_path):
    config = run_config("pu", weighing={"contamination_level": 0.0})
    RoundsTrainer(config, 2).fit(training_set, tmp_path / "rounds")
    found = RoundsTrainer(config, 3).fit(training_set, tmp_path / "rounds")
    assert same(found, RoundsTrainer(config, 3).fit(training_set, tmp_path / "fresh"))


def test_every_round_measures_influence_with_draws_of_its_own(
    training_set, run_config, tmp_path, monkeypatch
):
    seeds = []

    def measure(*arguments):
        seeds.append(arguments[-1])
        return measure_pool(*arguments)

    monkeypatch.setattr("weighmatch.semisup.rounds.measure_pool", measure)
    config = run_config("learned", weighing={"contamination_level": 0.0})
    RoundsTrainer(config, 3).fit(training_set, tmp_path)
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("arm", ["pu", "learned"])
@pytest.mark.parametrize("killed_at", [10, 25])
def test_killed_rounds_resume_to_the_same_end(
    level, arm, killed_at, training_set, run_config, tmp_path
):
    trainer = RoundsTrainer(run_config(arm, weighing={"contamination_level": level}), 3)
    whole = trainer.fit(training_set, tmp_path / "whole")

    fit_until_killed(trainer, training_set, tmp_path / "killed", killed_at)
    assert same(trainer.fit(training_set, tmp_path / "killed"), whole)


def test_rounds_of_another_seed_are_not_taken_for_these(training_set, run_config, tmp_path):
    RoundsTrainer(run_config("learned"), 2).fit(training_set, tmp_path)
    other = RoundsTrainer(run_config("learned", seed=7), 2)
    assert same(other.fit(training_set, tmp_path), other.fit(training_set, tmp_path / "fresh"))


def test_the_influence_of_every_image_is_measured_every_round(training_set, run_config, tmp_path):
    found = RoundsTrainer(run_config("learned"), 3).fit(training_set, tmp_path)
    weighting = found["weighting"]
    memory = run_config().training.weighing.memory
    # Three measurements, each with a weight of 1 − memory when it came.
    expected = (1 - memory) * (1 + memory + memory**2)
    torch.testing.assert_close(weighting["evidence"], torch.full((40,), expected))
    mean = weighting["influence"] / weighting["evidence"]
    square = weighting["influence_square"] / weighting["evidence"]
    assert (square >= mean.square() - 1e-5).all()
    assert mean.std() > 0


def test_influence_is_the_cosine_with_the_outer_gradient_where_curvature_is_damped_away(
    training_set, run_config, tmp_path
):
    plain = {"shift": 0.0, "flip": False, "operations": ["identity"], "cutout": 0.0}
    weighing = {"damping": 1e4, "outer_batch": 4096, "memory": 0.0, "influence_batch": 40}
    config = run_config("learned", steps=20, weighing=weighing, augmentation=plain)
    trained = Trainer(replace(config, arm="fixmatch")).fit(training_set, tmp_path)
    kept = torch.ones(40, dtype=torch.bool)
    influence = measure_pool(trained, training_set, kept, {}, config, 0)["influence"]

    classifier = load_classifier(trained, 1)
    labelled = torch.from_numpy(training_set.labelled_images).float() / 255
    leaves = list(classifier.parameters())
    outer = F.cross_entropy(classifier(labelled), torch.from_numpy(training_set.labels))
    g = torch.autograd.grad(outer, leaves)
    expected = []
    for image in torch.from_numpy(training_set.unlabelled_images).float().div(255):
        features = classifier.features(image[None])
        logits = classifier.head(features)
        label = logits.argmax(1)
        mine = torch.autograd.grad(F.cross_entropy(logits, label), leaves)
        norm = (logits.softmax(1) - F.one_hot(label, 3)).norm() * features.norm()
        dot = sum((a * b).sum() for a, b in zip(g, mine, strict=True))
        expected.append(float((dot / norm).detach()))
    # The outer batch is drawn with replacement.
    assert np.corrcoef(influence.numpy(), expected)[0, 1] > 0.99


def test_rounds_cost_their_rankings_and_fixmatch_is_matched_to_the_dearest(
    training_set, run_config
):
    training = run_config().training
    costs = relative_costs(("fixmatch", "max_prob", "pu", "learned"), 3, training, training_set, 3)
    assert costs[0] == 1.0 < costs[1] < costs[2] < costs[3]
    more = relative_costs(("learned",), 3, training, training_set, 6)
    assert more[0] - 1 == pytest.approx(2 * (costs[3] - 1))
    jobs = make_jobs(("fixmatch_matched",), {"a_1": vars(training_set)}, training, (1, 3))
    dearest = max(matched_steps(3, training, training_set, stages) for stages in (1, 3))
    assert jobs[0].config.steps == dearest


def test_only_arms_that_can_rank_anew_are_run_in_rounds(training_set, run_config, tmp_path):
    sets = {"seed_0003": vars(training_set)}
    arms = ("fixmatch", "softmatch", "pu")
    jobs = make_jobs(arms, sets, run_config().training, (4,))
    assert [(job.name, job.stages) for job in jobs[:2]] == [
        ("fixmatch-seed_0003", 1),
        ("softmatch-seed_0003", 1),
    ]
    jobs = make_jobs(arms, sets, run_config().training, (1, 4))
    assert [(job.name, job.stages, job.steps) for job in jobs] == [
        ("fixmatch-seed_0003", 1, 40),
        ("softmatch-seed_0003", 1, 40),
        ("pu-seed_0003", 1, 40),
        ("pu_4_stages-seed_0003", 4, 40),
    ]
    found = train_all(jobs, tmp_path, workers=1)
    assert [c["config"].get("stages", 1) for c in found.values()] == [1, 1, 1, 4]


def test_more_rounds_than_steps_are_refused(run_config):
    with pytest.raises(ValueError, match=r"training\.steps 40 are fewer than 41 rounds"):
        RoundsTrainer(run_config("pu"), 41)
