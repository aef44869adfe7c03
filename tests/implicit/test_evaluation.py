"""Losses as users write them: right second derivatives, or one sentence that says why not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.implicit.problems import draw, finite_difference_product, relative
from weighmatch.implicit import (
    ConjugateGradient,
    Dense,
    EmpiricalFisher,
    Exact,
    GaussNewton,
    Hessian,
    Method,
    asymmetry,
    darts_gradient,
    extreme_eigenvalues,
    flatten,
    implicit_gradient,
    lower_bound,
    spectral_density,
    unflatten,
    unrolled_gradient,
    weight_gradient,
)

DOUBLE = torch.float64


class Attention(nn.Module):
    """Queries, keys and values of a head, with a causal mask."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Words(nn.Module):
    def __init__(self, table, *, tied=False):
        super().__init__()
        self.table, self.hidden = table, nn.Linear(6, 6)
        self.out = nn.Linear(6, 7, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, words):
        rows = self.table(words)
        return self.out(torch.tanh(self.hidden(rows if rows.ndim == 2 else rows.mean(1))))


def encoder(**settings):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **settings)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3))


def weight_normed(layer, *more, **settings):
    normed = nn.utils.parametrizations.weight_norm(layer, **settings)
    return nn.Sequential(normed, nn.Tanh(), *more)


SEQUENCES, IMAGES, WORDS = draw(4, 5, 8), draw(4, 3, 5, 5), torch.arange(12).view(4, 3) % 7
LAYERS = {
    "scaled_dot_product_attention": (Attention, SEQUENCES),
    "MultiheadAttention": (SelfAttention, SEQUENCES),
    "TransformerEncoderLayer": (encoder, SEQUENCES),
    "TransformerEncoderLayer in eval mode": (lambda: encoder().eval(), SEQUENCES),
    "sparse embedding": (lambda: Words(nn.Embedding(7, 6, sparse=True)), WORDS),
    "tied embedding": (lambda: Words(nn.Embedding(7, 6), tied=True), WORDS),
    "bag of words": (lambda: Words(nn.EmbeddingBag(7, 6)), WORDS),
    "bag of words, sums, padded": (
        lambda: Words(nn.EmbeddingBag(7, 6, mode="sum", padding_idx=2)),
        WORDS,
    ),
    "bag of words, means, padded": (lambda: Words(nn.EmbeddingBag(7, 6, padding_idx=2)), WORDS),
    "weight norm": (
        lambda: weight_normed(nn.Linear(8, 5), nn.Flatten(), nn.Linear(25, 3)),
        SEQUENCES,
    ),
    "weight norm of columns": (
        lambda: weight_normed(nn.Linear(8, 5), nn.Flatten(), nn.Linear(25, 3), dim=1),
        SEQUENCES,
    ),
    "weight norm of all": (
        lambda: weight_normed(nn.Linear(8, 5), nn.Flatten(), nn.Linear(25, 3), dim=None),
        SEQUENCES,
    ),
    "weight norm of a convolution": (
        lambda: weight_normed(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 3)),
        IMAGES,
    ),
}


def case(name):
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    net = make().double()
    params = {k: p.detach().clone() for k, p in net.named_parameters()}
    labels = torch.arange(4) % 3
    return params, (lambda p: functional_call(net, p, (inputs,))), labels


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_its_second_derivative(name):
    params, outputs, labels = case(name)
    vector = draw(flatten(params).numel())
    loss = lambda p: F.cross_entropy(outputs(p), labels)  # noqa: E731
    op = Hessian(loss, params)
    expected = finite_difference_product(loss, params, vector)
    assert relative(op @ vector, expected) < 1e-6
    block = op @ torch.stack([vector, 2 * vector], dim=1)
    assert relative(block[:, 1] / 2, expected) < 1e-6
    assert asymmetry(op) < 1e-12


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_its_gauss_newton_matrix_and_weights(name):
    params, outputs, labels = case(name)
    vector, step = draw(flatten(params).numel()), 1e-5
    shift = unflatten(step * vector, params)
    with torch.no_grad():
        up = outputs({k: p + shift[k] for k, p in params.items()})
        down = outputs({k: p - shift[k] for k, p in params.items()})
        losses = [F.cross_entropy(z, labels, reduction="none") for z in (up, down)]
    op = GaussNewton(outputs, lambda z: z.square().sum(), params)
    # ⟨v, JᵀHJ v⟩ = 2 ‖J v‖².
    tangent = (up - down) / (2 * step)
    assert float(vector @ (op @ vector)) == pytest.approx(2 * float(tangent.square().sum()))
    found = weight_gradient(
        lambda p: F.cross_entropy(outputs(p), labels, reduction="none"), params, vector
    )
    assert relative(found, -(losses[0] - losses[1]) / (2 * step)) < 1e-6


