from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from weighmatch.semisup.compute import matched_steps, relative_costs
from weighmatch.semisup.rounds import RoundsTrainer
from weighmatch.semisup.runs import make_jobs, train_all
from weighmatch.semisup.scoring import score_images
from weighmatch.semisup.two_stages import clean_chance, fit_head, keep_best, rank_pool

from tests.semisup.test_trainer import fit_until_killed, same
from weighmatch.semisup import Trainer, TrainingSet, TwoStageTrainer
from weighmatch.semisup.parts.networks import ConfidenceHead, build_classifier

WEIGHTED = ["max_prob", "softmatch", "energy", "ds3l", "pu", "inlier", "free", "learned"]


@pytest.mark.parametrize("arm", WEIGHTED)
def test_every_weighted_arm_has_two_stages(arm, training_set, run_config, tmp_path):
    found = TwoStageTrainer(run_config(arm)).fit(training_set, tmp_path)
    kept = found["weighting"]["kept"]
    assert 0 < kept.sum() <= len(kept) == 40
    assert found["history"]["weights"].shape == (1, 40)
    # Weight goes to what was kept, and to nothing else.
    assert torch.equal(found["history"]["weights"][0] > 0, kept)
    scored = score_images(found, training_set.unlabelled_images)
    if arm != "free":  # has no opinion of images as such
        ranked = found["weighting"]["scores"].double().numpy()
        np.testing.assert_allclose(scored.scores, ranked, rtol=1e-5, atol=1e-6)


def test_the_second_stage_is_fixmatch_on_what_was_kept(training_set, run_config, tmp_path):
    found = TwoStageTrainer(run_config("pu")).fit(training_set, tmp_path / "two")
    kept = training_set.unlabelled_images[found["weighting"]["kept"].numpy()]
    alone = Trainer(run_config("fixmatch")).fit(
        replace(training_set, unlabelled_images=kept), tmp_path / "alone"
    )
    assert same(alone["classifier"], found["classifier"])


@pytest.mark.parametrize("arm", ["pu", "learned"])
@pytest.mark.parametrize("killed_at", [10, 30])
def test_a_killed_run_resumes_to_the_same_end(arm, killed_at, training_set, run_config, tmp_path):
    trainer = TwoStageTrainer(run_config(arm))
    whole = trainer.fit(training_set, tmp_path / "whole")

    fit_until_killed(trainer, training_set, tmp_path / "killed", killed_at)
    assert same(trainer.fit(training_set, tmp_path / "killed"), whole)


def test_an_old_ranking_is_not_taken_for_another_run(training_set, run_config, tmp_path):
    TwoStageTrainer(run_config("pu")).fit(training_set, tmp_path)
    other = TwoStageTrainer(run_config("pu", seed=7))
    again = other.fit(training_set, tmp_path)
    assert same(again, other.fit(training_set, tmp_path / "fresh"))


def test_the_best_of_each_pseudo_class_are_kept():
    scores = torch.linspace(0, 1, 100)
    classes = torch.tensor([0] * 60 + [1] * 40)  # all of class 1 score above all of class 0
    kept = keep_best(scores, classes, share=0.4, count=2)
    assert kept[:60].sum() == kept[60:].sum() == 20
    assert kept[40:60].all()
    assert kept[80:].all()


def test_a_class_with_few_images_keeps_them_all_and_gives_nothing_to_others():
    classes = torch.tensor([0] * 95 + [1] * 5)
    kept = keep_best(torch.rand(100), classes, share=0.5, count=2)
    assert kept[95:].all()
    assert kept[:95].sum() == 25


def first_stage(training_set, run_config, arm):
    """A first stage's checkpoint with an untrained classifier."""
    config = run_config(arm)
    n = len(training_set.unlabelled_images)
    classifier = build_classifier("small_cnn", 1, config.classes, 0, config.training.width)
    state = {"influence": torch.zeros(n), "evidence": torch.zeros(n), "cut": None}
    checkpoint = {
        "classifier": classifier.state_dict(),
        "weighting": state,
        "config": asdict(config),
    }
    return config, classifier, checkpoint


