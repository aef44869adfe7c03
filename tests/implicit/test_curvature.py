"""Curvature operators against dense matrices in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.implicit.problems import (
    PROBLEM_NAMES,
    PROBLEMS,
    dense_gauss_newton,
    dense_hessian,
    draw,
    finite_difference_product,
    jacobian,
    relative,
    spd,
)
from weighmatch.implicit import (
    ConjugateGradient,
    Dense,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    flatten,
    unflatten,
)
from weighmatch.implicit.memory import keep_freed_memory

KINDS = ("Hessian", "GaussNewton", "EmpiricalFisher")
each_problem = pytest.mark.parametrize("name", PROBLEM_NAMES)
each_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, problem):
    if kind == "Hessian":
        return Hessian(problem.loss, problem.params)
    if kind == "GaussNewton":
        return GaussNewton(problem.outputs, problem.output_loss, problem.params)
    return EmpiricalFisher(problem.example_losses, problem.params)


def oracle(kind, problem):
    if kind == "Hessian":
        return dense_hessian(problem.loss, problem.params)
    if kind == "GaussNewton":
        return dense_gauss_newton(problem.outputs, problem.output_loss, problem.params)
    rows = jacobian(problem.example_losses, problem.params)
    return rows.T @ rows / len(rows)


@pytest.fixture
def mlp():
    return PROBLEMS["MLP"]()


@each_problem
@each_kind
def test_an_operator_is_its_dense_matrix(kind, name):
    problem = PROBLEMS[name]()
    op = build(kind, problem)
    torch.testing.assert_close(op.dense(), oracle(kind, problem), rtol=1e-9, atol=1e-12)
    assert op.products == problem.size
    if kind != "Hessian":
        assert op.positive_semidefinite
        assert torch.linalg.eigvalsh(op.dense())[0] > -1e-12


@each_problem
def test_the_hessian_is_the_difference_of_gradients(name):
    problem = PROBLEMS[name]()
    vector = draw(problem.size, seed=1)
    expected = finite_difference_product(problem.loss, problem.params, vector)
    assert relative(Hessian(problem.loss, problem.params) @ vector, expected) < 1e-7


@each_problem
@each_kind
def test_a_block_is_its_columns_and_counts_them(kind, name):
    problem = PROBLEMS[name]()
    op = build(kind, problem)
    block = draw(problem.size, 19)  # more than one batched pass takes
    product = op @ block
    assert op.products == 19
    columns = torch.stack([op @ column for column in block.unbind(1)], dim=1)
    assert op.products == 38
    torch.testing.assert_close(columns, product, rtol=1e-9, atol=1e-12)
    assert (op @ block[:, :0]).shape == (problem.size, 0)
    assert (op @ block[:, :1]).shape == (problem.size, 1)
    assert op.products == 39


@each_problem
@each_kind
def test_an_operator_that_expects_many_products_gives_the_same(kind, name):
    problem = PROBLEMS[name]()
    op = build(kind, problem)
    vectors = draw(5, problem.size)
    before = [op @ vector for vector in vectors]
    op.linearize_from = 3
    op.expect(2)
    assert op._tangent is None
    op.expect(3)
    convolutions = any(p.ndim > 2 for p in problem.params.values())
    # Traces that are wrong must not be taken: of circular padding in torch 2.15, and of group
    # norm from the second call on in torch 2.11.
    wrong = {"many kinds of convolution"}
    if torch.__version__ < "2.15":
        wrong.add("CNN with GroupNorm")
    if name not in wrong:
        assert (op._tangent is not None) == (convolutions == (kind == "Hessian"))
    for vector, expected in zip(vectors, before, strict=True):
        torch.testing.assert_close(op @ vector, expected, rtol=1e-9, atol=1e-12)


@each_problem
@pytest.mark.parametrize("kind", ["GaussNewton", "EmpiricalFisher"])
def test_a_factor_times_its_transpose_is_the_operator(kind, name):
    problem = PROBLEMS[name]()
    op = build(kind, problem)
    factor, left_out = op.factor()
    count = len(problem.inputs) * (3 if kind == "GaussNewton" else 1)
    assert factor.shape == (problem.size, count)
    assert op.products == count
    assert left_out == 0.0
    torch.testing.assert_close(factor @ factor.T, oracle(kind, problem), rtol=1e-9, atol=1e-12)


def test_gauss_newton_with_more_outputs_than_parameters_is_factored_densely():
    inputs = draw(8, 3)
    params = {"w": draw(2, 3, seed=1)}
    op = GaussNewton(
        lambda p: inputs @ p["w"].T, lambda z: F.cross_entropy(z, torch.arange(8) % 2), params
    )
    factor, _ = op.factor()
    assert op.products == 6
    torch.testing.assert_close(factor @ factor.T, op.dense())


def test_a_dense_factor_says_what_it_leaves_out():
    matrix, _ = spd([-2.0, -0.5, 0.0, 1.0, 3.0])
    factor, left_out = Dense(matrix).factor()
    assert left_out == pytest.approx(-2.0)
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    positive = vectors @ torch.diag(eigenvalues.clamp_min(0)) @ vectors.T
    torch.testing.assert_close(factor @ factor.T, positive)


def test_weights_on_the_examples_reach_gauss_newton(mlp):
    weights = torch.linspace(0, 2, 9, dtype=torch.float64)

    def weighted(z):
        return (weights * F.cross_entropy(z, mlp.labels, reduction="none")).mean()

    op = GaussNewton(mlp.outputs, weighted, mlp.params)
    expected = dense_gauss_newton(mlp.outputs, weighted, mlp.params)
    torch.testing.assert_close(op.dense(), expected)
    factor, _ = op.factor()
    torch.testing.assert_close(factor @ factor.T, expected)
    # Each example apart, and then weighed.
    parts = 0
    for i, weight in enumerate(weights):
        part = GaussNewton(
            lambda p, i=i: mlp.outputs(p)[i : i + 1],
            lambda z, i=i: F.cross_entropy(z, mlp.labels[i : i + 1]),
            mlp.params,
        )
        parts = parts + weight * part.dense() / 9
    torch.testing.assert_close(op.dense(), parts)


def test_gauss_newton_takes_other_losses_and_shapes(mlp):
    targets = draw(9, 3, seed=2)
    for loss in (
        lambda z: F.mse_loss(z, targets),
        lambda z: F.binary_cross_entropy_with_logits(z, targets.sigmoid(), reduction="sum"),
    ):
        op = GaussNewton(mlp.outputs, loss, mlp.params)
        expected = dense_gauss_newton(mlp.outputs, loss, mlp.params)
        torch.testing.assert_close(op.dense(), expected)
    flat = GaussNewton(lambda p: mlp.outputs(p)[:, 0], lambda z: z.square().sum(), mlp.params)
    expected = dense_gauss_newton(
        lambda p: mlp.outputs(p)[:, 0], lambda z: z.square().sum(), mlp.params
    )
    torch.testing.assert_close(flat.dense(), expected)


def test_a_loss_that_is_linear_has_no_curvature(mlp):
    op = GaussNewton(mlp.outputs, lambda z: z.sum(), mlp.params)
    assert torch.equal(op.dense(), torch.zeros(mlp.size, mlp.size, dtype=torch.float64))
    params = {"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([1.0])}
    partly = Hessian(lambda p: p["a"].square().sum() + p["b"].sum(), params)
    assert torch.equal(partly.dense(), torch.diag(torch.tensor([2.0, 2.0, 0.0])))
    linear = Hessian(lambda p: p["a"].sum() + p["b"].sum(), params)
    assert torch.equal(linear.dense(), torch.zeros(3, 3))


@each_kind
def test_two_operators_live_side_by_side(kind):
    """Convolutions are swapped while one graph is built; that must not reach the other."""
    one, two = PROBLEMS["CNN with GroupNorm"](), PROBLEMS["CNN with GroupNorm"]()
    two.params = {k: 0.5 * p + 0.1 for k, p in two.params.items()}
    first = build(kind, one)
    second = build(kind, two)
    vector = draw(one.size, seed=3)
    for _ in range(2):
        torch.testing.assert_close(first @ vector, oracle(kind, one) @ vector)
        torch.testing.assert_close(second @ vector, oracle(kind, two) @ vector)


def test_an_operator_keeps_the_point_at_which_it_was_made(mlp):
    vector = draw(mlp.size)
    op = Hessian(mlp.loss, mlp.params)
    before = op @ vector
    ConjugateGradient(damping=1.0).solve(op, vector)
    assert torch.equal(op @ vector, before)
    assert all(not p.requires_grad for p in mlp.params.values())


def test_some_weights_of_a_convolutional_network_may_be_fixed():
    problem = PROBLEMS["many kinds of convolution"]()
    fixed = problem.params
    problem.params = {k: fixed[k] for k in ("grouped.weight", "norm.bias")}
    whole = problem.outputs
    outputs = lambda p: whole({**fixed, **p})  # noqa: E731
    op = GaussNewton(outputs, problem.output_loss, problem.params)
    expected = dense_gauss_newton(outputs, problem.output_loss, problem.params)
    torch.testing.assert_close(op.dense(), expected, rtol=1e-9, atol=1e-12)


def test_a_loss_that_couples_examples_has_no_block_an_example(mlp):
    coupled = lambda z: z.std(dim=0).sum() + z.square().sum()  # noqa: E731
    op = GaussNewton(mlp.outputs, coupled, mlp.params)
    with pytest.raises(ValueError, match="not a sum over examples"):
        op.output_curvature()
    assert GaussNewton(mlp.outputs, mlp.output_loss, mlp.params).output_curvature().ndim == 3


def test_hessian_in_single_precision(mlp):
    params = {k: p.float() for k, p in mlp.params.items()}
    inputs = mlp.inputs.float()

    def loss(p):
        z = torch.tanh(inputs @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]
        return F.cross_entropy(z, mlp.labels)

    op = Hessian(loss, params)
    assert op.dtype == torch.float32
    assert relative(op.dense(), dense_hessian(mlp.loss, mlp.params)) < 1e-6


def test_flatten_and_unflatten_are_inverse(mlp):
    flat = flatten(mlp.params)
    again = unflatten(flat, mlp.params)
    assert list(again) == list(mlp.params)
    for name, p in mlp.params.items():
        assert torch.equal(again[name], p)
    with pytest.raises(ValueError, match=r"\(4,\) is needed"):
        unflatten(torch.ones(3), {"a": torch.ones(2, 2)})


def test_wrong_shapes_are_refused(mlp):
    op = Dense(torch.eye(4))
    for bad in (torch.ones(3), torch.ones(3, 2), torch.ones(4, 1, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"cannot multiply a tensor of shape"):
            op @ bad
    assert op.products == 0
    with pytest.raises(ValueError, match="square"):
        Dense(torch.ones(2, 3))
    with pytest.raises(ValueError, match="symmetric"):
        Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="one loss an example"):
        EmpiricalFisher(mlp.loss, mlp.params)


def test_the_smallest_eigenvalue_is_known_set_or_unknown(mlp):
    hessian = Hessian(mlp.loss, mlp.params)
    assert hessian.smallest_eigenvalue is None
    hessian.smallest_eigenvalue = -0.25
    assert hessian.smallest_eigenvalue == -0.25
    assert GaussNewton(mlp.outputs, mlp.output_loss, mlp.params).smallest_eigenvalue == 0.0
    matrix, _ = spd([-1.0, 2.0, 5.0])
    assert Dense(matrix).smallest_eigenvalue == pytest.approx(-1.0)
    singular, _ = spd([0.0, 1.0])
    assert Dense(singular, positive_semidefinite=True).smallest_eigenvalue >= 0.0


def test_keeping_memory_can_be_asked_for_again():
    first = keep_freed_memory()
    assert isinstance(first, bool)
    assert keep_freed_memory() is first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("confidence", [10.0, 20.0, 40.0])
def test_a_confident_classifier_has_blocks_still(dtype, confidence):
    z = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[:, 0] += confidence
    labels = torch.zeros(4, dtype=torch.long)
    op = GaussNewton(lambda p: p["z"], lambda o: F.cross_entropy(o, labels), {"z": z})
    p = z.double().softmax(1)
    expected = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / 4
    torch.testing.assert_close(op.output_curvature().double(), expected, rtol=1e-3, atol=1e-7)