def test_bags_of_any_length_are_sums_over_their_rows():
    table, words = draw(7, 6), torch.tensor([1, 2, 2, 5, 0, 6])
    weights = draw(6, seed=1)
    for offsets, last in ((torch.tensor([0, 2, 2]), False), (torch.tensor([0, 2, 2, 6]), True)):
        for mode in ("sum", "mean"):
            per_sample = weights if mode == "sum" else None
            settings = {"mode": mode, "include_last_offset": last, "per_sample_weights": per_sample}

            def loss(p, offsets=offsets, settings=settings):
                return (
                    torch.tanh(F.embedding_bag(words, p["t"], offsets, **settings)).square().sum()
                )

            vector = draw(42, seed=2)
            expected = finite_difference_product(loss, {"t": table}, vector)
            assert relative(Hessian(loss, {"t": table}) @ vector, expected) < 1e-6


# Checkpointing.


class Checkpointed(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 6), nn.Dropout(dropout), nn.Tanh(), nn.Linear(6, 6))
        self.head, self.on = nn.Linear(6, 3), True

    def forward(self, x):
        hidden = checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x)
        return self.head(torch.tanh(hidden))


X, LABELS = draw(5, 8), torch.arange(5) % 3


def checkpointed(shift=0.0, **settings):
    net = Checkpointed(**settings).double()
    params = {k: p.detach() + shift for k, p in net.named_parameters()}
    return net, params, lambda p: F.cross_entropy(functional_call(net, p, (X,)), LABELS)


def test_checkpointing_at_the_modules_own_parameters_is_right():
    net, params, loss = checkpointed()
    vector = draw(flatten(params).numel())
    found = Hessian(loss, params) @ vector
    net.on = False
    assert relative(found, Hessian(loss, params) @ vector) < 1e-12


@pytest.mark.parametrize("shift", [1e-3, 1.0])
def test_checkpointing_at_other_parameters_is_refused(shift):
    """Torch recomputes with the module's own, and says nothing."""
    net, params, loss = checkpointed(shift)
    outputs = lambda p: functional_call(net, p, (X,))  # noqa: E731
    for build in (
        lambda: Hessian(loss, params),
        lambda: GaussNewton(outputs, lambda z: F.cross_entropy(z, LABELS), params),
        lambda: implicit_gradient(
            lambda p, h: h * flatten(p).square().sum(), loss, params, torch.tensor(1.0), Exact()
        ),
    ):
        with pytest.raises(ValueError, match="recomputed with other parameters"):
            build()


def test_checkpointing_with_dropout_and_other_hooks_are_let_through():
    _, params, loss = checkpointed(dropout=0.5)
    assert asymmetry(Hessian(loss, params)) < 1e-12
    net, params, loss = checkpointed()
    net.on = False
    with torch.autograd.graph.save_on_cpu():
        assert asymmetry(Hessian(loss, params)) < 1e-12


@pytest.mark.parametrize("requires_grad", [True, False])
def test_reentrant_checkpointing_is_refused(requires_grad):
    params = {"a": draw(8, 6), "c": draw(6, 3, seed=1)}
    inputs = X.clone().requires_grad_(requires_grad)

    def loss(p):
        hidden = checkpoint(lambda t: torch.tanh(t @ p["a"]), inputs, use_reentrant=True)
        return F.cross_entropy(hidden @ p["c"], LABELS)

    with pytest.raises(ValueError, match="use_reentrant=False"):
        Hessian(loss, params)


# Modes.


def simple():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, {k: p.detach().clone() for k, p in net.named_parameters()}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(mode):
    net, params = simple()
    weights = torch.ones(5, dtype=DOUBLE)

    def losses(p):
        return F.cross_entropy(functional_call(net, p, (X,)), LABELS, reduction="none")

    def solve(params):
        return implicit_gradient(
            lambda p, h: (h * losses(p)).mean(),
            lambda p: losses(p).sum(),
            params,
            weights,
            ConjugateGradient(damping=1.0),
            curvature=Hessian,
        )

    expected, _ = solve(params)
    with mode():
        found, _ = solve({k: p.clone() for k, p in params.items()})
    torch.testing.assert_close(found.clone(), expected)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_what_changed_in_place_is_named():
    net, params = simple()
    data = X.clone()
    op = Hessian(lambda p: F.cross_entropy(functional_call(net, p, (data,)), LABELS), params)
    data.add_(1)
    with pytest.raises(RuntimeError, match="changed in place since this Hessian was made"):
        op @ draw(op.shape[0])


