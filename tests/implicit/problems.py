"""Matrices with known spectra, small networks, and dense oracles made by other means."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from weighmatch.implicit import LinearOperator, flatten, unflatten

# By name: eigenvalues of matrices that a method may meet.
DEFINITE = {
    "even": torch.linspace(0.5, 4, 40),
    "condition 1e4": torch.logspace(-3, 1, 40),
    "condition 1e10": torch.logspace(-10, 0, 40),
    "two clusters": torch.cat([torch.full((20,), 1e-4), torch.ones(20)]),
    "two far clusters": torch.cat([torch.full((20,), 1e-10), torch.ones(20)]),
    "one outlier": torch.cat([torch.linspace(1, 2, 39), torch.tensor([1e4])]),
}
HARD = {
    "condition 1e10": DEFINITE["condition 1e10"],
    "indefinite": torch.linspace(-1, 1, 40),
    "nearly definite": torch.cat([torch.tensor([-1e-3]), torch.linspace(0.1, 2, 39)]),
    "singular": torch.cat([torch.zeros(20), torch.ones(20)]),
    "negative": -torch.ones(40),
    "zero": torch.zeros(40),
    "huge": torch.logspace(0, 4, 40),
    "tiny": torch.logspace(-8, -4, 40),
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def spd(eigenvalues, seed=0, dtype=torch.float64):
    """A symmetric matrix with these eigenvalues in a random basis, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    matrix = ((matrix + matrix.T) / 2).to(dtype)
    return matrix, torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def shifted(matrix, damping):
    """The matrix with `damping` on its diagonal, in double precision."""
    return matrix.double() + damping * torch.eye(len(matrix), dtype=torch.float64)


def relative(found, expected):
    """‖found − expected‖ / ‖expected‖ in double precision."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


class Counting(LinearOperator):
    """A dense matrix that counts its products by itself."""

    def __init__(self, matrix):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix
        self.seen = 0

    def _product(self, vector):
        self.seen += 1
        return self.matrix @ vector

    def _block_product(self, block):
        self.seen += block.shape[1]
        return self.matrix @ block


@dataclass
class Problem:
    """A network on one batch as functions of its parameters."""

    net: nn.Module
    params: dict
    inputs: torch.Tensor
    labels: torch.Tensor

    def outputs(self, params):
        return functional_call(self.net, params, (self.inputs,))

    def output_loss(self, outputs):
        return F.cross_entropy(outputs, self.labels)

    def loss(self, params):
        return self.output_loss(self.outputs(params))

    def example_losses(self, params):
        return F.cross_entropy(self.outputs(params), self.labels, reduction="none")

    @property
    def size(self):
        return flatten(self.params).numel()


def problem(net, inputs, classes=3, seed=0):
    """`net` in float64 with parameters of moderate size."""
    net = net.double()
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        params[name] = 0.5 * noise + (1.0 if p.ndim == 1 and "norm" in name else 0.0)
    return Problem(net, params, inputs, torch.arange(len(inputs)) % classes)


class Unused(nn.Module):
    """A layer that no output depends on, between two that matter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class ManyConvolutions(nn.Module):
    """Strides, groups, dilation, biases, padding by name and circular, a skip, GroupNorm."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.grouped = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)
        self.tall = nn.Conv2d(4, 2, (2, 1), stride=(1, 2), padding="valid")
        self.circular = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        x = torch.tanh(self.norm(self.strided(x)))
        x = F.silu(self.grouped(x))
        x = x + self.dilated(x)
        x = torch.tanh(self.circular(self.tall(x)))
        return self.head(x.mean((2, 3)))


def _mlp():
    return problem(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), draw(9, 4))


def _cnn():
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(1, 4, 3, stride=2, bias=False))
    net.add_module("norm", nn.GroupNorm(2, 4))
    net.add_module("act", nn.Tanh())
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(16, 3))
    return problem(net, draw(4, 1, 5, 5))


PROBLEMS = {
    "MLP": _mlp,
    "unused parameters": lambda: problem(Unused(), draw(6, 4)),
    "CNN with GroupNorm": _cnn,
    "many kinds of convolution": lambda: problem(ManyConvolutions(), draw(3, 2, 6, 6)),
}

# For `parametrize`: the last one takes most of the time.
PROBLEM_NAMES = [
    "MLP",
    "unused parameters",
    "CNN with GroupNorm",
    pytest.param("many kinds of convolution", marks=pytest.mark.integration),
]


def dense_hessian(loss, params):
    return torch.autograd.functional.hessian(
        lambda flat: loss(unflatten(flat, params)), flatten(params)
    )


def jacobian(function, params):
    """Of the flattened values of `function`, one row a value."""
    return torch.autograd.functional.jacobian(
        lambda flat: function(unflatten(flat, params)).flatten(), flatten(params)
    )


def dense_gauss_newton(outputs, output_loss, params):
    rows = jacobian(outputs, params)
    z = outputs(params).detach()
    middle = torch.autograd.functional.hessian(lambda f: output_loss(f.view_as(z)), z.flatten())
    return rows.T @ middle @ rows


def finite_difference_product(loss, params, vector, step=1e-5):
    """A Hessian-vector product from two gradients."""

    def gradient(shift):
        leaves = {k: (p + shift[k]).requires_grad_() for k, p in params.items()}
        found = torch.autograd.grad(
            loss(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.to_dense().flatten() for g in found])

    there = gradient(unflatten(step * vector, params))
    return (there - gradient(unflatten(-step * vector, params))) / (2 * step)
