"""Tiny data and settings that many tests share."""

import numpy as np
import pytest
import torch

from weighmatch.semisup import RunConfig, TrainingConfig, TrainingSet
from weighmatch.semisup.config import OPERATIONS

# Tiny tensors gain nothing from threads, and lose much where a core is busy with something else.
torch.set_num_threads(1)


@pytest.fixture
def training_set():
    """12 labelled and 40 unlabelled grey 8×8 images of three easy classes."""
    rng = np.random.default_rng(0)

    def draw(labels):
        images = rng.integers(0, 60, (len(labels), 1, 8, 8), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[0, 2 * label : 2 * label + 3] += 180
        return images

    labels = np.arange(12, dtype=np.int64) % 3
    pool = draw(np.arange(40) % 3)
    return TrainingSet(draw(labels), labels, pool, useful_share=0.5)


@pytest.fixture
def run_config():
    """Makes the configuration of a short run."""

    def make(
        arm="learned",
        seed=0,
        steps=40,
        schedule="online",
        rounds=1,
        weighting=None,
        influence=None,
        ranking=None,
        **training,
    ):
        settings = {
            "width": 8,
            "batch_size": 6,
            "unlabelled_ratio": 2,
            "threshold": 0.4,
            "snapshots": 2,
            "checkpoint_every": 10,
            "device": "cpu",
            "augmentation": {"operations": OPERATIONS},
        }
        weigh = {"width": 8, "interval": 5, "fit_batch": 12}
        measure = {"max_products": 4, "outer_batch": 12, "curvature_batch": 8, "batch": 12}
        # So few images can look clean by chance; here what follows a ranking is tested.
        rank = {"steps": 60, "batch": 12, "contamination_level": 1.0}
        groups = {
            "weighting": {**weigh, **(weighting or {})},
            "influence": {**measure, **(influence or {})},
            "ranking": {**rank, **(ranking or {})},
        }
        config = TrainingConfig(steps=steps, **{**settings, **groups, **training})
        return RunConfig(arm, seed, steps, 3, config, schedule, rounds)

    return make
