"""Hypergradients through a pretrained network, of which a part is trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from weighmatch.implicit import Exact, GaussNewton, implicit_gradient, weight_gradient
from weighmatch.semisup.parts.backbones import Backbone, WeightsInfo
from weighmatch.semisup.parts.networks import PretrainedClassifier
from weighmatch.semisup.weightings.meter import parameters_of


@pytest.fixture
def classifier():
    """Three blocks with BatchNorm that has statistics of its own, in double precision."""
    torch.manual_seed(0)

    def block(inputs):
        return nn.Sequential(nn.Conv2d(inputs, 4, 3), nn.BatchNorm2d(4), nn.Softplus())

    net = nn.Sequential(
        nn.Sequential(*(block(inputs) for inputs in (3, 4, 4))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    net(torch.randn(30, 3, 10, 10))
    info = WeightsInfo(10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "", "made here")
    return PretrainedClassifier(Backbone(net, 4, info), 3, "last").double()


def test_influence_through_frozen_statistics_is_the_hypergradient(classifier):
    """−⟨∇ℓ_i, v⟩ by forward mode is what double backward through the inner loss gives."""
    images = torch.rand(7, 3, 10, 10, dtype=torch.float64)
    labels = torch.arange(7) % 3
    theta = parameters_of(classifier)
    assert set(theta) < {name for name, _ in classifier.named_parameters()}
    assert set(theta) == set(classifier.rates())

    def losses(params):
        logits = functional_call(classifier, params, (images,))
        return F.cross_entropy(logits, labels, reduction="none")

    def inner(params, hyper):
        return (hyper["weights"] * losses(params)).mean()

    def outer(params):
        return F.cross_entropy(functional_call(classifier, params, (images.flip(3),)), labels)

    def gauss_newton(loss, params):
        return GaussNewton(
            lambda p: functional_call(classifier, p, (images,)),
            lambda z: F.cross_entropy(z, labels),
            params,
        )

    weights = {"weights": torch.ones(7, dtype=torch.float64)}
    solver = Exact(damping=0.1)
    expected, solution = implicit_gradient(
        inner, outer, theta, weights, solver, curvature=gauss_newton
    )
    actual = weight_gradient(losses, theta, solution.value) / 7
    torch.testing.assert_close(actual, expected["weights"], rtol=1e-8, atol=1e-12)
    # The same curvature, written out with backward passes alone.
    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    logits = functional_call(classifier, leaves, (images,))
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(z, leaves.values(), retain_graph=True)])
        for z in logits.flatten()
    ]
    p = logits.detach().softmax(1)
    middle = torch.block_diag(*(torch.diag(q) - q.outer(q) for q in p)) / 7
    jacobian = torch.stack(rows)
    dense = jacobian.T @ middle @ jacobian
    gradient = torch.autograd.grad(outer(leaves), leaves.values())
    rhs = torch.cat([g.flatten() for g in gradient])
    v = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=torch.float64), rhs)
    torch.testing.assert_close(solution.value, v, rtol=1e-6, atol=1e-9)
