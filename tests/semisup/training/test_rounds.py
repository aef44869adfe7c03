from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.semisup.helpers import fit_until_killed, parameters, same
from weighmatch.arms import all_arms, get_arm
from weighmatch.semisup import make_schedule
from weighmatch.semisup.parts.state_file import read_state
from weighmatch.semisup.training.measuring import measure_pool
from weighmatch.semisup.training.online import train_online

pytestmark = pytest.mark.integration

# Arms that rank the pool between rounds.
RANKED_ANEW = [
    arm.name
    for arm in all_arms()
    if arm.weighs and "rounds" in arm.schedules and not arm.knows_truth
]
CLEAN = {"contamination_level": 0.0}


def train(config, data, folder, progress=lambda steps: None):
    return make_schedule(config).fit(data, folder, progress)


def test_restarts_alone_keep_the_whole_pool(training_set, run_config, tmp_path):
    config = run_config("fixmatch_rounds", schedule="rounds", rounds=4)
    found = train(config, training_set, tmp_path)
    first = train(run_config("fixmatch", steps=10), training_set, tmp_path / "alone")
    assert found.history.step == [10, 20, 30, 40]
    assert bool((found.history.weights == 1).all())
    alone = first.score(training_set.unlabelled_images, torch.device("cpu"))
    expected = torch.from_numpy(alone.probabilities.max(axis=1)).float()
    torch.testing.assert_close(found.history.confidence[0], expected)
    assert found.update_seconds is None
    assert found.ranker is None
    row = get_arm("fixmatch_rounds")
    assert row.schedules_among(("online", "two_stages", "rounds")) == ("rounds",)
    assert row.schedules_among(("online", "two_stages")) == ()


def test_confidences_of_the_pool_are_the_same_measure_in_every_schedule(
    training_set, run_config, tmp_path
):
    config = run_config("fixmatch", ranking=CLEAN, distribution_alignment=True)
    alone = train(config, training_set, tmp_path / "alone")
    ranked = replace(config, arm="pu", schedule="rounds", rounds=4)
    rounds = train(ranked, training_set, tmp_path / "rounds")
    assert same(parameters(alone), parameters(rounds))
    last = [found.history.confidence[-1] for found in (alone, rounds)]
    torch.testing.assert_close(*last)


@pytest.mark.parametrize("arm", RANKED_ANEW)
def test_rounds_rank_the_whole_pool(arm, training_set, run_config, tmp_path):
    assert RANKED_ANEW == ["max_prob", "pu", "gate_prior", "learned"]
    found = train(run_config(arm, schedule="rounds", rounds=3), training_set, tmp_path)
    pool = found.pool
    assert 0 < pool.kept.sum() <= len(pool.kept) == 40
    before, last = (
        read_state(path)["ranking"]["kept"] for path in sorted(tmp_path.rglob("ranking.pt"))[-2:]
    )
    # The last round trained on what the ranking before it kept; `kept` is that of the last one.
    assert torch.equal(found.history.weights[-1] > 0, before)
    assert torch.equal(pool.kept, last)
    assert found.history.step == [13, 26, 40]
    # The first round trains on everything.
    assert (found.history.weights[0] == 1).all()
    # Every ranking takes time, and all of it is in the total.
    assert 0 < 3 * found.update_seconds < found.seconds
    scored = found.score(training_set.unlabelled_images)
    ranked = pool.scores.double().numpy()
    np.testing.assert_allclose(scored.scores, ranked, rtol=1e-5, atol=1e-6)
    assert (found.config.schedule, found.config.rounds) == ("rounds", 3)
    assert found.log[-1]["step"] == 40


def test_the_first_round_is_fixmatch_and_the_next_goes_on_with_its_classifier(
    training_set, run_config, tmp_path
):
    train(run_config("pu", schedule="rounds", rounds=4), training_set, tmp_path / "rounds")
    first = train_online(run_config("fixmatch"), training_set, tmp_path / "alone", until=10)
    state = read_state(tmp_path / "rounds" / "round_0" / "checkpoint.pt")
    assert same(state["average"], parameters(first))
    # Ten steps from there end nearer to it than ten steps from anywhere else.
    second = read_state(tmp_path / "rounds" / "round_1" / "checkpoint.pt")

    def distance(a, b):
        return sum(float((a[k] - b[k]).square().sum()) for k in a)

    fresh = train(run_config("fixmatch", steps=10, seed=9), training_set, tmp_path / "fresh")
    near = distance(second["average"], parameters(first))
    assert near < 0.5 * distance(parameters(fresh), parameters(first))