def test_a_free_weight_that_was_never_measured_is_no_recommendation(training_set, run_config):
    _, _, first = first_stage(training_set, run_config, "free")
    measured = torch.arange(40) < 16
    scores = torch.ones(40)
    scores[:8], scores[8:16] = 0.7, 0.3
    first["weighting"] |= {"pool_scores": scores, "evidence": measured.float()}
    found = rank_pool(first, training_set, run_config("free"))
    assert found.cut == pytest.approx(0.5)
    assert torch.equal(found.scores > found.cut, scores == 0.7)
    assert (found.scores[16:] == found.cut).all()
    classes = score_images(first, training_set.unlabelled_images).probabilities.argmax(axis=1)
    best = keep_best(found.scores, torch.from_numpy(classes), 8 / 40, 3)
    assert torch.equal(found.kept, best)


@pytest.mark.parametrize("arm", ["free", "inlier"])
def test_a_pool_of_which_nothing_is_known_is_kept_whole(arm, training_set, run_config, tmp_path):
    # Without an update of the weights in the first stage.
    config = run_config(arm, weighing={"interval": 1000})
    assert TwoStageTrainer(config).fit(training_set, tmp_path)["weighting"]["kept"].all()


def test_a_damaged_ranking_names_its_file_and_the_cure(training_set, run_config, tmp_path):
    trainers = (TwoStageTrainer(run_config("pu")), RoundsTrainer(run_config("pu"), 3))
    for trainer, place in zip(trainers, ("two", "rounds/round_1"), strict=True):
        trainer.fit(training_set, tmp_path / place.partition("/")[0])
        path = tmp_path / place / "ranking.pt"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match=r"ranking\.pt is not a whole checkpoint; delete"):
            trainer.fit(training_set, tmp_path / place.partition("/")[0])


def test_influence_moves_the_head_and_none_leaves_it_a_pu_classifier(training_set, run_config):
    # Half of the pool is dark: chance would be nothing that a head could learn.
    pool = training_set.unlabelled_images.copy()
    pool[20:] //= 4
    training_set = replace(training_set, unlabelled_images=pool)
    liked = torch.arange(40) < 20
    config, classifier, first = first_stage(training_set, run_config, "learned")

    def scores(arm, state):
        head, _ = fit_head(classifier, state, training_set, replace(config, arm=arm))
        images = torch.from_numpy(training_set.unlabelled_images).float() / 255
        with torch.no_grad():
            return head(classifier.features(images))

    plain = scores("pu", {})
    torch.testing.assert_close(scores("learned", first["weighting"]), plain)
    influence = torch.where(liked, 1.0, -1.0)
    state = {"influence": influence, "evidence": torch.ones(40)}
    moved = scores("learned", state) - plain
    assert moved[liked].mean() > moved[~liked].mean() + 0.1


def like_and_unlike(likes, unlikes, labelled=12, seed=0):
    """Labelled images, and a pool of such that are like them and after these of noise."""
    rng = np.random.default_rng(seed)
    like = np.zeros((labelled + likes, 1, 8, 8), np.uint8)
    like[:, :, :, :4] = 200
    like = np.clip(like + rng.integers(0, 40, like.shape), 0, 255).astype(np.uint8)
    unlike = rng.integers(0, 256, (unlikes, 1, 8, 8), dtype=np.uint8)
    pool = np.concatenate([like[labelled:], unlike])
    return TrainingSet(like[:labelled], np.arange(labelled) % 3, pool)


@pytest.mark.parametrize(("level", "clean"), [(0.0, True), (0.05, False), (1.0, False)])
def test_the_head_tells_like_from_unlike(level, clean, run_config):
    data = like_and_unlike(48, 60)
    _, _, first = first_stage(data, run_config, "pu")
    ranking = rank_pool(first, data, run_config("pu", weighing={"contamination_level": level}))
    assert ranking.scores[:48].mean() > ranking.scores[48:].mean() + 0.2
    assert bool(ranking.kept.all()) == clean
    assert (ranking.cut == 0) == clean
    assert clean or 0 < ranking.cut < 1


def test_at_level_one_no_pool_is_clean(run_config, monkeypatch):
    data = like_and_unlike(48, 60)
    _, _, first = first_stage(data, run_config, "pu")
    monkeypatch.setattr("weighmatch.semisup.two_stages.clean_chance", lambda *_: 1.0)
    for level, clean in ((0.99, True), (1.0, False)):
        config = run_config("pu", weighing={"contamination_level": level})
        assert bool(rank_pool(first, data, config).kept.all()) == clean


