"""What a run refuses to be given, in a sentence with the cure."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from weighmatch.arms import SCHEDULES
from weighmatch.semisup import RunConfig, TrainingConfig, TrainingSet, make_schedule
from weighmatch.semisup.training.config import fingerprint, pick_device
from weighmatch.semisup.training.online import train_online

IMAGES = np.zeros((4, 1, 8, 8), np.uint8)
LABELS = np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled_images": IMAGES[:, 0]}, "labelled_images must be uint8 .* with 1 or 3 chan"),
        ({"labelled_images": IMAGES.transpose(0, 2, 3, 1)}, "move the channels to the second"),
        ({"unlabelled_images": IMAGES.repeat(4, 1)}, r"unlabelled_images .* shape \(4, 4, 8, 8\)"),
        ({"unlabelled_images": IMAGES / 255}, "unlabelled_images must be uint8 .* got float64"),
        ({"unlabelled_images": IMAGES[:0]}, "unlabelled_images must have at least one image"),
        ({"labelled_images": IMAGES[:0]}, "labelled_images must have at least one image"),
        ({"unlabelled_images": IMAGES.repeat(3, 1)}, "resize or convert them to the same"),
        ({"unlabelled_images": IMAGES[..., :6]}, "resize or convert them to the same"),
        ({"labels": LABELS[:3]}, "one for each of the 4 labelled images"),
        ({"labels": np.eye(4, dtype=int)}, r"got int64 of shape \(4, 4\)"),
        ({"labels": LABELS / 1}, "labels must be whole numbers from 0"),
        ({"labels": LABELS - 1}, "number the classes from 0"),
    ],
)
def test_data_that_are_no_training_set_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingSet(
            **{
                "labelled_images": IMAGES,
                "labels": LABELS,
                "unlabelled_images": IMAGES,
                **changes,
            }
        )


def test_labels_of_any_integers_and_images_read_backwards_are_taken(run_config, tmp_path):
    data = TrainingSet(IMAGES[::-1], LABELS.astype(np.uint8), IMAGES[..., ::-1])
    assert data.labels.dtype == np.int64
    assert train_online(run_config("fixmatch", steps=1), data, tmp_path).seconds > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_labels_beyond_the_classes_are_refused(schedule, training_set, run_config, tmp_path):
    config = replace(run_config("pu", schedule=schedule, rounds=3), classes=2)
    with pytest.raises(
        ValueError, match=r"labels go up to 2, .* RunConfig\.classes is 2; raise it"
    ):
        make_schedule(config).fit(training_set, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: replace(c, arm="lerned"), "arm 'lerned' is unknown; choose from supervised"),
        (lambda c: replace(c, steps=0), "steps must be an integer of at least 1, got 0"),
        (lambda c: replace(c, classes=2.0), "classes must be an integer of at least 1"),
        (
            lambda c: replace(c, arm="free", schedule="rounds", rounds=3),
            "the arm free cannot be trained in the schedule rounds; choose from online, two_stages",
        ),
        (lambda c: replace(c, rounds=0), "rounds must be an integer of at least 1, got 0"),
        (
            lambda c: replace(c, arm="oracle", schedule="two_stages"),
            "the arm oracle cannot be trained in the schedule two_stages; choose from online",
        ),
        (lambda c: replace(c, schedule="twice"), "schedule 'twice' is unknown; choose from online"),
        (lambda c: replace(c, seed=-1), "seed must be an integer of at least 0, got -1"),
    ],
)
def test_runs_that_there_are_none_of_are_refused(make, message, run_config):
    with pytest.raises(ValueError, match=message):
        make(run_config())


def test_the_fingerprint_sees_data_seed_configuration_and_code(training_set, run_config):
    prints = {
        fingerprint(run_config(), training_set),
        fingerprint(run_config(seed=1), training_set),
    }
    prints.add(fingerprint(run_config(learning_rate=0.01), training_set))
    images = training_set.unlabelled_images.copy()
    images[0, 0, 0, 0] ^= 1
    changed = replace(training_set, unlabelled_images=images)
    prints.add(fingerprint(run_config(), changed))
    prints.add(fingerprint(replace(run_config(), code="another"), training_set))
    assert len(prints) == 5
    assert fingerprint(run_config(), training_set) in prints


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="set it to auto or cpu"):
        pick_device("cuda")


def test_more_rounds_than_steps_are_refused(run_config):
    with pytest.raises(ValueError, match=r"training\.steps 40 are fewer than 41 rounds"):
        run_config("pu", schedule="rounds", rounds=41)


def test_a_configuration_survives_being_written(run_config):
    config = run_config("learned", schedule="rounds", rounds=3, weighting={"weights": "soft"})
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_classes_are_those_of_the_names_where_there_are_any():
    assert TrainingSet(IMAGES, LABELS, IMAGES).classes == 2
    named = TrainingSet(IMAGES, LABELS, IMAGES, ("a", "b", "never seen"))
    assert named.classes == 3
    assert fingerprint_of(named) != fingerprint_of(replace(named, class_names=("a", "b", "c")))
    with pytest.raises(ValueError, match="class_names has 1 names, but labels go up to 1; give"):
        TrainingSet(IMAGES, LABELS, IMAGES, ("a",))


def fingerprint_of(data):
    return fingerprint(RunConfig("pu", 0, 1, 3, TrainingConfig(), code=""), data)
