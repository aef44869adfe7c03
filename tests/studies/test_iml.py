"""IML training: what each setting is said to do."""

from dataclasses import replace

import pytest
import torch

from weighmatch.data.sources import load_digits
from weighmatch.implicit import flatten
from weighmatch.studies.iml import IHVPS, OTHERS, Training, gradient_memory, train
from weighmatch.studies.problems import PROBLEMS, Size

IMAGES, LABELS = load_digits()
SIZE = Size(inner=40, outer=40, test=60, hidden=3)
SHORT = Training(outer_steps=3, inner_steps=4, budget=8)


def make(name="example_weights", size=SIZE, seed=0):
    kind = PROBLEMS[name]
    return kind(kind.draw(IMAGES, LABELS, size, seed), size, seed)


@pytest.mark.parametrize("method", [*IHVPS, *OTHERS])
def test_every_method_trains(method):
    rows = train(make(), replace(SHORT, method=method, curvature="gauss_newton"), 0)
    assert [row["outer_step"] for row in rows] == [0, 1, 2, 3]
    assert not rows[-1]["diverged"]
    costs = [row["cost"] for row in rows]
    assert costs == sorted(costs)


def test_two_trainings_are_the_same_to_the_bit_and_the_seed_draws_the_batches():
    training = replace(SHORT, batch=10, shared_batch=False)
    one, same, other = (train(make(), training, seed) for seed in (0, 0, 1))
    assert [row["outer_loss"] for row in one] == [row["outer_loss"] for row in same]
    assert one[-1]["outer_loss"] != other[-1]["outer_loss"]


def test_without_outer_learning_more_steps_only_train_on():
    rows = train(make(), replace(SHORT, method="none", outer_steps=40), 0)
    assert rows[-1]["inner_loss"] < rows[0]["inner_loss"]
    assert rows[-1]["inner_gradient"] < rows[0]["inner_gradient"]


def test_the_outer_loss_falls_with_exact_hypergradients_at_convergence():
    convex = replace(SIZE, hidden=0)
    training = Training(method="exact", damping=0.0, converge=True, outer_steps=8)
    rows = train(make(size=convex), training, 0)
    losses = [row["outer_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert max(row["inner_gradient"] for row in rows) < 1e-5


@pytest.mark.parametrize(
    ("method", "least"), [("exact", 1 - 1e-9), ("conjugate_gradient", 0.9999), ("unrolled", 0.99)]
)
def test_at_convergence_good_methods_agree_with_the_exact_one(method, least):
    convex = replace(SIZE, hidden=0, l2=0.1)
    training = Training(
        method=method,
        damping=0.0,
        converge=True,
        outer_steps=1,
        budget=60,
        diagnose=1,
        retrain=True,
        automatic_step=False,
    )
    first = train(make(size=convex), training, 0)[0]
    assert first["cosine"] > least
    assert 0 <= first["low_share"] <= 1
    assert first["smallest_eigenvalue"] == pytest.approx(0.1, rel=1e-6)
    assert first["retrained_accuracy"] == pytest.approx(first["test_accuracy"])


def test_identity_is_worse_than_conjugate_gradients():
    convex = replace(SIZE, hidden=0)
    cosines = {}
    for method in ("identity", "conjugate_gradient"):
        training = Training(method=method, converge=True, outer_steps=1, diagnose=1)
        cosines[method] = train(make(size=convex), training, 0)[0]["cosine"]
    assert cosines["identity"] < cosines["conjugate_gradient"] - 0.05


def test_a_step_that_is_too_long_diverges_and_an_automatic_one_does_not():
    size = replace(SIZE, l2=1.0)
    long = replace(SHORT, step=30.0, automatic_step=False, outer_steps=20)
    rows = train(make("weight_decay", size), long, 0)
    assert rows[-1]["diverged"]
    assert len(rows) < 21
    assert "test_accuracy" not in rows[-1]
    rows = train(make("weight_decay", size), replace(long, automatic_step=True), 0)
    assert not rows[-1]["diverged"]
    assert max(row["step_sharpness"] for row in rows) <= 1 + 1e-9


def test_a_bound_holds_and_clipping_shortens_a_plain_step():
    seen = []
    problem = make("weight_decay")
    original = problem.decay
    problem.decay = lambda hyper: seen.append(flatten(hyper).detach().clone()) or original(hyper)
    start = flatten(problem.hyperparameters())
    training = replace(SHORT, curvature="gauss_newton", outer_steps=4)
    train(problem, replace(training, outer_rate=5.0, bound=0.5), 0)
    furthest = max(float((h - start).abs().max()) for h in seen)
    assert furthest == pytest.approx(0.5)
    plain = replace(training, outer_rule="sgd", outer_rate=1.0, outer_steps=1)
    lengths = []
    for settings in ({}, {"clip": 1e-4}, {"normalise": True}, {"clip": 1e6}):
        seen.clear()
        train(problem, replace(plain, **settings), 0)
        lengths.append(float((seen[-1] - start).norm()))
    assert lengths[0] > 1e-4
    assert lengths[1:] == pytest.approx([1e-4, 1.0, lengths[0]], rel=1e-6)


def test_normalised_statistics_move_in_products_only_where_they_are_not_frozen():
    size = replace(SIZE, normalised=True)
    means = {}
    for frozen in (True, False):
        problem = make(size=size)
        train(problem, replace(SHORT, frozen_statistics=frozen, outer_steps=1), 0)
        buffers = dict(problem.network.named_buffers())
        means[frozen] = int(buffers["1.num_batches_tracked"])
    # Twice four inner steps, and nothing else.
    assert means[True] == 8
    assert means[False] > 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions_train_and_are_diagnosed_in_double(dtype):
    kind = PROBLEMS["example_weights"]
    digits = kind.draw(IMAGES, LABELS, SIZE, 0)
    low = kind(digits.to(getattr(torch, dtype)), SIZE, 0)
    rows = train(low, replace(SHORT, dtype=dtype, diagnose=1), 0, kind(digits, SIZE, 0))
    assert not rows[-1]["diverged"]
    assert -1 <= rows[0]["cosine"] <= 1


def test_memory_of_unrolling_grows_with_its_steps():
    problem = make(size=replace(SIZE, hidden=100))
    few, many = (
        gradient_memory(problem, replace(SHORT, method="unrolled", budget=k)) for k in (4, 16)
    )
    assert many > 2 * few
    few, many = (
        gradient_memory(problem, replace(SHORT, method="conjugate_gradient", budget=k))
        for k in (4, 16)
    )
    assert many < 1.2 * few


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="method 'newton' is unknown"):
        Training(method="newton")