# What a function has to look at.


def test_a_forgotten_functional_call_is_refused():
    net, params = simple()
    forgotten = lambda *_: F.cross_entropy(net(X), LABELS)  # noqa: E731
    good = lambda p: F.cross_entropy(functional_call(net, p, (X,)), LABELS)  # noqa: E731
    one, vector = torch.tensor(1.0, dtype=DOUBLE), draw(flatten(params).numel())
    with_hyper = lambda p, h: h * good(p)  # noqa: E731
    for build in (
        lambda: Hessian(forgotten, params),
        lambda: GaussNewton(lambda p: net(X), lambda z: z.square().sum(), params),
        lambda: EmpiricalFisher(lambda p: net(X).sum(1), params),
        lambda: weight_gradient(lambda p: net(X).sum(1), params, vector),
        lambda: implicit_gradient(forgotten, good, params, one, Exact()),
        lambda: implicit_gradient(with_hyper, lambda p: forgotten(), params, one, Exact()),
        lambda: implicit_gradient(
            lambda p, h: h * forgotten(),
            good,
            params,
            one,
            Exact(damping=1.0),
            curvature=lambda _, p: Hessian(good, p),
        ),
        lambda: darts_gradient(lambda p, h: h * forgotten(), good, params, one, learning_rate=0.1),
        lambda: unrolled_gradient(lambda p, h: p, params, one, lambda p: forgotten(), 2),
        lambda: Hessian(lambda p: torch.zeros(()), params),
    ):
        with pytest.raises(ValueError, match="does not depend on the parameters it is given"):
            build()


def test_an_outer_loss_of_the_hyperparameters_alone_is_taken():
    found, _ = implicit_gradient(
        lambda p, h: (p["w"] - h).square().sum(),
        lambda p, hyper: 3 * hyper,
        {"w": torch.ones(2)},
        torch.tensor(1.0),
        Exact(),
    )
    assert float(found) == 3


