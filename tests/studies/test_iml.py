"""IML training: what each setting is said to do."""

from dataclasses import replace

import pytest
import torch

from weighmatch.data.sources.digits import load_digits
from weighmatch.implicit import Dense, Exact, flatten
from weighmatch.studies.iml import Training, gradient_memory, train
from weighmatch.studies.iml.hypergradients import Hypergradients, factored_exact
from weighmatch.studies.iml.training import _Learner
from weighmatch.studies.methods import METHOD_NAMES, all_methods
from weighmatch.studies.minimise import minimise
from weighmatch.studies.problems import PROBLEMS, Size

pytestmark = pytest.mark.integration

IMAGES, LABELS = load_digits()
SIZE = Size(inner=40, outer=40, test=60, hidden=3)
SHORT = Training(outer_steps=3, inner_steps=4, budget=4)


def make(name="example_weights", size=SIZE, seed=0):
    kind = PROBLEMS[name]
    return kind(kind.draw(IMAGES, LABELS, size, seed), size, seed)


@pytest.mark.parametrize("method", METHOD_NAMES)
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
    stable = replace(long, automatic_step=True, diagnose=1)
    rows = train(make("weight_decay", size), stable, 0)
    assert not rows[-1]["diverged"]
    # Gradient descent is stable below 2.
    assert max(row["step_sharpness"] for row in rows[:-1]) < 2


FAR = replace(SHORT, outer_steps=12, outer_rate=6.0, method="identity", damping=0.0)


def test_what_moves_phi_too_far_is_taken_back():
    problem = make("weight_decay", replace(SIZE, hidden=8))
    lost = train(problem, FAR, 0)
    kept = train(problem, replace(FAR, backtrack=0.1), 0)
    assert lost[-1]["diverged"] or lost[-1]["outer_loss"] > 1.5 * lost[0]["outer_loss"]
    losses = [row["outer_loss"] for row in kept]
    least = torch.tensor(losses).cummin(0).values
    assert all(loss <= 1.1 * float(low) + 1e-12 for loss, low in zip(losses, least, strict=True))
    assert not kept[0]["rejected"]
    back = [i for i, row in enumerate(kept) if row["rejected"]]
    assert back
    # Where it goes back to is where the update was made.
    assert all(kept[i]["test_accuracy"] == kept[i - 1]["test_accuracy"] for i in back)
    # Gradients spent on what is taken back are spent.
    costs = [row["cost"] for row in kept]
    assert costs == sorted(set(costs))


def test_backtracking_that_has_nothing_to_take_back_changes_nothing():
    problem = make(size=replace(SIZE, hidden=0))
    for settings in ({}, {"outer_rule": "sgd"}, {"average": 0.5}):
        plain = train(problem, replace(SHORT, **settings), 0)
        watched = train(problem, replace(SHORT, backtrack=10.0, **settings), 0)
        assert plain == watched


def test_mini_batches_agree_as_they_grow_and_a_whole_batch_is_halved():
    problem = make("weight_decay", replace(SIZE, hidden=8))
    size = problem.examples
    cosines = {}
    for batch in (4, size - 1, None):
        rows = train(problem, replace(SHORT, diagnose=1, batch=batch, damping=0.1), 0)
        cosines[batch] = sum(row["batch_cosine"] for row in rows[:-1]) / 3
    assert cosines[4] < cosines[size - 1]
    assert cosines[None] < cosines[size - 1] <= 1
    plain = train(problem, SHORT, 0)
    watched = train(problem, replace(SHORT, diagnose=1), 0)
    assert [row["outer_loss"] for row in plain] == [row["outer_loss"] for row in watched]


def test_the_unguarded_series_leaves_what_its_terms_leave():
    convex = replace(SIZE, hidden=0, l2=0.1)
    problem = make(size=convex)
    training = replace(SHORT, method="neumann", damping=0.0, diagnose=1, outer_steps=1)
    tame = train(problem, training, 0)[0]
    # The series itself, from products, guarded, but here it has nothing to stop for.
    assert tame["unguarded_residual"] == pytest.approx(tame["residual"], rel=0.3)
    assert tame["unguarded_residual"] < 1
    wild = replace(training, step=2.6, automatic_step=False, neumann_step=True)
    found = train(problem, wild, 0)[0]
    assert found["status"] == "diverged"
    assert found["residual"] <= 1
    assert found["unguarded_residual"] > 1


def test_sama_takes_adams_mean_over_the_steps_so_far():
    problem = make()
    rows = train(problem, replace(SHORT, method="sama", outer_steps=1, damping=0.0), 0)
    learner = _Learner(problem, replace(SHORT, method="sama"), 0, problem)
    inner = learner.descend()
    squares = [
        problem.inner_gradient(params, problem.hyperparameters())[1][0].square()
        for params, _ in inner.history
    ]
    weights = torch.tensor([0.999**k * 0.001 for k in reversed(range(4))], dtype=torch.float64)
    expected = torch.einsum("t,t...->...", weights, torch.stack(squares))
    torch.testing.assert_close(next(iter(inner.moment.values())), expected)
    assert inner.taken == 4
    # Outer gradient, two of the finite difference, four steps.
    assert rows[1]["cost"] - rows[0]["cost"] == pytest.approx(1 + 2 + 4 + 1.5 + 6 * 1.2)