def test_a_clean_pool_is_kept_whole(run_config):
    data = like_and_unlike(100, 0)
    _, _, first = first_stage(data, run_config, "pu")
    ranking = rank_pool(first, data, run_config("pu", weighing={"contamination_level": 0.05}))
    assert ranking.kept.all()


def test_few_clean_pools_and_all_contaminated_ones_look_contaminated():
    # Features that know nothing of labels.
    generator = torch.Generator().manual_seed(0)

    def chance(shift):
        labelled = torch.randn(18, 4, generator=generator) + shift * torch.tensor([1, -1, 0, 0])
        pool = torch.randn(1, 120, 4, generator=generator)
        return clean_chance(labelled.repeat(10, 1), torch.arange(18) % 3, pool, 3)

    # The level is nominal: folds that share images err together.
    clean = np.array([chance(0.0) for _ in range(30)])
    assert (clean < 0.05).mean() < 0.3
    assert 0.35 < clean.mean() < 0.65
    assert all(chance(2.0) < 0.05 for _ in range(5))


@pytest.mark.parametrize("labels_per_class", [2, 3, 5])
def test_few_labels_a_class_do_not_make_a_pool_look_clean(labels_per_class):
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(9, 32, generator=generator)
    labels = torch.arange(6).repeat(labels_per_class)

    def draw(classes):
        return means[classes] + torch.randn(len(classes), 32, generator=generator)

    def chance(seen):
        pool = torch.randint(6, (200,), generator=generator)
        pool[seen:] = torch.randint(6, 9, (200 - seen,), generator=generator)
        return clean_chance(draw(labels.repeat(8)), labels, draw(pool)[None], 6)

    assert 0.3 < np.mean([chance(200) for _ in range(20)]) < 0.8
    assert np.mean([chance(100) < 0.05 for _ in range(10)]) > 0.8


def test_where_a_class_has_one_labelled_image_no_pool_looks_clean():
    features = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    assert clean_chance(features, labels, features[None], 3) == 0.0


def test_as_many_are_kept_as_the_mlps_find_likely(run_config):
    data = like_and_unlike(48, 60)
    config, classifier, first = first_stage(data, run_config, "pu")
    images = torch.from_numpy(data.unlabelled_images).float() / 255

    def ranked(keep_above):
        weighing = replace(config.training.weighing, keep_above=keep_above)
        training = replace(config.training, weighing=weighing)
        return rank_pool(first, data, replace(config, training=training))

    found = ranked(0.5)
    head = ConfidenceHead(16 * config.training.width, config.classes, seed=0)
    head.load_state_dict(found.head)
    with torch.no_grad():
        features = classifier.features(images)
        likely = int((torch.sigmoid(head.members(features).mean(1)) > 0.5).sum())
        torch.testing.assert_close(torch.sigmoid(head(features)), found.scores)
    assert 20 < likely < 80
    assert int((found.scores > found.cut).sum()) == likely
    assert ranked(0.7).cut > found.cut > ranked(0.3).cut
    assert ranked(0.0).kept.all()


def test_two_stages_cost_more_and_fixmatch_is_matched_to_them(training_set, run_config):
    training = run_config().training
    (one,) = relative_costs(("learned",), 3, training, training_set)
    (two,) = relative_costs(("learned",), 3, training, training_set, stages=2)
    assert two > 1 + training.weighing.first_stage * one
    assert matched_steps(3, training, training_set, 2) == int(np.ceil(training.steps * two))
    assert relative_costs(("fixmatch",), 3, training, training_set, stages=2) == [1.0]


def test_jobs_of_both_schedules_are_told_apart(training_set, run_config, tmp_path):
    sets = {"seed_0003": vars(training_set)}
    jobs = make_jobs(("fixmatch", "pu"), sets, run_config().training, (1, 2))
    assert [(job.config.arm, job.stages, job.steps) for job in jobs] == [
        ("fixmatch", 1, 40),
        ("pu", 1, 40),
        ("pu", 2, 60),
    ]
    found = train_all(jobs, tmp_path, workers=1)
    assert [c["config"].get("stages", 1) for c in found.values()] == [1, 1, 2]
