"""K-FAC against cases where it is exact, and against curvlinops itself."""

import pytest
import torch
import torch.nn.functional as F
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import nn

from tests.implicit.problems import PROBLEMS, dense_gauss_newton, draw, problem, relative, shifted
from weighmatch.implicit import KFAC, ConjugateGradient, GaussNewton, Hessian, Nystrom, Woodbury
from weighmatch.implicit.layers import _Layers

KINDS = [(False, KFACLinearOperator), (True, EKFACLinearOperator)]


def gauss_newton(made):
    return GaussNewton(made.outputs, made.output_loss, made.params)


def dense_inverse(method, op):
    """The matrix that a method multiplies by."""
    identity = torch.eye(op.shape[0], dtype=torch.float64)
    return torch.stack([method.solve(op, column).value for column in identity], dim=1)


def linear(bias, examples, classes=3):
    return problem(nn.Linear(4, classes, bias=bias), draw(examples, 4, seed=2))


def curvlinops_matrix(made, kind, names):
    """curvlinops' own approximation for these parameters, in their order."""
    with torch.no_grad():
        for name, p in made.net.named_parameters():
            p.copy_(made.params[name])
    own = dict(made.net.named_parameters())
    operator = kind(
        made.net,
        nn.CrossEntropyLoss(),
        [own[name] for name in names],
        [(made.inputs, made.labels)],
        fisher_type="type-2",
        check_deterministic=False,
    )
    return operator @ torch.eye(sum(own[n].numel() for n in names), dtype=torch.float64)


@pytest.mark.parametrize("corrected", [False, True])
def test_one_linear_layer_without_bias_on_one_example_is_exact(corrected):
    made = linear(bias=False, examples=1)
    op, rhs = gauss_newton(made), draw(12)
    solution = KFAC(damping=0.1, eigenvalue_corrected=corrected).solve(op, rhs)
    assert solution.status == "converged"
    assert relative(solution.value, torch.linalg.solve(shifted(op.dense(), 0.1), rhs)) < 1e-9


def test_a_bias_is_a_layer_of_its_own_without_its_cross_term():
    made = linear(bias=True, examples=1)
    op = gauss_newton(made)
    inverse = dense_inverse(KFAC(damping=0.1), op)
    matrix = op.dense()
    assert matrix[:12, 12:].abs().max() > 1e-3
    matrix[:12, 12:] = 0
    matrix[12:, :12] = 0
    torch.testing.assert_close(inverse, torch.linalg.inv(shifted(matrix, 0.1)))


@pytest.mark.parametrize(("corrected", "kind"), KINDS)
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_an_mlp_has_the_factors_that_curvlinops_finds(corrected, kind, damping):
    made = PROBLEMS["MLP"]()
    op = gauss_newton(made)
    expected = curvlinops_matrix(made, kind, list(made.params))
    inverse = dense_inverse(KFAC(damping=damping, eigenvalue_corrected=corrected), op)
    assert relative(inverse, torch.linalg.inv(shifted(expected, damping))) < 1e-8


@pytest.mark.integration
@pytest.mark.parametrize(("corrected", "kind"), KINDS)
def test_a_cnn_has_layers_and_one_exact_rest(corrected, kind):
    made = PROBLEMS["CNN with GroupNorm"]()
    op = gauss_newton(made)
    inverse = dense_inverse(KFAC(damping=0.1, eigenvalue_corrected=corrected), op)
    index = {}
    start = 0
    for name, p in made.params.items():
        index[name] = torch.arange(start, start + p.numel())
        start += p.numel()
    layers = [name for name in made.params if "norm" not in name]
    seen = torch.cat([index[name] for name in layers])
    rest = torch.cat([index[name] for name in made.params if "norm" in name])
    expected = curvlinops_matrix(made, kind, layers)
    assert relative(inverse[seen][:, seen], torch.linalg.inv(shifted(expected, 0.1))) < 1e-8
    exact = op.dense()[rest][:, rest]
    assert relative(inverse[rest][:, rest], torch.linalg.inv(shifted(exact, 0.1))) < 1e-9
    assert inverse[seen][:, rest].abs().max() == 0


def test_the_eigenvalue_correction_is_nearer_to_the_blocks_of_the_layers():
    """EK-FAC is the nearest matrix with K-FAC's eigenvectors (George et al., 2018)."""
    made = problem(nn.Linear(6, 3, bias=False), draw(12, 6, seed=3))
    exact = gauss_newton(made).dense()
    kfac = curvlinops_matrix(made, KFACLinearOperator, ["weight"])
    ekfac = curvlinops_matrix(made, EKFACLinearOperator, ["weight"])
    assert 0.001 < relative(ekfac, exact) < relative(kfac, exact) < 0.5


