"""Hypergradients against finite differences through problems that are really trained again."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tests.implicit.problems import PROBLEM_NAMES, PROBLEMS, draw, relative
from weighmatch.implicit import (
    ConjugateGradient,
    Exact,
    GaussNewton,
    Hessian,
    Nystrom,
    flatten,
    implicit_gradient,
    unflatten,
    weight_gradient,
)
from weighmatch.semisup.parts.networks import wide_resnet_trunk

L2 = 0.05


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    labels = (inputs[:, 0] + 0.5 * inputs[:, 1] > 0).long()
    labels[0] = 1 - labels[0]
    outer_inputs = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    return inputs, labels, outer_inputs, (outer_inputs[:, 0] > 0).long()


def logits(params, inputs):
    return inputs @ params["w"].T + params["b"]


def retrain(inner, hyper):
    """Newton's method to machine precision, from the same start."""
    params = {
        "w": torch.zeros(2, 3, dtype=torch.float64),
        "b": torch.zeros(2, dtype=torch.float64),
    }
    for _ in range(30):
        leaves = {k: v.requires_grad_() for k, v in params.items()}
        gradient = torch.autograd.grad(inner(leaves, hyper), list(leaves.values()))
        flat = torch.cat([g.flatten() for g in gradient])
        op = Hessian(lambda p: inner(p, hyper), leaves)
        step = Exact().solve(op, flat).value if flat.norm() > 0 else flat
        params = {
            "w": (leaves["w"] - step[:6].view(2, 3)).detach(),
            "b": (leaves["b"] - step[6:]).detach(),
        }
    return params


def finite_differences(value, hyper, name, step=1e-5):
    gradient = torch.zeros_like(hyper[name]).flatten()
    for k in range(gradient.numel()):
        moved = []
        for sign in (1, -1):
            shifted = hyper[name].clone()
            shifted.view(-1)[k] += sign * step
            moved.append(value({**hyper, name: shifted}))
        gradient[k] = (moved[0] - moved[1]) / (2 * step)
    return gradient.view_as(hyper[name])


@pytest.mark.integration
def test_implicit_gradient_is_that_of_the_retrained_problem(data):
    inputs, labels, outer_inputs, outer_labels = data

    def inner(params, hyper):
        losses = F.cross_entropy(logits(params, inputs), labels, reduction="none")
        decay = sum((hyper["decay"] * p.square().sum()) for p in params.values())
        return (hyper["weights"] * losses).mean() + decay + L2 * params["w"].square().sum()

    def outer(params, hyper):
        fit = F.cross_entropy(logits(params, outer_inputs), outer_labels)
        return fit + 0.1 * hyper["weights"].square().sum()

    hyper = {
        "weights": torch.linspace(0.5, 1.5, 12, dtype=torch.float64),
        "decay": torch.tensor(0.1, dtype=torch.float64),
    }
    params = retrain(inner, hyper)
    gradient, solution = implicit_gradient(inner, outer, params, hyper, Exact())
    assert solution.status == "converged"
    for name in hyper:
        expected = finite_differences(lambda h: outer(retrain(inner, h), h), hyper, name)
        torch.testing.assert_close(gradient[name], expected, rtol=1e-5, atol=1e-8)