def test_an_optional_batch_is_not_taken_for_hyperparameters():
    def outer(params, batch=None):
        return params["w"].square().sum() * (1 if batch is None else 100)

    found, _ = implicit_gradient(
        lambda p, h: (p["w"] - h).square().sum(),
        outer,
        {"w": torch.ones(3)},
        torch.ones(3),
        Exact(),
    )
    torch.testing.assert_close(found, 2 * torch.ones(3))


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ([torch.ones(3)], "must map names to tensors, got a list"),
        (nn.Linear(2, 2), r"got a Linear; give dict\(module.named_parameters\(\)\)"),
        (nn.Linear(2, 2).named_parameters(), "got a generator"),
        ({}, "params is empty"),
        ({"w": torch.ones(0)}, "holds no numbers"),
        ({"w": 1.0}, "must be a tensor, got a float"),
        ({"w": torch.ones(2), "n": torch.tensor(3)}, r"params\['n'\] is torch.int64"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"w": torch.ones(2), "b": torch.ones(2, dtype=DOUBLE)}, "mixes torch.float32"),
        (
            {"w": torch.ones(2), "b": torch.ones(2, requires_grad=True)},
            r"frozen parameters beside others \(w",
        ),
    ],
)
def test_what_are_no_parameters_is_refused(params, reason):
    loss = lambda p: sum(t.square().sum() for t in p.values())  # noqa: E731
    for use in (
        lambda: Hessian(loss, params),
        lambda: weight_gradient(loss, params, torch.ones(2)),
        lambda: implicit_gradient(
            lambda p, h: h * loss(p), loss, params, torch.tensor(1.0), Exact()
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=reason):
            use()


@pytest.mark.parametrize(
    ("hyper", "reason"),
    [
        ({"l": 0.1}, r"hyper\['l'\] must be a tensor, got a float"),
        ({"l": torch.tensor(0.5), "x": None}, r"hyper\['x'\] must be a tensor, got a NoneType"),
        ([torch.tensor(3)], r"hyper\[0\] is torch.int64"),
        (nn.Linear(2, 2), "got a module"),
        ({}, "hyper is empty"),
    ],
)
def test_what_are_no_hyperparameters_is_refused(hyper, reason):
    params = {"w": torch.ones(3)}
    with pytest.raises((TypeError, ValueError), match=reason):
        implicit_gradient(
            lambda p, h: p["w"].square().sum(), lambda p: p["w"].sum(), params, hyper, Exact()
        )
    with pytest.raises((TypeError, ValueError), match=reason):
        unrolled_gradient(lambda p, h: p, params, hyper, lambda p: p["w"].sum(), 1)


def test_other_slips_get_one_sentence_each():
    params, one = {"w": torch.ones(3)}, torch.tensor(1.0)
    square = lambda p: p["w"].square().sum()  # noqa: E731
    inner = lambda p, h: h * square(p)  # noqa: E731
    op = Hessian(lambda p: p["w"].pow(4).sum(), params)
    slips = [
        (lambda: implicit_gradient(inner, square, params, one, Exact), r"such as Exact\(\)"),
        (lambda: implicit_gradient(inner, lambda p: p["w"], params, one, Exact()), "outer must"),
        (lambda: Hessian(lambda p: p["w"], params), "loss must give a scalar"),
        (lambda: Hessian(lambda p: 1.0, params), "loss must give a tensor, got a float"),
        (
            lambda: GaussNewton(lambda p: p["w"], lambda z: z, params),
            "output_loss must give a scalar",
        ),
        (
            lambda: GaussNewton(lambda p: p["w"], lambda z: torch.ones(()), params),
            "output_loss does not depend",
        ),
        (lambda: Exact().solve(op, params), r"give flatten\(rhs\)"),
        (lambda: Exact().solve(op, torch.ones(3, dtype=DOUBLE)), r"rhs.to\(op.dtype\)"),
        (lambda: weight_gradient(lambda p: p["w"], params, params), r"give flatten\(v\)"),
        (lambda: weight_gradient(lambda p: p["w"], params, torch.ones(3).double()), "v is"),
        (lambda: Dense(torch.eye(2, dtype=torch.complex64)), "real floating-point"),
        (lambda: Dense(torch.eye(2, dtype=torch.int64)), "real floating-point"),
        (lambda: Dense(torch.full((2, 2), torch.nan)), "NaN or Inf"),
    ]
    for slip, reason in slips:
        with pytest.raises((TypeError, ValueError), match=reason):
            slip()


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, EmpiricalFisher])
def test_curvature_that_is_not_finite_is_named_by_every_method(kind):
    params, inputs = {"w": draw(3, 4)}, draw(5, 4, seed=1)

    def outputs(p):
        return inputs @ p["w"].T * torch.nan

    def build():
        if kind is Hessian:
            return Hessian(lambda p: outputs(p).square().sum(), params)
        if kind is GaussNewton:
            return GaussNewton(outputs, lambda z: F.cross_entropy(z, LABELS), params)
        return EmpiricalFisher(lambda p: outputs(p).sum(1), params)

    for method in Method.registry.values():
        solution = method().solve(build(), draw(12))
        assert solution.status == "diverged"
        assert not solution.value.any()
    assert all(torch.isnan(torch.tensor(extreme_eigenvalues(build()))))
    assert torch.isnan(torch.tensor(asymmetry(build())))
    for function in (spectral_density, lower_bound):
        with pytest.raises(ValueError, match="not finite"):
            function(build())


# The probe of symmetry, and what a claim of positive curvature is worth.


def test_the_probe_of_symmetry_takes_two_products():
    op = Dense(torch.diag(draw(30)))
    assert asymmetry(op) < 1e-15
    assert op.products == 2

    class Skewed(Dense):
        def _product(self, vector):
            return self.matrix @ vector + torch.roll(vector, 1)

    assert asymmetry(Skewed(torch.diag(draw(30)))) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_no_bound_is_issued_beside_negative_weights(seed):
    net, params = simple()
    weights = draw(5, seed=seed)
    weights[0] = -weights[0].abs() - 0.1

    def weighted(z):
        return (weights * F.cross_entropy(z, LABELS, reduction="none")).mean()

    outputs = lambda p: functional_call(net, p, (X,))  # noqa: E731
    op = GaussNewton(outputs, weighted, params)
    assert not op.positive_semidefinite
    assert op.smallest_eigenvalue is None
    for method in Method.registry.values():
        solution = method(damping=0.02).solve(op, draw(op.shape[0], seed=9))
        if solution.error_bound is not None:  # where the method found the spectrum itself
            matrix = op.dense() + 0.02 * torch.eye(op.shape[0], dtype=DOUBLE)
            exact = torch.linalg.solve(matrix, draw(op.shape[0], seed=9))
            error = (solution.value - exact).norm() / draw(op.shape[0], seed=9).norm()
            assert float(error) <= solution.error_bound * 1.01
    assert GaussNewton(outputs, lambda z: F.cross_entropy(z, LABELS), params).positive_semidefinite
    confident = lambda z: F.cross_entropy(50 * z, LABELS)  # noqa: E731
    assert GaussNewton(outputs, confident, params).positive_semidefinite
