"""What the defaults learn, on tuning seeds: `uv run pytest -m slow` (about two minutes)."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from weighmatch.arms import get_arm
from weighmatch.data.config import DataConfig
from weighmatch.data.source import get_source
from weighmatch.semisup import RunConfig, RunsConfig, TrainingConfig, TrainingSet, make_schedule
from weighmatch.semisup.config import OPERATIONS

pytestmark = pytest.mark.slow

CONF = Path(__file__).parents[1] / "conf" / "base"


def defaults(file, group):
    """What the configuration of the project sets; the rest are the defaults of the code."""
    return yaml.safe_load((CONF / file).read_text())[group]


SEEDS = (0, 1, 2)
ROUNDS = RunsConfig(**defaults("parameters_training.yml", "runs")).rounds


def noise(n, size, channels):
    return np.random.default_rng(0).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


def judged(arm, seed, folder, schedule="online", rounds=1):
    """Held-out images judged by an arm of the default settings, and which are in-distribution."""
    data = DataConfig(**{**defaults("parameters_data.yml", "data"), "seeds": [seed]})
    training = TrainingConfig(**defaults("parameters_training.yml", "training"))
    source = get_source(data.source)
    splits = source.draw(source.load(data), data, seed)
    pool = splits.pool.images
    if get_arm(arm).pool == "clean":
        pool = pool[splits.pool.kinds == 0]
    config = RunConfig(arm, seed, training.steps, data.classes, training, schedule, rounds)
    train_set = TrainingSet(splits.labelled_images, splits.labels, pool)
    result = make_schedule(config).fit(train_set, folder).score(splits.heldout.images)
    is_id = splits.heldout.kinds == 0
    right = result.probabilities.argmax(axis=1) == splits.heldout.classes
    return 100 * right[is_id].mean(), result, is_id


def test_unlabelled_images_help_and_clean_ones_more(tmp_path):
    accuracy = {
        arm: np.mean([judged(arm, seed, tmp_path / f"{arm}{seed}")[0] for seed in SEEDS])
        for arm in ("supervised", "fixmatch", "oracle")
    }
    assert accuracy["oracle"] > accuracy["fixmatch"] > 80
    assert accuracy["oracle"] > accuracy["supervised"] > 70


@pytest.mark.parametrize(
    ("schedule", "rounds", "auroc"), [("online", 1, 0.7), ("rounds", ROUNDS, 0.85)]
)
def test_learned_scores_tell_new_intruders_apart(schedule, rounds, auroc, tmp_path):
    aurocs, inside, outside = [], [], []
    for seed in SEEDS:
        _, learned, is_id = judged("learned", seed, tmp_path / str(seed), schedule, rounds)
        aurocs.append(roc_auc_score(is_id, learned.scores))
        inside.append(learned.weights[is_id].mean())
        outside.append(learned.weights[~is_id].mean())
    # One seed may fall below: what is claimed is claimed of means.
    assert np.mean(aurocs) > auroc
    assert np.mean(inside) > 1.2
    assert np.mean(outside) < 0.8


def test_the_wide_resnet_trains_with_learned_weights(tmp_path):
    images = noise(40, 32, 3)
    data = TrainingSet(images[:8], np.arange(8, dtype=np.int64) % 2, images[8:])
    training = TrainingConfig(
        network="wrn_28_2",
        batch_size=4,
        unlabelled_ratio=2,
        threshold=0.1,
        snapshots=1,
        augmentation={"flip": True, "operations": OPERATIONS},
        weighting={"interval": 3, "fit_batch": 8, "warmup": 0.0},
        influence={"outer_batch": 8, "curvature_batch": 4, "batch": 8},
    )
    config = RunConfig("learned", 0, 6, 2, training)
    result = make_schedule(config).fit(data, tmp_path)
    assert all(np.isfinite(value) for line in result.log for value in line.values())
    assert result.history.weights.shape == (1, 32)