def test_outer_loss_that_does_not_see_the_hyperparameters(data):
    inputs, labels, outer_inputs, outer_labels = data

    def inner(params, hyper):
        loss = F.cross_entropy(logits(params, inputs), labels)
        return loss + hyper[0] * sum(p.square().sum() for p in params.values())

    def outer(params):
        return F.cross_entropy(logits(params, outer_inputs), outer_labels)

    hyper = [torch.tensor(0.2, dtype=torch.float64)]
    (gradient,), _ = implicit_gradient(inner, outer, retrain(inner, hyper), hyper, Exact())
    expected = finite_differences(lambda h: outer(retrain(inner, [h["d"]])), {"d": hyper[0]}, "d")
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.integration
def test_weight_gradient_is_that_of_the_retrained_problem(data):
    inputs, labels, outer_inputs, outer_labels = data

    def losses(params):
        return F.cross_entropy(logits(params, inputs), labels, reduction="none")

    def inner(params, weights):
        return (weights * losses(params)).sum() + L2 * sum(
            p.square().sum() for p in params.values()
        )

    def outer(params):
        return F.cross_entropy(logits(params, outer_inputs), outer_labels)

    weights = torch.full((12,), 1 / 12, dtype=torch.float64)
    params = retrain(inner, weights)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    outer_gradient = torch.autograd.grad(outer(leaves), list(leaves.values()))
    rhs = torch.cat([g.flatten() for g in outer_gradient])
    # For a linear model and cross-entropy, Gauss-Newton is the Hessian of the data term.
    curvature = GaussNewton(
        lambda p: logits(p, inputs), lambda z: F.cross_entropy(z, labels), params
    )
    v = Exact(damping=2 * L2).solve(curvature, rhs).value
    expected = finite_differences(
        lambda h: outer(retrain(inner, h["weights"])), {"weights": weights}, "weights"
    )
    torch.testing.assert_close(weight_gradient(losses, params, v), expected, rtol=1e-5, atol=1e-8)


def test_gauss_newton_can_be_the_curvature(data):
    inputs, labels, outer_inputs, outer_labels = data

    def inner(params, hyper):
        losses = F.cross_entropy(logits(params, inputs), labels, reduction="none")
        return (hyper * losses).mean() + L2 * sum(p.square().sum() for p in params.values())

    def outer(params):
        return F.cross_entropy(logits(params, outer_inputs), outer_labels)

    weights = torch.ones(12, dtype=torch.float64)
    params = retrain(inner, weights)

    def gauss_newton(loss, theta):
        return GaussNewton(lambda p: logits(p, inputs), lambda z: F.cross_entropy(z, labels), theta)

    by_hessian, _ = implicit_gradient(inner, outer, params, weights, Exact())
    by_gauss_newton, _ = implicit_gradient(
        inner, outer, params, weights, Exact(damping=2 * L2), curvature=gauss_newton
    )
    torch.testing.assert_close(by_gauss_newton, by_hessian)


@pytest.mark.parametrize(
    "outer",
    [
        lambda params, hyper=None: params["a"].sum() + 10 * hyper.sum(),
        lambda *both: both[0]["a"].sum() + 10 * both[1].sum(),
    ],
)
def test_the_direct_term_is_kept_however_the_outer_loss_takes_it(outer):
    def inner(params, hyper):
        return 0.5 * (params["a"] - hyper).square().sum()

    hyper = torch.tensor([1.0, 2.0])
    gradient, _ = implicit_gradient(inner, outer, {"a": hyper.clone()}, hyper, Exact())
    torch.testing.assert_close(gradient, torch.tensor([11.0, 11.0]))


def test_what_a_closure_has_bound_is_not_taken_for_hyperparameters():
    def inner(params, hyper):
        return 0.5 * (params["a"] - hyper).square().sum()

    slope = torch.tensor([3.0, 4.0])
    hyper = torch.tensor([1.0, 2.0])
    params = {"a": hyper.clone()}
    gradient, _ = implicit_gradient(
        inner, lambda params, slope=slope: slope @ params["a"], params, hyper, Exact()
    )
    torch.testing.assert_close(gradient, slope)


def by_double_backward(example_losses, params, vector):
    """The derivative in w of −⟨∇_θ Σ wᵢℓᵢ, v⟩, the way that forward mode replaces."""
    theta = {k: p.detach().requires_grad_() for k, p in params.items()}
    losses = example_losses(theta)
    weights = torch.ones_like(losses, requires_grad=True)
    gradient = torch.autograd.grad(
        (weights * losses).sum(), list(theta.values()), create_graph=True, materialize_grads=True
    )
    pieces = unflatten(vector, theta).values()
    inner = sum((g * v).sum() for g, v in zip(gradient, pieces, strict=True))
    return -torch.autograd.grad(inner, weights)[0]


