"""Layers whose inputs are data are differentiated in the row space of these: nothing else moves."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weighmatch.implicit import (
    Chebyshev,
    ConjugateGradient,
    Dense,
    EmpiricalFisher,
    Exact,
    GaussNewton,
    Hessian,
    Method,
    MinRes,
    Neumann,
    Parameters,
    flatten,
    unflatten,
)

EXAMPLES, INPUTS, HIDDEN, CLASSES = 6, 20, 5, 3
POLYNOMIAL = [
    method(damping=0.5, max_products=12)
    for method in (ConjugateGradient, MinRes, Chebyshev, Neumann)
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X = numbers(EXAMPLES, INPUTS, seed=1)
LABELS = torch.arange(EXAMPLES) % CLASSES
PARAMS = {
    "first": numbers(HIDDEN, INPUTS, seed=2) / INPUTS**0.5,
    "bias": numbers(HIDDEN, seed=3),
    "second": numbers(CLASSES, HIDDEN, seed=4),
}
RHS = numbers(sum(p.numel() for p in PARAMS.values()), seed=5)


def outputs(params: Parameters, x: Tensor = X) -> Tensor:
    hidden = torch.tanh(F.linear(x, params["first"], params["bias"]))
    return F.linear(hidden, params["second"])


def loss(params: Parameters) -> Tensor:
    return F.cross_entropy(outputs(params), LABELS)


def regularised(params: Parameters) -> Tensor:
    return loss(params) + 0.3 * params["first"].square().sum()


def used_twice(params: Parameters) -> Tensor:
    return loss(params) + F.cross_entropy(outputs(params, X.flip(1)), LABELS)


def vectorised(params: Parameters) -> Tensor:
    halves = X.view(2, EXAMPLES // 2, INPUTS)
    z = torch.func.vmap(lambda x: outputs(params, x))(halves)
    return F.cross_entropy(z.reshape(EXAMPLES, CLASSES), LABELS)


def recomputed(params: Parameters) -> Tensor:
    z = checkpoint(lambda: outputs(params), use_reentrant=False)
    assert isinstance(z, Tensor)
    return F.cross_entropy(z, LABELS)


def of_gradients(params: Parameters) -> Tensor:
    value = loss(params)
    slopes = torch.autograd.grad(
        value, list(params.values()), create_graph=True, materialize_grads=True
    )
    return value + torch.stack([s.square().sum() for s in slopes]).sum()


def of_duplicates(params: Parameters) -> Tensor:
    return F.cross_entropy(outputs(params, X[[0, 0, 1, 1, 1, 2]]), LABELS)


def of_pseudo_labels(params: Parameters) -> Tensor:
    with torch.no_grad():
        targets = outputs(params, X.flip(1)).softmax(1)
    return F.cross_entropy(outputs(params), targets)


def by_keywords(params: Parameters) -> Tensor:
    hidden = torch.tanh(F.linear(X, bias=params["bias"], weight=params["first"]))
    return F.cross_entropy(F.linear(hidden, params["second"]), LABELS)


def dense(function: Callable[[Parameters], Tensor]) -> Tensor:
    """Without any code of the package's curvature."""
    matrix = torch.autograd.functional.hessian(
        lambda flat: function(unflatten(flat, PARAMS)), flatten(PARAMS)
    )
    assert isinstance(matrix, Tensor)
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("function", [loss, of_duplicates, by_keywords, of_pseudo_labels])
def test_there_is_a_smaller_space_that_the_hessian_maps_to_itself(
    function: Callable[[Parameters], Tensor],
) -> None:
    restriction = Hessian(function, PARAMS).restricted(RHS)
    assert restriction is not None
    small, vector = restriction.operator, restriction.vector
    assert small.shape[0] == HIDDEN * EXAMPLES + HIDDEN + CLASSES * HIDDEN + 1 < len(RHS)
    torch.testing.assert_close(restriction.lift(vector), RHS)
    # Where there are pseudo-labels, the oracle has them fixed as well.
    matrix = dense(function)
    image = matrix @ RHS
    torch.testing.assert_close(restriction.lift(small @ vector), image)
    torch.testing.assert_close(restriction.lift(small @ (small @ vector)), matrix @ image)