@pytest.mark.parametrize("arm", ["pu", "learned"])
def test_a_pool_that_never_looks_contaminated_is_trained_on_as_fixmatch_does(
    arm, training_set, run_config, tmp_path
):
    told = []
    config = run_config(arm, schedule="rounds", rounds=3, ranking=CLEAN)
    found = train(config, training_set, tmp_path / "rounds", told.append)
    assert found.pool.kept.all()
    alone = train(run_config("fixmatch"), training_set, tmp_path / "alone")
    assert same(parameters(found), parameters(alone))
    assert sum(told) == 40
    assert [line["step"] for line in found.log] == [13, 26, 40]
    assert found.seconds >= found.log[-1]["seconds"] > found.log[0]["seconds"]


def test_other_rounds_of_the_same_run_do_not_go_on_from_too_far(training_set, run_config, tmp_path):
    two = run_config("pu", schedule="rounds", rounds=2, ranking=CLEAN)
    three = replace(two, rounds=3)
    train(two, training_set, tmp_path / "rounds")
    found = train(three, training_set, tmp_path / "rounds")
    assert same(found, train(three, training_set, tmp_path / "fresh"))


def test_every_round_measures_influence_with_draws_of_its_own(
    training_set, run_config, tmp_path, monkeypatch
):
    seeds = []

    def measure(*arguments):
        seeds.append(arguments[-1])
        return measure_pool(*arguments)

    monkeypatch.setattr("weighmatch.semisup.training.judges.measure_pool", measure)
    config = run_config("learned", schedule="rounds", rounds=3, ranking=CLEAN)
    train(config, training_set, tmp_path)
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("arm", ["pu", "learned"])
@pytest.mark.parametrize("killed_at", [10, 25])
def test_killed_rounds_resume_to_the_same_end(
    level, arm, killed_at, training_set, run_config, tmp_path
):
    ranking = {"contamination_level": level}
    trainer = make_schedule(run_config(arm, schedule="rounds", rounds=3, ranking=ranking))
    whole = trainer.fit(training_set, tmp_path / "whole")

    fit_until_killed(trainer, training_set, tmp_path / "killed", killed_at)
    assert same(trainer.fit(training_set, tmp_path / "killed"), whole)


def test_rounds_of_another_seed_are_not_taken_for_these(training_set, run_config, tmp_path):
    train(run_config("learned", schedule="rounds", rounds=2), training_set, tmp_path)
    other = make_schedule(run_config("learned", seed=7, schedule="rounds", rounds=2))
    assert same(other.fit(training_set, tmp_path), other.fit(training_set, tmp_path / "fresh"))


def test_influences_are_remembered_over_measurements_and_rounds(training_set, run_config, tmp_path):
    measuring = {"batch": 40, "measurements": 2}
    config = run_config("learned", schedule="rounds", rounds=3, influence=measuring)
    measured = train(config, training_set, tmp_path).pool.measured
    memory = config.training.influence.memory
    # Six measurements of all images, each with a weight of 1 − memory when it came.
    expected = (1 - memory) * sum(memory**k for k in range(6))
    torch.testing.assert_close(measured.evidence, torch.full((40,), expected))
    mean = measured.influence / measured.evidence
    square = measured.influence_square / measured.evidence
    assert (square >= mean.square() - 1e-5).all()
    assert mean.std() > 0
    torch.testing.assert_close(measured.mean(), mean)
    torch.testing.assert_close(measured.variance(), (square - mean.square()).clamp(min=0))


def test_influence_is_the_cosine_with_the_outer_gradient_where_curvature_is_damped_away(
    training_set, run_config, tmp_path
):
    plain = {"shift": 0.0, "flip": False, "operations": ["identity"], "cutout": 0.0}
    measuring = {"damping": 1e4, "outer_batch": 4096, "memory": 0.0, "batch": 40}
    config = run_config("learned", steps=20, influence=measuring, augmentation=plain)
    trained = train_online(replace(config, arm="fixmatch"), training_set, tmp_path)
    kept = torch.ones(40, dtype=torch.bool)
    measured, _ = measure_pool(trained, training_set, kept, torch.arange(40.0), None, config, 0)
    influence = measured.influence

    classifier = trained.classifier
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
