"""Layers whose forward pass has a memory or a die: BatchNorm and dropout.

In eval mode all products are right. In train mode each goes wrong in a way of its own, which is
shown here so that nobody finds it out in a training run.
"""

import pytest
import torch
from torch import nn

from tests.implicit.problems import draw as gaussian
from tests.implicit.problems import finite_difference_product, problem, relative
from weighmatch.implicit import (
    EmpiricalFisher,
    Exact,
    GaussNewton,
    Hessian,
    flatten,
    implicit_gradient,
    unflatten,
    weight_gradient,
)


def made(layer):
    """A CNN around a BatchNorm or dropout layer, with statistics that are not the initial ones."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), layer, nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    ).double()
    if isinstance(layer, nn.BatchNorm2d) and layer.track_running_stats:
        layer.running_mean.copy_(torch.linspace(-0.5, 0.5, 4))
        layer.running_var.copy_(torch.linspace(0.5, 2, 4))
    return problem(net, gaussian(6, 2, 5, 5))


LAYERS = {"BatchNorm": lambda: nn.BatchNorm2d(4), "dropout": lambda: nn.Dropout(0.5)}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def buffers(p):
    return {name: b.clone() for name, b in p.net.named_buffers()}


def vector_of(p):
    return gaussian(p.size, seed=9)


def weight_differences(p, vector, step=1e-5):
    shift = unflatten(step * vector, p.params)
    there = p.example_losses({k: q + shift[k] for k, q in p.params.items()})
    back = p.example_losses({k: q - shift[k] for k, q in p.params.items()})
    return -(there - back) / (2 * step)


@each_layer
@pytest.mark.parametrize("linearized", [False, True])
def test_in_eval_mode_products_are_those_of_differences(layer, linearized):
    p = made(LAYERS[layer]())
    p.net.eval()
    before = buffers(p)
    vector = vector_of(p)
    hessian = Hessian(p.loss, p.params)
    if linearized:
        hessian.linearize_from = 1
        hessian.expect(1)
        assert hessian._tangent is not None
    expected = finite_difference_product(p.loss, p.params, vector)
    assert relative(hessian @ vector, expected) < 1e-7
    jacobian = weight_differences(p, vector)
    assert relative(weight_gradient(p.example_losses, p.params, vector), jacobian) < 1e-7
    fisher = EmpiricalFisher(p.example_losses, p.params)
    assert float(vector @ (fisher @ vector)) == pytest.approx(float(jacobian @ jacobian) / 6)
    for name, value in before.items():
        assert torch.equal(dict(p.net.named_buffers())[name], value)


def test_with_batch_statistics_the_kept_graph_is_right():
    p = made(LAYERS["BatchNorm"]())
    p.net.train()
    vector = vector_of(p)
    expected = finite_difference_product(p.loss, p.params, vector)
    hessian = Hessian(p.loss, p.params)
    assert relative(hessian @ vector, expected) < 1e-7
    gauss_newton = GaussNewton(p.outputs, p.output_loss, p.params)
    step = 1e-5
    shift = unflatten(step * vector, p.params)
    there = p.outputs({k: q + shift[k] for k, q in p.params.items()})
    back = p.outputs({k: q - shift[k] for k, q in p.params.items()})
    tangent = ((there - back) / (2 * step)).detach()
    z = p.outputs(p.params)
    curved = torch.autograd.functional.hvp(p.output_loss, z.detach(), tangent)[1]
    quadratic = float((tangent * curved).sum())
    assert float(vector @ (gauss_newton @ vector)) == pytest.approx(quadratic, rel=1e-6)


def test_with_batch_statistics_reverse_over_forward_is_silently_wrong():
    """torch's derivative of BatchNorm's forward-mode rule; forward over reverse is right."""
    p = made(nn.BatchNorm2d(4, track_running_stats=False))
    vector = vector_of(p)
    tangents = unflatten(vector, p.params)
    expected = finite_difference_product(p.loss, p.params, vector)

    def directional(params):
        return torch.func.jvp(p.loss, (params,), (tangents,))[1]

    reverse_over_forward = flatten(torch.func.grad(directional)(p.params))
    _, product = torch.func.jvp(torch.func.grad(p.loss), (p.params,), (tangents,))
    assert relative(reverse_over_forward, expected) > 0.01
    assert relative(flatten(product), expected) < 1e-7
    # Which is why no operator here goes that way, nor does the traced one.
    hessian = Hessian(p.loss, p.params)
    assert relative(hessian @ vector, expected) < 1e-7
    hessian.linearize_from = 1
    hessian.expect(1)
    assert relative(hessian @ vector, expected) < 1e-7
    weights = weight_gradient(p.example_losses, p.params, vector)
    assert relative(weights, weight_differences(p, vector)) < 1e-7


def test_in_train_mode_each_evaluation_moves_the_running_statistics():
    """Making an operator does; its products do not. One hypergradient counts as two batches."""
    p = made(LAYERS["BatchNorm"]())
    p.net.train()
    start = buffers(p)
    operator = Hessian(p.loss, p.params)
    once = buffers(p)
    assert not torch.equal(once["1.running_mean"], start["1.running_mean"])
    assert int(once["1.num_batches_tracked"]) == 1
    operator @ vector_of(p)
    operator @ torch.stack([vector_of(p)] * 3, dim=1)
    assert int(buffers(p)["1.num_batches_tracked"]) == 1

    def inner(params, hyper):
        return p.loss(params) + hyper * flatten(params).square().sum()

    hyper = torch.tensor(1.0, dtype=torch.float64)
    implicit_gradient(inner, lambda q: flatten(q).sum(), p.params, hyper, Exact())
    assert int(buffers(p)["1.num_batches_tracked"]) == 3


def test_in_train_mode_running_statistics_keep_forward_mode_out():
    """torch refuses by an error, and an operator that wanted to trace goes on without."""
    p = made(LAYERS["BatchNorm"]())
    p.net.train()
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        weight_gradient(p.example_losses, p.params, vector_of(p))
    hessian = Hessian(p.loss, p.params)
    before = hessian @ vector_of(p)
    hessian.linearize_from = 1
    hessian.expect(1)
    assert hessian._tangent is None
    assert torch.equal(hessian @ vector_of(p), before)


def test_dropout_is_one_symmetric_matrix_for_as_long_as_its_graph_is_kept():
    p = made(LAYERS["dropout"]())
    p.net.train()
    vector = vector_of(p)
    torch.manual_seed(0)
    for build in (
        lambda: Hessian(p.loss, p.params),
        lambda: GaussNewton(p.outputs, p.output_loss, p.params),
        lambda: EmpiricalFisher(p.example_losses, p.params),
    ):
        one, other = build(), build()
        assert torch.equal(one @ vector, one @ vector)
        block = one @ torch.eye(p.size, dtype=torch.float64)
        torch.testing.assert_close(block, block.T)
        # Each operator has masks of its own, and none is that of eval mode.
        assert relative(one @ vector, other @ vector) > 0.1
        p.net.eval()
        assert relative(one @ vector, build() @ vector) > 0.1
        p.net.train()


def test_dropout_traced_anew_would_be_no_matrix_at_all_and_is_not_taken():
    p = made(LAYERS["dropout"]())
    p.net.train()
    vector = vector_of(p)
    torch.manual_seed(0)
    hessian = Hessian(p.loss, p.params)
    before = hessian @ vector
    hessian.linearize_from = 1
    hessian.expect(1)
    assert hessian._tangent is None
    assert torch.equal(hessian @ vector, before)
    traced = torch.func.linearize(torch.func.grad(p.loss), p.params)[1]
    tangents = unflatten(vector, p.params)
    assert relative(flatten(traced(tangents)), flatten(traced(tangents))) > 0.1


def test_dropout_gives_other_weights_at_each_call():
    p = made(LAYERS["dropout"]())
    p.net.train()
    torch.manual_seed(0)
    one, other = (weight_gradient(p.example_losses, p.params, vector_of(p)) for _ in range(2))
    assert relative(one, other) > 0.1
