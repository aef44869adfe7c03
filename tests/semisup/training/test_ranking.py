from dataclasses import replace

import numpy as np
import pytest
import torch

from weighmatch.arms import all_arms
from weighmatch.semisup import TrainingSet, build_classifier
from weighmatch.semisup.training import decision
from weighmatch.semisup.training.decision import keep_best
from weighmatch.semisup.training.judges import JUDGES, Known
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.training.online import train_online
from weighmatch.semisup.training.ranking import rank_pool
from weighmatch.semisup.weightings.head import ConfidenceHead


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


def rank(run, data, config):
    """The ranking of a run that was trained on the whole pool."""
    known = Known(torch.ones(data.pool_size, dtype=torch.bool), run.pool.measured)
    return rank_pool(run, known, data, config, config.seed)[0]


def test_a_free_weight_that_was_never_measured_is_no_recommendation(training_set, first_stage):
    config, first = first_stage(training_set, "free")
    known = torch.arange(40) < 16
    scores = torch.ones(40)
    scores[:8], scores[8:16] = 0.7, 0.3
    first.weighting["pool_scores"] = scores
    first.pool.measured.evidence = known.float()
    found = rank(first, training_set, config)
    assert found.cut == pytest.approx(0.5)
    assert torch.equal(found.scores > found.cut, scores == 0.7)
    assert (found.scores[16:] == found.cut).all()
    classes = first.score(training_set.unlabelled_images).probabilities.argmax(axis=1)
    best = keep_best(found.scores, torch.from_numpy(classes), 8 / 40, 3)
    assert torch.equal(found.kept, best)


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
    ranking = rank(first, data, run_config("pu", ranking={"contamination_level": level}))
    assert ranking.scores[:48].mean() > ranking.scores[48:].mean() + 0.2
    assert bool(ranking.kept.all()) == clean
    assert (ranking.cut == 0) == clean
    assert clean or 0 < ranking.cut < 1


def test_at_level_one_no_pool_is_clean(first_stage, run_config, monkeypatch):
    data = like_and_unlike(48, 60)
    _, first = first_stage(data, "pu")
    monkeypatch.setattr("weighmatch.semisup.training.judges.clean_chance", lambda *_: 1.0)
    for level, clean in ((0.99, True), (1.0, False)):
        config = run_config("pu", ranking={"contamination_level": level})
        assert bool(rank(first, data, config).kept.all()) == clean


def test_a_clean_pool_is_kept_whole(first_stage, run_config):
    data = like_and_unlike(100, 0)
    _, first = first_stage(data, "pu")
    ranking = rank(first, data, run_config("pu", ranking={"contamination_level": 0.05}))
    assert ranking.kept.all()


def test_copies_among_the_labelled_images_count_once(first_stage):
    data = like_and_unlike(48, 60)
    config, first = first_stage(data, "gate_prior")
    once = rank(first, data, config)
    twice = replace(
        data,
        labelled_images=np.concatenate([data.labelled_images, data.labelled_images[:7]]),
        labels=np.concatenate([data.labels, data.labels[:7]]),
    )
    again = rank(first, twice, config)
    assert torch.equal(again.scores, once.scores)
    assert again.evidence == once.evidence
    # The same image of another class is no copy.
    mixed = replace(twice, labels=np.concatenate([data.labels, (data.labels[:7] + 1) % 3]))
    assert not torch.equal(rank(first, mixed, config).scores, once.scores)


def test_as_many_are_kept_as_the_mlps_find_likely(first_stage):
    data = like_and_unlike(48, 60)
    config, first = first_stage(data, "pu")
    classifier = first.classifier
    images = torch.from_numpy(data.unlabelled_images).float() / 255

    found = rank(first, data, config)
    head = ConfidenceHead(16 * config.training.width, config.classes, seed=0)
    head.load_state_dict(found.head)
    with torch.no_grad():
        features = classifier.features(images)
        likely = int((torch.sigmoid(head.members(features).mean(1)) > 0.5).sum())
        torch.testing.assert_close(torch.sigmoid(head(features)), found.scores)
    assert 20 < likely < 80
    assert int((found.scores > found.cut).sum()) == likely
    assert found.evidence.share == pytest.approx(likely / len(images))