def test_every_kind_of_convolution_is_solved():
    made = PROBLEMS["many kinds of convolution"]()
    op, rhs = gauss_newton(made), draw(made.size)
    solution = KFAC(damping=0.1).solve(op, rhs)
    grouped = made.params["grouped.weight"].numel() + made.params["grouped.bias"].numel()
    norm = 8
    dilated = made.params["dilated.weight"].numel()
    # Three classes, the rest one by one, the check of the residual.
    assert solution.products == op.products == 3 + grouped + norm + dilated + 1
    assert torch.isfinite(solution.value).all()
    assert solution.residual < 1


def test_half_the_products_of_kfac_are_saved_by_a_state():
    made = PROBLEMS["CNN with GroupNorm"]()
    op, rhs, state = gauss_newton(made), draw(made.size), {}
    first = KFAC(damping=0.1).solve(op, rhs, state)
    again = KFAC(damping=0.1).solve(op, rhs, state)
    assert (first.products, again.products) == (3 + 8 + 1, 1)
    assert torch.equal(first.value, again.value)
    # Factors are kept without damping, so that this may change.
    other = KFAC(damping=1.0).solve(op, rhs, state)
    assert other.products == 1
    fresh = KFAC(damping=1.0).solve(op, rhs)
    assert relative(other.value, fresh.value) < 1e-12


def ill_scaled(examples=60, features=12, classes=3):
    """Softmax regression whose features differ in scale, where K-FAC is good."""
    inputs = draw(examples, features, seed=6) * torch.logspace(-2, 1, features).double()
    made = problem(nn.Linear(features, classes, bias=False), inputs)
    made.params = {"weight": 0.05 * made.params["weight"]}
    return made


def test_conjugate_gradients_need_fewer_iterations_with_it():
    made = ill_scaled()
    op, rhs, state = gauss_newton(made), draw(made.size), {}
    damping = 1e-4
    plain = ConjugateGradient(damping=damping, max_products=400, rtol=1e-8).solve(op, rhs)
    method = ConjugateGradient(damping=damping, max_products=400, rtol=1e-8, preconditioner=KFAC())
    first = method.solve(op, rhs, state)
    again = method.solve(op, rhs, state)
    assert plain.status == first.status == again.status == "converged"
    assert first.products < 0.7 * plain.products
    assert again.products == first.products - 3
    exact = torch.linalg.solve(shifted(op.dense(), damping), rhs)
    for solution in (plain, first, again):
        assert relative(solution.value, exact) < 1e-3
        assert float((solution.value - exact).norm() / rhs.norm()) <= solution.error_bound


def test_factors_of_gauss_newton_serve_a_hessian():
    made = PROBLEMS["MLP"]()

    def loss(params):
        return made.loss(params) + sum(p.square().sum() for p in params.values())

    hessian, rhs = Hessian(loss, made.params), draw(made.size)
    factors = gauss_newton(made)
    alone = KFAC(damping=0.5, factors=factors).solve(hessian, rhs)
    assert alone.products == hessian.products == 3 + 1
    same = KFAC(damping=0.5).solve(gauss_newton(made), rhs)
    torch.testing.assert_close(alone.value, same.value)
    # The factors know nothing of the L2 in the loss: their own damping stands for it.
    preconditioner = KFAC(factors=factors, damping=2.0)
    cg = ConjugateGradient(max_products=60, rtol=1e-9, preconditioner=preconditioner)
    solution = cg.solve(hessian, rhs)
    assert solution.status == "converged"
    assert relative(solution.value, torch.linalg.solve(hessian.dense(), rhs)) < 1e-7


def test_a_budget_without_room_for_factors_is_kept():
    made = PROBLEMS["CNN with GroupNorm"]()
    op, rhs = gauss_newton(made), draw(made.size)
    method = ConjugateGradient(damping=0.1, max_products=12, rtol=0.0, preconditioner=KFAC())
    solution = method.solve(op, rhs)
    assert solution.products <= 12
    plain = ConjugateGradient(damping=0.1, max_products=12, rtol=0.0).solve(op, rhs)
    assert torch.equal(solution.value, plain.value)


def test_too_many_parameters_outside_of_layers_are_refused():
    inputs = draw(2, 4100)
    params = {"scale": torch.ones(4100, dtype=torch.float64)}
    op = GaussNewton(
        lambda p: (inputs * p["scale"])[:, :3],
        lambda z: F.cross_entropy(z, torch.arange(2)),
        params,
    )
    with pytest.raises(ValueError, match=r"4100 parameters .* more than the 4096"):
        KFAC().solve(op, draw(4100))


