"""What the defaults learn, on tuning seeds: `uv run pytest -m slow` (about a minute)."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from weighmatch.data.config import DataConfig
from weighmatch.data.sources import load_digits, load_photographs, noise
from weighmatch.data.splits import make_splits
from weighmatch.semisup import RunConfig, Trainer, TrainingConfig, TrainingSet
from weighmatch.semisup.scoring import score_images

pytestmark = pytest.mark.slow

CONF = Path(__file__).parents[1] / "conf" / "base"


def defaults(file, group):
    return yaml.safe_load((CONF / file).read_text())[group]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Held-out images of seed 0, judged by each arm of the default settings."""
    data = DataConfig(**{**defaults("parameters_data.yml", "data"), "seeds": [0]})
    training = TrainingConfig(**defaults("parameters_training.yml", "training"))
    splits = make_splits(*load_digits(), load_photographs(), data, seed=0)
    is_id = splits.heldout.sources == 0
    results = {}
    for arm in ("supervised", "fixmatch", "learned", "oracle"):
        pool = splits.pool.images
        if arm == "oracle":
            pool = pool[splits.pool.sources == 0]
        trainer = Trainer(RunConfig(arm, 0, training.steps, 6, training))
        folder = tmp_path_factory.mktemp(arm)
        checkpoint = trainer.fit(TrainingSet(splits.labelled_images, splits.labels, pool), folder)
        result = score_images(checkpoint, splits.heldout.images)
        right = result.probabilities.argmax(axis=1) == splits.heldout.classes
        results[arm] = (100 * right[is_id].mean(), result)
    return results, is_id


def test_unlabelled_images_help_and_clean_ones_more(scored):
    accuracy = {arm: value for arm, (value, _) in scored[0].items()}
    assert accuracy["oracle"] > accuracy["fixmatch"] > 80
    assert accuracy["oracle"] > accuracy["supervised"] > 70


def test_learned_scores_tell_new_intruders_apart(scored):
    results, is_id = scored
    _, learned = results["learned"]
    assert roc_auc_score(is_id, learned.scores) > 0.7
    assert learned.weights[is_id].mean() > 1.2
    assert learned.weights[~is_id].mean() < 0.8


def test_the_wide_resnet_trains_with_learned_weights(tmp_path):
    rng = np.random.default_rng(0)
    data = TrainingSet(
        noise(8, 32, 3, rng), np.arange(8, dtype=np.int64) % 2, noise(32, 32, 3, rng)
    )
    small = {"interval": 3, "outer_batch": 8, "curvature_batch": 4, "influence_batch": 8}
    training = TrainingConfig(
        network="wrn_28_2",
        batch_size=4,
        unlabelled_ratio=2,
        threshold=0.1,
        snapshots=1,
        augmentation={"flip": True},
        weighing={**small, "fit_batch": 8, "warmup": 0.0},
    )
    config = RunConfig("learned", 0, 6, 2, training)
    result = Trainer(config).fit(data, tmp_path)
    assert all(np.isfinite(value) for line in result["metrics"] for value in line.values())
    assert result["history"]["weights"].shape == (1, 32)