def test_a_normalised_hypergradient_moves_a_plain_step_by_its_rate():
    seen = []
    problem = make("weight_decay")
    original = problem.decay
    problem.decay = lambda hyper: seen.append(flatten(hyper).detach().clone()) or original(hyper)
    start = flatten(problem.hyperparameters())
    plain = replace(
        SHORT, curvature="gauss_newton", outer_rule="sgd", outer_rate=0.5, outer_steps=1
    )
    lengths = []
    for settings in ({}, {"normalise": True}, {"normalise": True, "outer_factor": 4.0}):
        seen.clear()
        train(problem, replace(plain, **settings), 0)
        lengths.append(float((seen[-1] - start).norm()))
    assert 0 < lengths[0] < 0.1
    assert lengths[1:] == pytest.approx([0.5, 2.0], rel=1e-6)


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
    longer = replace(SHORT, inner_steps=16)
    few, many = (
        gradient_memory(problem, replace(longer, method="unrolled", budget=k)) for k in (4, 16)
    )
    assert many > 2 * few
    few, many = (
        gradient_memory(problem, replace(SHORT, method="conjugate_gradient", budget=k))
        for k in (4, 16)
    )
    assert many < 1.2 * few


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"method": "newton"}, "method 'newton' is unknown"),
        ({"curvature": "fisher"}, "curvature 'fisher' is unknown"),
        ({"outer_rule": "lion"}, "outer_rule 'lion' is unknown"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"batch": 0}, "batch must be an integer of at least 1"),
        ({"budget": 1}, "budget must be an integer of at least 2"),
        ({"damping": -1.0}, "damping must be a number at least 0"),
        ({"method": "unrolled", "budget": 21}, r"budget must be at most inner_steps \(20\)"),
        ({"backtrack": -0.1}, "backtrack must be a number at least 0"),
        ({"method": "sama", "converge": True}, "converge must be false"),
        ({"method": "unrolled", "momentum": 0.9}, "momentum must be 0"),
    ],
)
def test_a_wrong_setting_is_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        Training(**wrong)


def test_costs_count_every_gradient():
    convex = replace(SIZE, hidden=0, l2=0.1)
    online = replace(SHORT, method="identity", damping=0.0, automatic_step=False, outer_steps=1)
    first, last = (row["cost"] for row in train(make(size=convex), online, 0))
    # λ_max at the start: a graph and six products; then four steps.
    assert first == pytest.approx(1.5 + 6 * 1.2 + 4)
    # Outer gradient, graph, one product for the residual, mixed derivative; four steps.
    assert last - first == pytest.approx(1 + 1.5 + 1.2 + 3 + 4)
    problem, calls = make(size=convex), []
    gradient = problem.inner_gradient
    problem.inner_gradient = lambda *a: calls.append(1) or gradient(*a)
    converged = train(problem, replace(online, method="none", converge=True), 0)
    # All calls but those that say where θ is.
    assert converged[-1]["cost"] == pytest.approx(1.5 + 6 * 1.2 + len(calls) - len(converged))


def test_diagnosis_is_of_the_network_as_it_is():
    size = replace(SIZE, normalised=True)
    kind = PROBLEMS["example_weights"]
    digits = kind.draw(IMAGES, LABELS, size, 0)
    training = replace(SHORT, method="exact", damping=0.0, diagnose=1)
    rows = train(kind(digits, size, 0), training, 0, kind(digits, size, 0))
    assert all(row["cosine"] > 1 - 1e-6 for row in rows[:-1])


def test_a_minimum_is_one():
    problem = make("weight_decay", replace(SIZE, hidden=8, l2=1e-3))
    hyper = problem.hyperparameters()
    found, _ = minimise(problem, hyper, problem.initial, iterations=3000)
    slopes = problem.inner_gradient(found, hyper)[1]
    assert max(float(s.abs().max()) for s in slopes) <= 1e-6


@pytest.mark.parametrize(
    "method",
    [row.name for row in all_methods() if row.solver and row.budgeted and not row.untrained],
)
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_a_matrix_in_closed_form_is_a_shorter_way_to_the_same_and_costs_the_same(
    method, curvature, monkeypatch
):
    training = replace(SHORT, method=method, curvature=curvature, batch=20, outer_steps=2)
    short = train(make(), training, 0)
    monkeypatch.setattr(Hypergradients, "in_closed_form", lambda _: False)
    long = train(make(), training, 0)
    for key in ("outer_loss", "residual", "cost"):
        ends = [[row.get(key, 0.0) for row in rows] for rows in (short, long)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_an_exact_solve_by_factors_is_that_by_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    rhs = torch.randn(12, generator=generator, dtype=torch.float64)
    low_rank = root[:, :5] @ root[:, :5].T
    for matrix, damping in ((root @ root.T, 0.1), (root + root.T, 0.0), (low_rank, 0.0)):
        ours = factored_exact(damping=damping).solve(Dense(matrix), rhs)
        theirs = Exact(damping=damping).solve(Dense(matrix), rhs)
        torch.testing.assert_close(ours.value, theirs.value)
        assert ours.status == theirs.status
