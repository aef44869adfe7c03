"""Layers whose gradient is cheap to differentiate, against torch's own, in double precision."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.implicit.problems import draw
from weighmatch.implicit import GaussNewton, Hessian
from weighmatch.implicit.second_order import CheapSecondOrder, ThirdDerivativeError

LAYERS = {
    "plain": lambda: nn.Conv2d(4, 8, 3),
    "stride and padding": lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1),
    "uneven": lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(0, 2)),
    "dilated and grouped": lambda: nn.Conv2d(4, 8, 3, dilation=2, groups=2),
    "same": lambda: nn.Conv2d(4, 8, 3, padding="same"),
    "valid, no bias": lambda: nn.Conv2d(4, 8, 3, padding="valid", bias=False),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm by groups": lambda: nn.GroupNorm(1, 4, eps=1e-2),
    "instance norm by groups": lambda: nn.GroupNorm(4, 4),
    "group norm without weights": lambda: nn.GroupNorm(2, 4, affine=False),
}


TORCHS_OWN = contextlib.nullcontext


def second(layer, inputs, outer, needed, mode=CheapSecondOrder):
    """Derivatives, in what is needed or in `outer`, of a scalar of a first derivative."""
    arguments = [inputs, *layer.parameters()]
    arguments = [a for a, wanted in zip(arguments, needed, strict=True) if wanted]
    with mode():
        y = layer(inputs)
    u = torch.cos(y) if outer is None else outer
    first = torch.autograd.grad(y, arguments, u, create_graph=True)
    vectors = [draw(*a.shape, seed=5 + i) for i, a in enumerate(arguments)]
    into = arguments if outer is None else [outer]
    again = torch.autograd.grad(first, into, vectors, materialize_grads=True)
    return [y, *first, *again]


def prepared(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    for p in layer.parameters():
        p.data = draw(*p.shape, seed=9)
    # A mean far from zero and channels of different size.
    scales = torch.tensor([1.0, 0.1, 3.0, 1.0], dtype=torch.float64).view(4, 1, 1)
    inputs = (draw(3, 4, 8, 7) * scales + 2).requires_grad_()
    return layer, inputs, 1 + len(list(layer.parameters()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("whole", [True, False])
def test_two_derivatives_are_those_of_torch(name, whole):
    layer, inputs, count = prepared(name)
    choices = [[True] * count] if whole else [[i == j for j in range(count)] for i in range(count)]
    for needed in choices:
        ours = second(layer, inputs, None, needed)
        theirs = second(layer, inputs, None, needed, mode=TORCHS_OWN)
        assert len(ours) == len(theirs) >= 3
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_in_the_cotangent_alone_they_are_those_of_torch(name):
    layer, inputs, count = prepared(name)
    u = draw(*layer(inputs).shape, seed=4).requires_grad_()
    ours = second(
        layer, inputs, u, [True] * count, mode=partial(CheapSecondOrder, cotangent_only=True)
    )
    theirs = second(layer, inputs, u, [True] * count, mode=TORCHS_OWN)
    assert len(ours) == len(theirs) == count + 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "group norm"])
def test_layouts_and_single_images_change_nothing(name):
    layer, inputs, count = prepared(name)
    for other in (
        inputs.detach().to(memory_format=torch.channels_last),
        inputs.detach().transpose(2, 3).contiguous().transpose(2, 3),
    ):
        other.requires_grad_()
        assert not other.is_contiguous()
        ours = second(layer, other, None, [True] * count)
        for a, b in zip(
            ours, second(layer, inputs, None, [True] * count, mode=TORCHS_OWN), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if name == "plain":
        with CheapSecondOrder():
            torch.testing.assert_close(layer(inputs[0]), layer(inputs)[0])


def gradient_penalty():
    """A network and a loss made of its own gradient: the Hessian takes three derivatives."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten())
    network = network.append(nn.Linear(16, 3)).double()
    inputs = draw(5, 1, 4, 4)
    params = {k: p.detach() for k, p in network.named_parameters()}

    def loss(p):
        x = inputs.clone().requires_grad_()
        z = torch.func.functional_call(network, p, (x,))
        entropy = F.cross_entropy(z, torch.tensor([0, 1, 2, 0, 1]))
        (slope,) = torch.autograd.grad(entropy, x, create_graph=True)
        return entropy + slope.square().sum()

    return params, loss


def test_a_third_derivative_is_an_error_and_the_hessian_goes_round_it():
    params, loss = gradient_penalty()
    op = Hessian(loss, params)
    vector, h = draw(op.shape[0]), 1e-6
    leaves = list(params.values())
    sizes = [p.numel() for p in leaves]

    def gradient(step):
        moved = {
            k: (p + step * v.view_as(p)).requires_grad_()
            for (k, p), v in zip(params.items(), vector.split(sizes), strict=True)
        }
        found = torch.autograd.grad(loss(moved), list(moved.values()))
        return torch.cat([g.reshape(-1) for g in found])

    expected = (gradient(h) - gradient(-h)) / (2 * h)
    torch.testing.assert_close(op @ vector, expected, rtol=1e-6, atol=1e-7)
    live = {k: p.clone().requires_grad_() for k, p in params.items()}
    with CheapSecondOrder(), pytest.raises(ThirdDerivativeError):
        torch.autograd.grad(loss(live), list(live.values()), create_graph=True)


def test_a_loss_of_torch_func_transforms_has_its_curvature():
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3))
    network = network.double()
    inputs = draw(5, 1, 4, 4)
    params = {k: p.detach() for k, p in network.named_parameters()}

    def plain(p):
        return torch.func.functional_call(network, p, (inputs,))

    def mapped(p):
        one = lambda x: torch.func.functional_call(network, p, (x[None],))[0]  # noqa: E731
        return torch.func.vmap(one)(inputs)

    curved = lambda z: torch.logsumexp(z, dim=1).sum()  # noqa: E731
    vector = draw(sum(p.numel() for p in params.values()))
    for build in (
        lambda f: Hessian(lambda p: curved(f(p)), params),
        lambda f: GaussNewton(f, curved, params),
    ):
        torch.testing.assert_close(build(mapped) @ vector, build(plain) @ vector)