def test_weight_gradient_is_double_backward_on_a_wide_resnet_in_single_precision():
    torch.manual_seed(0)
    net = nn.Sequential(wide_resnet_trunk(3, depth=10, widen=1), nn.Linear(64, 4))
    params = {k: p.detach() for k, p in net.named_parameters()}
    images, labels = draw(4, 3, 32, 32, dtype=torch.float32), torch.arange(4)

    def losses(theta):
        return F.cross_entropy(functional_call(net, theta, (images,)), labels, reduction="none")

    vector = draw(flatten(params).numel(), seed=1, dtype=torch.float32)
    found = weight_gradient(losses, params, vector)
    assert found.shape == (4,)
    assert not found.requires_grad
    assert relative(found, by_double_backward(losses, params, vector)) < 1e-6


@pytest.mark.parametrize("name", PROBLEM_NAMES)
def test_weight_gradient_is_double_backward_on_every_kind_of_layer(name):
    problem = PROBLEMS[name]()
    vector = draw(problem.size, seed=1)
    found = weight_gradient(problem.example_losses, problem.params, vector)
    expected = by_double_backward(problem.example_losses, problem.params, vector)
    torch.testing.assert_close(found, expected)


def test_hyperparameters_may_be_any_pytree_and_arguments_stay(data):
    inputs, labels, outer_inputs, outer_labels = data

    def inner(params, hyper):
        decay, (weights, _unused) = hyper
        losses = F.cross_entropy(logits(params, inputs), labels, reduction="none")
        return (weights * losses).mean() + decay["l2"] * flatten(params).square().sum()

    def outer(params):
        return F.cross_entropy(logits(params, outer_inputs), outer_labels)

    hyper = (
        {"l2": torch.tensor(0.1, dtype=torch.float64)},
        [torch.linspace(0.5, 1.5, 12, dtype=torch.float64), torch.ones(2, dtype=torch.float64)],
    )
    params = retrain(inner, hyper)
    before = {k: p.clone() for k, p in params.items()}
    gradient, _ = implicit_gradient(inner, outer, params, hyper, Exact())
    assert isinstance(gradient, tuple)
    assert set(gradient[0]) == {"l2"}
    assert torch.equal(gradient[1][1], torch.zeros(2, dtype=torch.float64))

    def moved(l2):
        shifted = ({"l2": l2["l2"]}, hyper[1])
        return outer(retrain(inner, shifted))

    expected = finite_differences(moved, {"l2": hyper[0]["l2"]}, "l2")
    torch.testing.assert_close(gradient[0]["l2"], expected, rtol=1e-5, atol=1e-8)
    for name, p in params.items():
        assert torch.equal(p, before[name])
        assert not p.requires_grad
    assert not hyper[1][0].requires_grad


def test_a_better_solution_is_a_better_hypergradient_and_the_state_is_handed_on(data):
    inputs, labels, outer_inputs, outer_labels = data

    def inner(params, weights):
        losses = F.cross_entropy(logits(params, inputs), labels, reduction="none")
        return (weights * losses).mean() + L2 * flatten(params).square().sum()

    def outer(params):
        return F.cross_entropy(logits(params, outer_inputs), outer_labels)

    weights = torch.ones(12, dtype=torch.float64)
    params = retrain(inner, weights)
    exact, _ = implicit_gradient(inner, outer, params, weights, Exact())
    errors = []
    for budget in (2, 3, 5):  # two classes leave four directions
        solver = ConjugateGradient(max_products=budget, rtol=1e-12)
        gradient, solution = implicit_gradient(inner, outer, params, weights, solver)
        errors.append(relative(gradient, exact))
        assert solution.products <= budget
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-9
    state = {}
    first = implicit_gradient(inner, outer, params, weights, Nystrom(rank=8), state=state)
    again = implicit_gradient(inner, outer, params, weights, Nystrom(rank=8), state=state)
    assert again[1].products < first[1].products
    torch.testing.assert_close(again[0], first[0])
