"""What a run refuses to be given, in a sentence with the cure."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from weighmatch.semisup import RoundsTrainer, Trainer, TrainingSet, TwoStageTrainer
from weighmatch.semisup.scoring import score_images
from weighmatch.semisup.two_stages import rank_pool

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
    assert Trainer(run_config("fixmatch", steps=1)).fit(data, tmp_path)["seconds"] > 0


@pytest.mark.parametrize("kind", ["one", "rounds"])
def test_labels_beyond_the_classes_are_refused(kind, training_set, run_config, tmp_path):
    config = replace(run_config("pu"), classes=2)
    trainer = Trainer(config) if kind == "one" else RoundsTrainer(config, 3)
    with pytest.raises(
        ValueError, match=r"labels go up to 2, .* RunConfig\.classes is 2; raise it"
    ):
        trainer.fit(training_set, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: replace(c, arm="lerned"), "arm 'lerned' is unknown; choose from supervised"),
        (lambda c: replace(c, steps=0), "steps must be an integer of at least 1, got 0"),
        (lambda c: replace(c, classes=2.0), "classes must be an integer of at least 1"),
        (lambda c: RoundsTrainer(replace(c, arm="free"), 3), "rounds.* choose from max_prob, pu"),
        (lambda c: RoundsTrainer(c, 0), "rounds must be an integer of at least 1, got 0"),
        (lambda c: TwoStageTrainer(replace(c, arm="oracle")), "two stages.* choose from max_prob"),
    ],
)
def test_runs_that_there_are_none_of_are_refused(make, message, run_config):
    with pytest.raises(ValueError, match=message):
        make(run_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images.astype(np.float32) / 255, "images must be uint8"),
        (lambda images: images[0], "images must be uint8"),
        (lambda images: images[:0], "images must have at least one image"),
        (lambda images: images.repeat(2, axis=3), "8 by 8, these are of 1, 8 by 16; convert or"),
        (lambda images: images.repeat(3, axis=1), "trained on images of 1 channel"),
    ],
)
def test_images_of_another_kind_are_not_scored(change, message, training_set, run_config, tmp_path):
    found = Trainer(run_config("fixmatch", steps=2)).fit(training_set, tmp_path)
    with pytest.raises(ValueError, match=message):
        score_images(found, change(training_set.unlabelled_images))


@pytest.mark.parametrize(("level", "warns"), [(0.2, True), (0.0, False), (1.0, False)])
def test_a_class_of_one_image_is_warned_of(
    level, warns, training_set, run_config, tmp_path, recwarn
):
    single = replace(
        training_set,
        labelled_images=training_set.labelled_images[:-3],
        labels=np.array([0, 1, 2, 0, 1, 0, 0, 1, 1]),
    )
    config = run_config("pu", weighing={"contamination_level": level})
    first = Trainer(replace(config, arm="fixmatch")).fit(single, tmp_path)
    torch.manual_seed(0)
    rank_pool(first, single, config)
    found = [str(warning.message) for warning in recwarn]
    assert any("a single labelled image" in message for message in found) == warns
