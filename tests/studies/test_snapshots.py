import dataclasses
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from weighmatch.data.sources.digits import load_digits
from weighmatch.semisup import TrainingSet
from weighmatch.semisup.parts.streams import Streams
from weighmatch.studies import snapshots
from weighmatch.studies.snapshot_config import SnapshotConfig
from weighmatch.studies.snapshots import SnapshotProblem, draw_splits, influence_quality, train

pytestmark = pytest.mark.integration

SMALL = SnapshotConfig(
    seeds=(0,),
    pool_size=60,
    steps=40,
    stages=(0.5, 1.0),
    dampings=(1.0, 0.01),
    products=5,
    copies=4,
    draws=2,
    curvature_batch=8,
    width=4,
    threshold=0.4,
)


@pytest.fixture(scope="module")
def table():
    return influence_quality(*load_digits(), SMALL, seed=0)


@pytest.fixture(scope="module")
def problem():
    splits = draw_splits(*load_digits(), SMALL.data(0), 0)
    data = TrainingSet(splits.labelled_images, splits.labels, splits.pool.images)
    first, last = train(data, SMALL, 6, seed=0)
    assert (first.step, last.step) == (20, 40)
    assert not torch.equal(first.classifier.head.weight, last.classifier.head.weight)
    return partial(SnapshotProblem, last.classifier, data, seed=0)


def test_the_table_has_a_row_a_snapshot_damping_solver_and_score(table):
    keys = ["stage", "damping_ratio", "solver", "score"]
    assert not table.duplicated(keys).any()
    found = set(table[keys[:3]].itertuples(index=False, name=None))
    expected = {(s, d, m) for s in (0.5, 1.0) for d in (0, 0.01, 1) for m in ("exact", "cg5")}
    assert found == expected | {(0.5, math.inf, "identity"), (1.0, math.inf, "identity")}
    assert set(table["score"]) == {"dot", "cosine"}
    assert dict(zip(table["stage"], table["step"], strict=True)) == {0.5: 20, 1.0: 40}
    assert table["auroc"].between(0, 1).all()
    # The copies are of two points of the training.
    assert table.groupby("stage")["outer_loss"].first().nunique() == 2


def test_two_calls_give_the_same_numbers_and_another_seed_others(table):
    pd.testing.assert_frame_equal(influence_quality(*load_digits(), SMALL, seed=0), table)
    other = influence_quality(*load_digits(), SMALL, seed=1)
    assert not np.allclose(other["outer_loss"], table["outer_loss"])


def test_the_truth_about_ood_is_read_for_the_auroc_alone(table, monkeypatch):
    def swapped(*args):
        splits = draw_splits(*args)
        truth = splits.pool.kinds[::-1].copy()
        # No class: nothing may know that either.
        pool = dataclasses.replace(splits.pool, kinds=truth, classes=np.full(len(truth), -1))
        return dataclasses.replace(splits, pool=pool)

    monkeypatch.setattr(snapshots, "draw_splits", swapped)
    found = influence_quality(*load_digits(), SMALL, seed=0)
    judged = [name for name in table.columns if name.startswith("auroc")]
    pd.testing.assert_frame_equal(found.drop(columns=judged), table.drop(columns=judged))
    for name in judged:
        assert not np.allclose(found[name], table[name])


def test_the_factor_is_that_of_the_curvature(problem):
    made = problem(config=SMALL)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(made.rhs), 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(made.factor @ (made.factor.T @ vectors), made.curvature @ vectors)
    assert (made.factor.norm(dim=0) > 0).sum() > 6 * SMALL.curvature_batch  # pool images too


def test_exact_directions_solve_their_systems_and_cg_reaches_them_with_enough_products(problem):
    short = problem(config=SMALL)
    largest = float(torch.linalg.eigvalsh(short.factor.T @ short.factor)[-1])
    for direction in short.directions():
        if direction.solver == "exact":
            damping = 5e-4 + direction.damping_ratio * largest
            left = short.curvature @ direction.value + damping * direction.value
            torch.testing.assert_close(left, short.rhs, rtol=1e-7, atol=1e-9)
    long = problem(config=dataclasses.replace(SMALL, products=300))
    by_budget = [
        {d.damping_ratio: d for d in found.directions() if d.solver.startswith("cg")}
        for found in (short, long)
    ]
    exact = {d.damping_ratio: d.value for d in long.directions() if d.solver == "exact"}
    assert by_budget[0][0.0].cosine_to_exact < 0.999
    for ratio, direction in by_budget[1].items():
        assert direction.solver == "cg300"
        assert direction.cosine_to_exact == pytest.approx(1, abs=1e-9)
        torch.testing.assert_close(direction.value, exact[ratio], rtol=1e-5, atol=1e-7)