def test_a_weight_that_is_not_itself_a_parameter_is_no_layer():
    """As in weight standardisation: its matrix is a function of the parameter."""
    inputs = draw(6, 4)
    params = {"w": draw(3, 4, seed=1)}
    op = GaussNewton(
        lambda p: F.linear(inputs, p["w"] - p["w"].mean()),
        lambda z: F.cross_entropy(z, torch.arange(6) % 3),
        params,
    )
    solution = KFAC(damping=0.1).solve(op, draw(12))
    assert solution.products == 3 + 12 + 1
    assert relative(solution.value, torch.linalg.solve(shifted(op.dense(), 0.1), draw(12))) < 1e-9


def test_the_root_of_the_outputs_curvature_reproduces_gauss_newton():
    """Weighted examples change H_z; the factors see it through its root."""
    made = linear(bias=False, examples=1)
    weight = torch.tensor([3.0], dtype=torch.float64)

    def weighted(z):
        return (weight * F.cross_entropy(z, made.labels, reduction="none")).mean()

    op = GaussNewton(made.outputs, weighted, made.params)
    expected = dense_gauss_newton(made.outputs, weighted, made.params)
    inverse = dense_inverse(KFAC(damping=0.1), op)
    torch.testing.assert_close(inverse, torch.linalg.inv(shifted(expected, 0.1)))


def test_single_precision_works():
    made = PROBLEMS["CNN with GroupNorm"]()
    made.net.float()
    exact = KFAC(damping=0.1).solve(gauss_newton(PROBLEMS["CNN with GroupNorm"]()), draw(made.size))
    made.inputs = made.inputs.float()
    made.params = {k: p.float() for k, p in made.params.items()}
    solution = KFAC(damping=0.1).solve(gauss_newton(made), draw(made.size).float())
    assert solution.value.dtype == torch.float32
    assert relative(solution.value, exact.value) < 1e-4


def test_nystrom_and_kfac_can_share_a_state():
    made = ill_scaled()
    op, rhs, state = gauss_newton(made), draw(made.size), {}
    for preconditioner in (KFAC(), Nystrom(rank=10)):
        ConjugateGradient(damping=1e-3, preconditioner=preconditioner).solve(op, rhs, state)
    assert set(state) >= {"kfac", "sketch"}


# Weights that are used twice, biases that are left out, outputs of other shapes.

ROWS, SEQUENCE = draw(9, 5, seed=3), draw(9, 4, 5, seed=4)
W = {"w": 0.5 * draw(5, 5), "u": 0.5 * draw(5, 5, seed=5), "o": draw(3, 5, seed=1)}
B = {"b": draw(5, seed=2), "c": draw(5, seed=6)}
PICTURES, KERNEL = draw(9, 3, 8, 8), {"k": 0.2 * draw(3, 3, 3, 3), "o": draw(3, 3, seed=1)}


def layer(x, weight, bias=None):
    return torch.tanh(F.linear(x, weight, bias))


def pooled(p, **settings):
    hidden = torch.tanh(F.conv2d(PICTURES, p["k"], padding=1))
    return F.conv2d(hidden, p["k"], **settings).mean((2, 3))


TWICE = {
    "two biases": lambda p: layer(layer(ROWS, p["w"], p["b"]), p["w"], p["c"]) @ p["o"].T,
    "one call without bias": lambda p: F.linear(layer(layer(ROWS, p["w"], p["b"]), p["w"]), p["o"]),
    "recurrent": lambda p: F.linear(layer(layer(ROWS, p["w"], p["b"]), p["w"], p["b"]), p["o"]),
    "one bias of two weights": lambda p: F.linear(
        layer(layer(ROWS, p["w"], p["b"]), p["u"], p["b"]), p["o"]
    ),
    "transposed": lambda p: F.linear(layer(ROWS, p["w"]) @ p["w"], p["o"]),
    "a bias used besides": lambda p: F.linear(layer(ROWS, p["w"], p["b"]) * p["b"], p["o"]),
    "two strides": lambda p: F.linear(pooled(p, padding=1, stride=2), p["o"]),
    "two paddings": lambda p: F.linear(pooled(p, padding="same", dilation=2), p["o"]),
    "the same twice": lambda p: F.linear(pooled(p, padding=1), p["o"]),
}


def own_blocks(matrix, params):
    """The matrix with nothing between one parameter and another."""
    kept, start = torch.zeros_like(matrix), 0
    for p in params.values():
        end = start + p.numel()
        kept[start:end, start:end] = matrix[start:end, start:end]
        start = end
    return kept


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("corrected", [False, True])
def test_a_network_that_uses_a_weight_twice_is_the_one_that_is_factored(name, corrected):
    outputs = TWICE[name]
    everything = KERNEL if name in ("two strides", "two paddings", "the same twice") else {**W, **B}
    params = {k: p for k, p in everything.items() if _has(outputs, everything, k)}
    op = GaussNewton(outputs, lambda z: F.cross_entropy(z, torch.arange(9) % 3), params)
    layers = _Layers(op)
    expected = torch.einsum("bc,bcd->bd", outputs(params), layers.root)
    torch.testing.assert_close(layers(None), expected)
    solution = KFAC(damping=0.1, eigenvalue_corrected=corrected).solve(op, draw(op.shape[0]))
    blocks = own_blocks(op.dense(), params)
    exact = torch.linalg.solve(shifted(blocks, 0.1), draw(op.shape[0]))
    # Uses one after another are no independent ones, which is K-FAC's own approximation.
    better = 1.5 if name in ("one call without bias", "recurrent", "the same twice") else 0.8
    assert relative(solution.value, exact) < better * relative(draw(op.shape[0]) / 0.1, exact)