@pytest.mark.parametrize(
    "function", [regularised, used_twice, vectorised, recomputed, of_gradients]
)
def test_where_the_layer_is_used_otherwise_there_is_none(
    function: Callable[[Parameters], Tensor],
) -> None:
    operator = Hessian(function, PARAMS)
    assert operator.restricted(RHS) is None
    torch.testing.assert_close(operator @ RHS, dense(function) @ RHS)


@pytest.mark.parametrize("function", [loss, regularised, used_twice, of_duplicates])
def test_products_and_blocks_are_those_of_the_whole_matrix(
    function: Callable[[Parameters], Tensor],
) -> None:
    operator, matrix = Hessian(function, PARAMS), dense(function)
    torch.testing.assert_close(operator @ RHS, matrix @ RHS)
    torch.testing.assert_close(operator.dense(), matrix)


def test_gauss_newton_and_fisher_too() -> None:
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: outputs(unflatten(flat, PARAMS)), flatten(PARAMS)
    )
    p = outputs(PARAMS).softmax(1)
    middle = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / EXAMPLES
    expected = torch.einsum("bcp,bcd,bdq->pq", jacobian, middle, jacobian)
    operator = GaussNewton(outputs, lambda z: F.cross_entropy(z, LABELS), PARAMS)
    torch.testing.assert_close(operator.dense(), expected)
    factor, _ = operator.factor()
    torch.testing.assert_close(factor @ factor.T, expected)
    restriction = operator.restricted(RHS)
    assert restriction is not None
    assert restriction.operator.smallest_eigenvalue == 0.0

    def example_losses(params: Parameters) -> Tensor:
        return F.cross_entropy(outputs(params), LABELS, reduction="none")

    gradients = torch.autograd.functional.jacobian(
        lambda flat: example_losses(unflatten(flat, PARAMS)), flatten(PARAMS)
    )
    fisher = EmpiricalFisher(example_losses, PARAMS)
    torch.testing.assert_close(fisher.dense(), gradients.T @ gradients / EXAMPLES)


@pytest.mark.parametrize("method", POLYNOMIAL, ids=lambda m: type(m).__name__)
def test_solves_are_those_of_the_whole_matrix(method: Method) -> None:
    operator = GaussNewton(outputs, lambda z: F.cross_entropy(z, LABELS), PARAMS)
    matrix = operator.dense()
    operator.products = 0
    found = method.solve(operator, RHS)
    expected = method.solve(Dense(matrix, positive_semidefinite=True), RHS)
    assert found.value.shape == RHS.shape
    assert (found.status, found.products) == (expected.status, expected.products)
    assert operator.products == found.products
    torch.testing.assert_close(found.value, expected.value, rtol=1e-5, atol=1e-6)
    true = matrix @ found.value + 0.5 * found.value - RHS
    assert found.residual == pytest.approx(float(true.norm() / RHS.norm()), rel=1e-6, abs=1e-12)
    assert found.error_bound is not None
    error = found.value - Exact(damping=0.5).solve(Dense(matrix), RHS).value
    assert float(error.norm() / RHS.norm()) <= found.error_bound


def test_a_right_hand_side_inside_of_the_space() -> None:
    operator = GaussNewton(outputs, lambda z: F.cross_entropy(z, LABELS), PARAMS)
    inside = operator @ RHS
    found = ConjugateGradient(damping=0.5, max_products=40).solve(operator, inside)
    expected = Exact(damping=0.5).solve(Dense(operator.dense()), inside)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-4, atol=1e-5)


def test_a_preconditioner_gets_whole_vectors() -> None:
    seen = []

    def precondition(vector: Tensor) -> Tensor:
        seen.append(len(vector))
        return vector / 2

    operator = GaussNewton(outputs, lambda z: F.cross_entropy(z, LABELS), PARAMS)
    ConjugateGradient(damping=0.5, preconditioner=precondition).solve(operator, RHS)
    assert set(seen) == {len(RHS)}


def test_many_examples_gain_nothing() -> None:
    x = numbers(INPUTS, INPUTS, seed=6)
    labels = torch.arange(INPUTS) % CLASSES
    operator = Hessian(lambda p: F.cross_entropy(outputs(p, x), labels), PARAMS)
    assert operator.restricted(RHS) is None
