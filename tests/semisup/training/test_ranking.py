from dataclasses import replace

import numpy as np
import pytest
import torch

from weighmatch.semisup import TrainingSet, build_classifier
from weighmatch.semisup.training.decision import keep_best
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.training.online import train_online
from weighmatch.semisup.training.ranking import fit_head, rank_pool
from weighmatch.semisup.weightings.head import ConfidenceHead
from weighmatch.semisup.weightings.meter import Measured


@pytest.fixture
def first_stage(run_config, tmp_path):
    """Makes a configuration and a first stage's run of it with an untrained classifier."""

    def make(data, arm):
        config = run_config(arm)
        run = Run(config, data, tmp_path / arm).result()
        run.classifier = build_classifier(
            "small_cnn", 1, config.classes, 0, config.training.width
        ).eval()
        return config, run

    return make


def test_a_free_weight_that_was_never_measured_is_no_recommendation(training_set, first_stage):
    config, first = first_stage(training_set, "free")
    known = torch.arange(40) < 16
    scores = torch.ones(40)
    scores[:8], scores[8:16] = 0.7, 0.3
    first.weighting["pool_scores"] = scores
    first.pool.measured.evidence = known.float()
    found = rank_pool(first, first.pool.measured, training_set, config)
    assert found.cut == pytest.approx(0.5)
    assert torch.equal(found.scores > found.cut, scores == 0.7)
    assert (found.scores[16:] == found.cut).all()
    classes = first.score(training_set.unlabelled_images).probabilities.argmax(axis=1)
    best = keep_best(found.scores, torch.from_numpy(classes), 8 / 40, 3)
    assert torch.equal(found.kept, best)


def test_influence_moves_the_head_and_none_leaves_it_a_pu_classifier(training_set, first_stage):
    # Half of the pool is dark: chance would be nothing that a head could learn.
    pool = training_set.unlabelled_images.copy()
    pool[20:] //= 4
    training_set = replace(training_set, unlabelled_images=pool)
    liked = torch.arange(40) < 20
    config, first = first_stage(training_set, "learned")

    def scores(arm, measured):
        own = replace(config, arm=arm)
        head, *_ = fit_head(first.classifier, measured, training_set, own)
        images = torch.from_numpy(training_set.unlabelled_images).float() / 255
        with torch.no_grad():
            return head(first.classifier.features(images))

    plain = scores("pu", None)
    torch.testing.assert_close(scores("learned", first.pool.measured), plain)
    influence = torch.where(liked, 1.0, -1.0)
    measured = Measured(influence, influence.square(), torch.ones(40))
    moved = scores("learned", measured) - plain
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
def test_the_head_tells_like_from_unlike(level, clean, first_stage, run_config):
    data = like_and_unlike(48, 60)
    _, first = first_stage(data, "pu")
    ranking = rank_pool(first, None, data, run_config("pu", ranking={"contamination_level": level}))
    assert ranking.scores[:48].mean() > ranking.scores[48:].mean() + 0.2
    assert bool(ranking.kept.all()) == clean
    assert (ranking.cut == 0) == clean
    assert clean or 0 < ranking.cut < 1


def test_at_level_one_no_pool_is_clean(first_stage, run_config, monkeypatch):
    data = like_and_unlike(48, 60)
    _, first = first_stage(data, "pu")
    monkeypatch.setattr("weighmatch.semisup.training.ranking.clean_chance", lambda *_: 1.0)
    for level, clean in ((0.99, True), (1.0, False)):
        config = run_config("pu", ranking={"contamination_level": level})
        assert bool(rank_pool(first, None, data, config).kept.all()) == clean


def test_a_clean_pool_is_kept_whole(first_stage, run_config):
    data = like_and_unlike(100, 0)
    _, first = first_stage(data, "pu")
    ranking = rank_pool(first, None, data, run_config("pu", ranking={"contamination_level": 0.05}))
    assert ranking.kept.all()


def test_as_many_are_kept_as_the_mlps_find_likely(first_stage):
    data = like_and_unlike(48, 60)
    config, first = first_stage(data, "pu")
    classifier = first.classifier
    images = torch.from_numpy(data.unlabelled_images).float() / 255

    def ranked(keep_above):
        ranking = replace(config.training.ranking, keep_above=keep_above)
        training = replace(config.training, ranking=ranking)
        return rank_pool(first, None, data, replace(config, training=training))

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


@pytest.mark.parametrize(("level", "warns"), [(0.2, True), (0.0, False), (1.0, False)])
def test_a_class_of_one_image_is_warned_of(
    level, warns, training_set, run_config, tmp_path, recwarn
):
    single = replace(
        training_set,
        labelled_images=training_set.labelled_images[:-3],
        labels=np.array([0, 1, 2, 0, 1, 0, 0, 1, 1]),
    )
    config = run_config("pu", ranking={"contamination_level": level})
    first = train_online(replace(config, arm="fixmatch"), single, tmp_path)
    torch.manual_seed(0)
    rank_pool(first, None, single, config)
    found = [str(warning.message) for warning in recwarn]
    assert any("a single labelled image" in message for message in found) == warns