def _has(outputs, params, name):
    try:
        outputs({k: p for k, p in params.items() if k != name})
    except KeyError:
        return True
    return False


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("shape", [(9, 5), (9, 4, 5), (3, 3, 4, 5)])
def test_shared_uses_are_averaged_whatever_the_shape_of_the_inputs(shape, calls):
    """For a linear layer under the squared error K-FAC is its block, however it is shared."""
    inputs = [draw(*shape, seed=k) for k in range(calls)]
    params = {"o": draw(3, 5)}
    for rows in (lambda z: z, lambda z: z.flatten(0, -2)):
        op = GaussNewton(
            lambda p: rows(torch.cat([F.linear(x, p["o"]) for x in inputs])),  # noqa: B023
            lambda z: z.square().sum(),
            params,
        )
        solution = KFAC(damping=0.3).solve(op, draw(15, seed=7))
        exact = torch.linalg.solve(shifted(op.dense(), 0.3), draw(15, seed=7))
        assert relative(solution.value, exact) < 1e-9
        assert solution.status == "converged"


@pytest.mark.parametrize("left_out", ["bias", "weight"])
def test_layers_keep_their_factors_where_the_other_half_is_left_out(left_out):
    made = PROBLEMS["MLP"]()
    whole, fixed = made.outputs, made.params
    params = {k: p for k, p in fixed.items() if left_out not in k}
    op = GaussNewton(lambda p: whole({**fixed, **p}), made.output_loss, params)
    solution = KFAC(damping=0.1).solve(op, draw(op.shape[0]))
    # Three classes and the check; biases alone are no layers.
    assert solution.products == (3 + 1 if left_out == "bias" else 3 + 8 + 1)


@pytest.mark.parametrize("name", ["(B, T, C)", "(B, C, T)", "(B,)", "coupled in time"])
def test_outputs_of_other_shapes_have_blocks_too(name):
    labels = (torch.arange(36) % 3).view(9, 4)
    hidden = lambda p: F.linear(layer(SEQUENCE, p["w"], p["b"]), p["o"])  # noqa: E731
    outputs, loss = {
        "(B, T, C)": (hidden, lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten())),
        "(B, C, T)": (
            lambda p: hidden(p).transpose(1, 2),
            lambda z: F.cross_entropy(z, labels),
        ),
        "(B,)": (lambda p: hidden(p).sum((1, 2)), lambda z: z.pow(4).mean()),
        "coupled in time": (hidden, lambda z: z.mean(1).logsumexp(1).sum()),
    }[name]
    params = {"w": W["w"], "b": B["b"], "o": W["o"]}
    op = GaussNewton(outputs, loss, params)
    matrix, rhs = op.dense(), draw(op.shape[0])
    factor, _ = op.factor()
    torch.testing.assert_close(factor @ factor.T, matrix, rtol=1e-8, atol=1e-10)
    exact = torch.linalg.solve(shifted(matrix, 0.1), rhs)
    assert relative(Woodbury(damping=0.1).solve(op, rhs).value, exact) < 1e-8
    blocks = torch.linalg.solve(shifted(own_blocks(matrix, params), 0.1), rhs)
    for corrected in (False, True):
        found = KFAC(damping=0.1, eigenvalue_corrected=corrected).solve(op, rhs).value
        assert relative(found, blocks) < 0.95 * relative(rhs / 0.1, blocks)


def test_factors_age_and_know_their_settings():
    made = PROBLEMS["MLP"]()
    moved = {k: 3 * p for k, p in made.params.items()}
    rhs, state = draw(made.size), {}

    def op(params):
        return GaussNewton(made.outputs, made.output_loss, params)

    KFAC(damping=0.01).solve(op(made.params), rhs, state)
    carried = KFAC(damping=0.01).solve(op(moved), rhs, state)
    fresh = KFAC(damping=0.01).solve(op(moved), rhs)
    assert carried.residual <= 2 * fresh.residual
    corrected = KFAC(damping=0.01, eigenvalue_corrected=True)
    found = corrected.solve(op(moved), rhs, state)
    assert torch.equal(found.value, corrected.solve(op(moved), rhs).value)