def test_without_curvature_the_influence_is_the_product_of_two_gradients(problem):
    made = problem(config=dataclasses.replace(SMALL, draws=1))
    identity = made.directions()[-1]
    scores = made.scores([identity.value])
    noise = Streams(0)["snapshots: influence"]
    weak = made.augmentation.weak(made.pool, noise)
    strong = made.augmentation.strong(made.pool, noise)
    confidence, labels = made.classifier(weak).softmax(dim=1).max(dim=1)
    leaves = list(made.classifier.parameters())
    losses = F.cross_entropy(made.classifier(strong), labels, reduction="none")
    losses = losses * (confidence >= SMALL.threshold)
    gradients = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, retain_graph=True)])
            for loss in losses
        ]
    )
    expected = gradients @ (made.rhs / made.rhs.norm()).float()
    torch.testing.assert_close(scores.dot[0], expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(scores.counted, confidence >= SMALL.threshold)
    assert 0 < int(scores.counted.sum()) < len(made.pool)
    # The norm of the head's weights' gradient: the last but one of the parameters.
    head = leaves[-2].numel()
    norms = gradients[:, -head - 6 : -6].norm(dim=1)[scores.counted]
    ratio = scores.dot[0][scores.counted] / norms
    torch.testing.assert_close(scores.cosine[0][scores.counted], ratio, rtol=1e-3, atol=1e-5)


def test_an_image_counts_that_is_confident_in_one_draw(problem):
    made = problem(config=dataclasses.replace(SMALL, draws=3))
    scores = made.scores([made.rhs])
    assert torch.equal(scores.counted, scores.dot[0] != 0)
    once = problem(config=dataclasses.replace(SMALL, draws=1)).scores([made.rhs])
    assert int(once.counted.sum()) < int(scores.counted.sum())


def test_a_step_on_an_image_of_positive_influence_lowers_the_outer_loss(problem):
    made = problem(config=dataclasses.replace(SMALL, draws=1))
    found = made.scores([made.directions()[-1].value]).dot[0]
    noise = Streams(0)["snapshots: influence"]
    weak = made.augmentation.weak(made.pool, noise)
    strong = made.augmentation.strong(made.pool, noise)
    labels = made.classifier(weak).argmax(dim=1)
    views = made.augmentation.strong(
        made.labelled.repeat(SMALL.copies, 1, 1, 1), Streams(0)["snapshots: outer loss"]
    )
    names = [name for name, _ in made.classifier.named_parameters()]
    leaves = list(made.classifier.parameters())

    def outer_after_step_on(image):
        loss = F.cross_entropy(made.classifier(strong[[image]]), labels[[image]])
        gradients = torch.autograd.grad(loss, leaves)
        moved = [(p - 1e-3 * g).detach() for p, g in zip(leaves, gradients, strict=True)]
        logits = functional_call(made.classifier, dict(zip(names, moved, strict=True)), (views,))
        return float(F.cross_entropy(logits, made.labels.repeat(SMALL.copies)))

    best, worst = int(found.argmax()), int(found.argmin())
    assert found[best] > 0 > found[worst]
    assert outer_after_step_on(best) < made.outer_loss < outer_after_step_on(worst)


def test_images_that_never_count_rank_nothing():
    config = dataclasses.replace(SMALL, threshold=0.9999, steps=2, stages=(1.0,))
    table = influence_quality(*load_digits(), config, seed=0)
    assert (table["auroc"] == 0.5).all()
    assert table["auroc_counted"].isna().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": ()}, "seeds must be a list"),
        ({"labels_per_class": 0}, "labels_per_class must be an integer of at least 1"),
        ({"labels_per_class": 170}, "labels_per_class or .*pool_size does not fit the digits"),
        ({"pool_size": 1500}, "labels_per_class or .*pool_size does not fit the digits"),
        ({"steps": 0}, "steps must be an integer"),
        ({"stages": (0.0,)}, "stages must be a number above 0 and at most 1"),
        ({"stages": 0.5}, "stages must be a list of different values"),
        ({"dampings": (0.1, 0.1)}, "dampings must be a list of different values"),
        ({"dampings": (0.0,)}, "dampings must be a number above 0"),
        ({"products": 1}, "products must be an integer of at least 2"),
        ({"copies": 1.5}, "copies must be an integer"),
        ({"draws": 0}, "draws must be an integer"),
        ({"curvature_batch": 0}, "curvature_batch must be an integer"),
        ({"width": 6}, "width must be a multiple of 4"),
        ({"threshold": 1.0}, "threshold must be a number above 0 and below 1"),
    ],
)
def test_bad_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=rf"meta_learning_analysis\.snapshots\.{message}"):
        dataclasses.replace(SMALL, **wrong)
