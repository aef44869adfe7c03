"""A trained classifier, a pool with noise, and what weightings are built from."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from weighmatch.semisup import TrainingConfig, build_classifier
from weighmatch.semisup.config import OPERATIONS
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams
from weighmatch.semisup.parts.views import make_views
from weighmatch.semisup.weightings import Context


@pytest.fixture
def classifier(training_set):
    """One that knows the labelled images."""
    network = build_classifier("small_cnn", 1, 3, seed=0, width=8)
    images = torch.from_numpy(training_set.labelled_images).float() / 255
    labels = torch.from_numpy(training_set.labels)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network


@pytest.fixture
def half_noise(training_set):
    """The pool with noise from image 20 on."""
    noise = np.random.default_rng(1).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    training_set.unlabelled_images[20:] = noise
    return training_set


@pytest.fixture
def make_context(training_set):
    """Makes what a weighting is built from."""

    def make(classifier=None, weighting=None, influence=None, pool=None):
        if classifier is None:
            classifier = build_classifier("small_cnn", 1, 3, seed=0, width=8)
        images = training_set.unlabelled_images if pool is None else pool
        labelled = torch.from_numpy(training_set.labelled_images)
        labels = torch.from_numpy(training_set.labels)
        training = TrainingConfig(
            threshold=0.1,
            device="cpu",
            augmentation={"operations": OPERATIONS, "cutout": 0.25},
            weighting={"width": 8, **(weighting or {})},
            influence=influence or {},
        )
        return Context(
            classifier,
            labelled,
            labels,
            (labelled, labels),
            ImageStore(images, torch.device("cpu")),
            3,
            make_views(training),
            training,
            Streams(0),
        )

    return make