@pytest.mark.parametrize(("level", "warns"), [(0.2, True), (0.0, False), (1.0, False)])
def test_a_class_of_one_image_is_warned_of(
    level, warns, training_set, run_config, tmp_path, caplog
):
    decision._warn_of_single_labels.cache_clear()
    single = replace(
        training_set,
        labelled_images=training_set.labelled_images[:-3],
        labels=np.array([0, 1, 2, 0, 1, 0, 0, 1, 1]),
    )
    config = run_config("pu", ranking={"contamination_level": level})
    first = train_online(replace(config, arm="fixmatch"), single, tmp_path)
    torch.manual_seed(0)
    rank(first, single, config)
    rank(first, single, config)
    assert caplog.text.count("a single labelled image") == warns


def test_a_head_with_references_averages_over_the_pool_and_ranks_unseen_images(first_stage):
    data = like_and_unlike(48, 60)
    config, first = first_stage(data, "gate_prior")
    found = rank(first, data, config)
    head = ConfidenceHead.from_state(found.head, config.classes)
    alone = ConfidenceHead.from_state(
        {
            **found.head,
            "references": found.head["references"][:0],
            "reference_scores": torch.zeros(0),
        },
        config.classes,
    )
    with torch.no_grad():
        features = first.classifier.features(torch.from_numpy(data.unlabelled_images) / 255)
        torch.testing.assert_close(torch.sigmoid(head(features)), found.scores)
        own, together = alone(features), head(features)
        directions = torch.nn.functional.normalize(head.norm(features))
        near = (directions @ directions.half().float().T).topk(15, dim=1).indices
        torch.testing.assert_close(together, (own + own[near].sum(1)) / 16, rtol=1e-3, atol=1e-3)
    assert together.std() < own.std()


def test_the_true_share_is_kept_where_it_is_told(first_stage):
    data = replace(like_and_unlike(60, 60), useful_share=0.5)
    config, first = first_stage(data, "gate_told")
    found = rank(first, data, config)
    assert (found.evidence.share, found.evidence.level) == (0.5, 1.0)
    assert int((found.scores > found.cut).sum()) == 60
    whole = rank(first, replace(data, useful_share=1.0), config)
    assert whole.kept.all()
    with pytest.raises(ValueError, match="gate_told must be told"):
        rank(first, replace(data, useful_share=None), config)


def test_without_hypergradients_test_and_head_decide(first_stage):
    data = like_and_unlike(60, 60)
    config, first = first_stage(data, "gate_prior")
    evidence = rank(first, data, config).evidence
    assert 0.2 < evidence.share < 0.8
    assert evidence.p_clean < 0.2
    assert evidence.low < evidence.share < evidence.high


@pytest.mark.parametrize(("harmful", "clean"), [(True, False), (False, True)])
def test_hypergradients_say_whether_the_lower_half_does_harm(
    harmful, clean, first_stage, monkeypatch
):
    """The measured influence of the images that rank lowest decides, and nothing else."""
    data = like_and_unlike(60, 60)
    config, first = first_stage(data, "learned")
    ranking = replace(config.training.ranking, contamination_level=0.2)
    config = replace(config, training=replace(config.training, ranking=ranking))

    def influence(self, classifier, trained, images):
        low = images >= 60
        sign = -1.0 if harmful else 1.0
        return torch.where(low, sign, 1.0) + 0.01 * torch.randn(len(images))

    place = "weighmatch.semisup.weightings.meter.InfluenceMeter.measure_at"
    monkeypatch.setattr(place, influence)
    torch.manual_seed(0)
    found = rank(first, data, config)
    assert bool(found.kept.all()) == clean
    evidence = found.evidence
    assert (evidence.p_clean > 0.8) == clean
    assert 0 < evidence.low < evidence.share < evidence.high < 1


def test_every_judge_is_asked_by_an_arm_or_for_features():
    asked = {arm.judge for arm in all_arms()} - {"otsu"}
    assert asked | {"nearness"} == set(JUDGES)
