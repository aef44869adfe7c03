"""Hypergradients against finite differences through problems that are really trained again."""

import pytest
import torch
import torch.nn.functional as F

from weighmatch.implicit import (
    Exact,
    GaussNewton,
    Hessian,
    implicit_gradient,
    weight_gradient,
)

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
