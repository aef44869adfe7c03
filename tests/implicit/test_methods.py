"""Properties that every IHVP method must have; a new method is tested by existing."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import minres

from tests.implicit.problems import (
    DEFINITE,
    HARD,
    PROBLEM_NAMES,
    PROBLEMS,
    Counting,
    draw,
    relative,
    shifted,
    spd,
)
from weighmatch.implicit import (
    KFAC,
    Chebyshev,
    ConjugateGradient,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Exact,
    GaussNewton,
    Hessian,
    Identity,
    LinearOperator,
    Method,
    MinRes,
    Neumann,
    Nystrom,
    Woodbury,
    flatten,
    unflatten,
)
from weighmatch.implicit.method import _IterativeMethod

METHODS = sorted(Method.registry.items())
ITERATIVE = [(name, kind) for name, kind in METHODS if issubclass(kind, _IterativeMethod)]
ACCURATE = [(name, kind) for name, kind in METHODS if not kind.approximate]
each_accurate = pytest.mark.parametrize(("name", "kind"), ACCURATE)
each_method = pytest.mark.parametrize(("name", "kind"), METHODS)
each_iterative = pytest.mark.parametrize(("name", "kind"), ITERATIVE)
each_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
PRECONDITIONERS = {"Nystrom": Nystrom(rank=8), "KFAC": KFAC()}


def with_full_budget(kind, size, **settings):
    """A method that has all that it may need for a system of this size."""
    if issubclass(kind, _IterativeMethod):
        settings = {"max_products": 4000, "rtol": 1e-11, **settings}
    if kind is Nystrom:
        settings = {"rank": size, **settings}
    return kind(**settings)


STATUSES = ("converged", "budget", "negative_curvature", "diverged")


def variants(kind):
    """The method with its default budget, and with a large one to be spent."""
    yield kind()
    if issubclass(kind, _IterativeMethod):
        yield kind(max_products=200, rtol=0.0)


def test_all_methods_are_here():
    names = (
        "Exact Identity Neumann Chebyshev ConjugateGradient MinRes Nystrom Diagonal Woodbury KFAC"
    )
    assert {name for name, _ in METHODS} >= set(names.split())
    assert {name for name, _ in ITERATIVE} >= {
        "Neumann",
        "Chebyshev",
        "ConjugateGradient",
        "MinRes",
    }
    approximate = {name for name, kind in METHODS if kind.approximate}
    assert approximate == {"Identity", "Nystrom", "Diagonal", "KFAC"}


# Exactness.


@each_accurate
@pytest.mark.parametrize(("spectrum", "damping"), [("even", 0.0), ("even", 0.7), ("one", 1.0)])
def test_a_full_budget_gives_the_exact_solution(name, kind, spectrum, damping):
    eigenvalues = DEFINITE["even"] if spectrum == "even" else torch.logspace(-6, 1.5, 40)
    matrix, rhs = spd(eigenvalues)
    method = with_full_budget(kind, 40, damping=damping)
    solution = method.solve(Dense(matrix, positive_semidefinite=True), rhs)
    assert solution.status == "converged"
    assert relative(solution.value, torch.linalg.solve(shifted(matrix, damping), rhs)) < 1e-9


def test_approximate_methods_are_exact_where_their_approximation_is():
    matrix, rhs = spd(torch.linspace(0.5, 4, 30))
    exact = torch.linalg.solve(shifted(matrix, 0.3), rhs)
    assert relative(Nystrom(rank=30, damping=0.3).solve(Dense(matrix), rhs).value, exact) < 1e-10
    # What KFAC sees no layers in, it takes whole.
    assert relative(KFAC(damping=0.3).solve(Dense(matrix), rhs).value, exact) < 1e-10
    entries = torch.linspace(0.5, 4, 30, dtype=torch.float64)
    diagonal = Diagonal(probes=1, damping=0.3).solve(Dense(torch.diag(entries)), rhs)
    assert relative(diagonal.value, rhs / (entries + 0.3)) < 1e-14
    identity = Identity().solve(Dense(torch.eye(30, dtype=torch.float64)), rhs)
    for solution in (diagonal, identity):
        assert solution.status == "converged"


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0.5, 10.0), min_size=2, max_size=10),
    st.integers(0, 1000),
    st.floats(0.0, 2.0),
)
@pytest.mark.parametrize(("name", "kind"), ACCURATE)
def test_any_small_definite_system_is_solved(name, kind, eigenvalues, seed, damping):
    matrix, rhs = spd(eigenvalues, seed)
    solution = with_full_budget(kind, len(rhs), damping=damping).solve(Dense(matrix), rhs)
    assert relative(solution.value, torch.linalg.solve(shifted(matrix, damping), rhs)) < 1e-8


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=12),
    st.integers(0, 1000),
    st.floats(0.0, 2.0),
)
@pytest.mark.parametrize(("name", "kind"), METHODS)
def test_any_small_symmetric_system_keeps_the_contract(name, kind, eigenvalues, seed, damping):
    matrix, rhs = spd(eigenvalues, seed)
    solution = check_contract(kind(damping=damping), matrix, rhs)
    assert solution.status in STATUSES


@each_method
@each_precision
@pytest.mark.parametrize("spectrum", [*DEFINITE, *HARD])
def test_the_contract_holds_on_hard_spectra(name, kind, dtype, spectrum):
    matrix, rhs = spd({**DEFINITE, **HARD}[spectrum], dtype=dtype)
    for method in variants(kind):
        for damping in (0.0, 1e-6, 1e-2):
            solution = check_contract(replace(method, damping=damping), matrix, rhs)
            assert solution.products <= getattr(method, "max_products", math.inf)


@pytest.mark.parametrize("preconditioner", ["Nystrom", "KFAC"])
@each_precision
@pytest.mark.parametrize("spectrum", [*DEFINITE, *HARD])
def test_the_contract_holds_with_a_preconditioner(preconditioner, dtype, spectrum):
    matrix, rhs = spd({**DEFINITE, **HARD}[spectrum], dtype=dtype)
    for budget in (20, 100):
        method = ConjugateGradient(
            max_products=budget, preconditioner=PRECONDITIONERS[preconditioner]
        )
        assert check_contract(method, matrix, rhs).products <= budget


def check_contract(method, matrix, rhs):
    """Finite, honest residual, true bound, true count, a status that fits."""
    counting = Counting(matrix)
    counting.smallest_eigenvalue = Dense(matrix).smallest_eigenvalue
    solution = method.solve(counting, rhs)
    assert solution.value.dtype == rhs.dtype
    assert solution.value.shape == rhs.shape
    assert torch.isfinite(solution.value).all()
    damped, length = shifted(matrix, method.damping), float(rhs.double().norm())
    wide = solution.value.double()
    residual = float((damped @ wide - rhs.double()).norm()) / length
    magnitude = 1 + float(torch.linalg.matrix_norm(damped, 2)) * float(wide.norm()) / length
    rounding = 10 * torch.finfo(rhs.dtype).eps * magnitude
    # Neumann's last, extrapolated residual may be off by 1 %.
    assert solution.residual == pytest.approx(residual, rel=0.015, abs=rounding)
    assert solution.products == counting.products == counting.seen
    if isinstance(method, _IterativeMethod):
        assert solution.products <= method.max_products
    if solution.status == "converged":
        assert residual <= max(1.2 * getattr(method, "rtol", 1e-6), 1e-4) + rounding
    eigenvalues = torch.linalg.eigvalsh(damped)
    if solution.error_bound is not None:
        exact = torch.linalg.solve(damped, rhs.double())
        assert float((wide - exact).norm()) / length <= solution.error_bound * (1 + 1e-9)
    elif eigenvalues[0] > 1e-9:
        pytest.fail("no bound although the spectrum is known")
    return solution


# Never worse than zero, and as good as SciPy.

SAFE = [(name, kind) for name, kind in METHODS if kind().shorten]
SINGULAR = {
    "half": torch.cat([torch.zeros(20), torch.ones(20)]),
    "range of condition 30": torch.cat([torch.zeros(20), torch.linspace(0.1, 3, 60)]),
    "range of condition 1e4": torch.cat([torch.zeros(10), torch.logspace(-4, 0, 50)]),
    "rank one": torch.cat([torch.zeros(39), torch.ones(1)]),
    "condition 1e12": torch.logspace(-12, 0, 60),
    "condition 1e10, large": torch.logspace(-8, 2, 60),
}
INDEFINITE = torch.cat([torch.zeros(20), torch.linspace(0.1, 3, 30), -torch.linspace(0.1, 2, 30)])


def test_only_kfac_keeps_what_is_worse_than_zero():
    assert {name for name, _ in METHODS} - {name for name, _ in SAFE} == {"KFAC"}


@pytest.mark.parametrize(("name", "kind"), SAFE)
@each_precision
@pytest.mark.parametrize("spectrum", [*DEFINITE, *HARD, *SINGULAR])
def test_no_method_hands_back_worse_than_zero(name, kind, dtype, spectrum):
    matrix, rhs = spd({**DEFINITE, **HARD, **SINGULAR}[spectrum], dtype=dtype)
    for method in variants(kind):
        for damping in (0.0, 1e-8, 1e-4):
            solution = replace(method, damping=damping).solve(Dense(matrix), rhs)
            assert solution.residual <= 1 + 10 * torch.finfo(dtype).eps


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 6),
    st.integers(0, 1000),
    st.integers(2, 60),
    st.sampled_from([torch.float32, torch.float64]),
)
@pytest.mark.parametrize(("name", "kind"), SAFE)
def test_nor_on_gauss_newton_matrices_of_few_examples(name, kind, examples, seed, budget, dtype):
    inputs, labels = draw(examples, 5, seed=seed, dtype=dtype), torch.arange(examples) % 3
    params = {"w": draw(4, 5, seed=seed + 1, dtype=dtype), "o": draw(3, 4, seed=2, dtype=dtype)}
    op = GaussNewton(
        lambda p: torch.tanh(inputs @ p["w"].T) @ p["o"].T,
        lambda z: F.cross_entropy(z, labels),
        params,
    )
    method = kind(max_products=budget) if issubclass(kind, _IterativeMethod) else kind()
    solution = method.solve(op, draw(32, seed=seed + 3, dtype=dtype))
    assert solution.residual <= 1 + 10 * torch.finfo(dtype).eps
    assert torch.isfinite(solution.value).all()


def test_shortening_keeps_the_direction_to_the_last_bit():
    matrix, rhs = spd(torch.linspace(1, 50, 30))
    found = Identity().solve(Dense(matrix), rhs)
    kept = Identity(shorten=False).solve(Dense(matrix), rhs)
    exponent = math.log2(float(kept.value[0] / found.value[0]))
    assert exponent.is_integer()
    assert torch.equal(found.value * 2**exponent, kept.value)
    assert found.residual < 1
    assert found.status == "budget"
    torch.testing.assert_close(kept.value, rhs)
    assert kept.residual > 1
    assert kept.status == "diverged"


def test_where_no_length_helps_the_value_is_zero():
    op = Dense(-torch.eye(3, dtype=torch.float64))
    solution = Identity().solve(op, torch.ones(3, dtype=torch.float64))
    assert not solution.value.any()
    assert solution.residual == 1
    assert solution.status == "diverged"


def by_scipy(matrix, rhs, budget):
    found, _ = minres(matrix.numpy(), rhs.numpy(), rtol=1e-6, maxiter=budget - 1)
    wide = matrix.double() @ torch.as_tensor(found).double() - rhs.double()
    return float(wide.norm() / rhs.double().norm())


@each_precision
@pytest.mark.parametrize("budget", [10, 40, 160, 640])
@pytest.mark.parametrize("spectrum", [*SINGULAR, *DEFINITE, "indefinite and singular"])
def test_minres_is_no_worse_than_scipys(spectrum, budget, dtype):
    known = {**SINGULAR, **DEFINITE, "indefinite and singular": INDEFINITE}
    # Where rounding decides, neither is always the better one.
    slack = 1.4 if "condition 1e1" in spectrum else 1.02
    rounding = 1e-6 if dtype == torch.float64 else 1e-3
    for seed in range(3):
        matrix, rhs = spd(known[spectrum], seed, dtype=dtype)
        solution = MinRes(max_products=budget).solve(Dense(matrix), rhs)
        assert solution.residual <= slack * by_scipy(matrix, rhs, budget) + rounding


@pytest.mark.parametrize("spectrum", [*list(SINGULAR)[:3], "indefinite and singular"])
def test_minres_stops_at_the_least_squares_solution(spectrum):
    matrix, rhs = spd({**SINGULAR, "indefinite and singular": INDEFINITE}[spectrum])
    solution = MinRes(max_products=1000).solve(Dense(matrix), rhs)
    best = torch.linalg.lstsq(matrix, rhs, driver="gelsd").solution
    assert relative(matrix @ solution.value, matrix @ best) < 1e-5
    assert solution.status == "negative_curvature"
    assert solution.products < 200
    assert solution.error_bound is None


@each_method
def test_a_claim_that_the_solve_refutes_bounds_nothing(name, kind):
    """The damping makes up for the negative curvature, so that nothing else goes wrong."""
    matrix, rhs = spd(torch.linspace(-0.5, 3, 12))
    op = Counting(matrix)
    op.positive_semidefinite = True
    for method in (with_full_budget(kind, 12, damping=0.6), kind(damping=0.6)):
        solution = method.solve(op, rhs)
        # A method of one's own need not look for what refutes the claim.
        blind = name in ("Diagonal", "Identity", "KFAC") or not kind.__module__.startswith(
            "weighmatch"
        )
        if solution.error_bound is not None and not blind:
            exact = torch.linalg.solve(shifted(matrix, 0.6), rhs)
            error = float((solution.value - exact).norm() / rhs.norm())
            assert error <= solution.error_bound * (1 + 1e-9)


class Skew(LinearOperator):
    """Not symmetric, whatever it says."""

    def _product(self, vector):
        return vector + 3 * torch.roll(vector, 1) - torch.roll(vector, 2)


@each_accurate
def test_a_matrix_that_is_not_symmetric_is_not_called_solved(name, kind):
    op = Skew(12, torch.float64, torch.device("cpu"))
    solution = with_full_budget(kind, 12).solve(op, draw(12))
    image = torch.stack([op @ e for e in torch.eye(12, dtype=torch.float64)], dim=1)
    residual = float((image @ solution.value - draw(12)).norm() / draw(12).norm())
    assert solution.residual == pytest.approx(residual, rel=1e-6, abs=1e-9)
    assert solution.status != "converged" or residual < 1e-6


# What a budget buys.


def errors(methods, op, rhs, norm):
    exact = torch.linalg.solve(op.matrix, rhs)
    return [norm(method.solve(op, rhs).value - exact) for method in methods]


def euclidean(vector):
    return float(vector.norm())


@pytest.mark.parametrize("kind", [ConjugateGradient, MinRes])
@pytest.mark.parametrize("spectrum", ["even", "condition 1e4", "one outlier"])
def test_krylov_errors_fall_with_every_product(kind, spectrum):
    """In the norm of C and in the Euclidean one (Hestenes & Stiefel; Fong & Saunders, 2012)."""
    matrix, rhs = spd(DEFINITE[spectrum])
    op = Dense(matrix)
    methods = [kind(max_products=k, rtol=0.0) for k in range(2, 30)]
    for norm in (euclidean, lambda e: float(e @ matrix @ e) ** 0.5):
        found = errors(methods, op, rhs, norm)
        start = norm(torch.linalg.solve(matrix, rhs))
        for before, after in zip([start, *found], found, strict=False):
            assert after <= before * (1 + 1e-9) + 1e-9 * start


@pytest.mark.parametrize("spectrum", ["even", "condition 1e4", "one outlier"])
def test_minres_has_the_smallest_residual_and_it_falls(spectrum):
    matrix, rhs = spd(DEFINITE[spectrum])
    op = Dense(matrix)
    residuals = []
    for k in range(2, 25):
        residuals.append(MinRes(max_products=k, rtol=0.0).solve(op, rhs).residual)
        cg = ConjugateGradient(max_products=k, rtol=0.0).solve(op, rhs).residual
        assert residuals[-1] <= cg * (1 + 1e-6) + 1e-12
    for before, after in itertools.pairwise(residuals):
        assert after <= before * (1 + 1e-9) + 1e-13


@pytest.mark.parametrize("spectrum", ["even", "condition 1e4", "one outlier"])
def test_the_published_neumann_error_falls_with_every_product(spectrum):
    matrix, rhs = spd(DEFINITE[spectrum])
    step = 1 / float(DEFINITE[spectrum].max())
    methods = [
        Neumann(step=step, max_products=k, rtol=0.0, extrapolate=False) for k in range(2, 60)
    ]
    found = errors(methods, Dense(matrix), rhs, euclidean)
    assert all(after < before for before, after in itertools.pairwise(found))


@each_iterative
@pytest.mark.parametrize("spectrum", ["even", "condition 1e4", "two clusters"])
def test_twice_the_budget_is_no_worse(name, kind, spectrum):
    matrix, rhs = spd(DEFINITE[spectrum])
    methods = [kind(max_products=k, rtol=0.0) for k in (5, 10, 20, 40, 80, 160)]
    found = errors(methods, Dense(matrix, positive_semidefinite=True), rhs, euclidean)
    for before, after in itertools.pairwise(found):
        rounding = 1e-11 * euclidean(torch.linalg.solve(matrix, rhs))
        assert after <= max(before, 1e-10 * found[0], rounding)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        torch.logspace(-2, 1, 100),
        torch.logspace(-3, 0, 200),
        torch.linspace(0.05, 10, 150),
        torch.cat([torch.linspace(0.1, 1, 95), torch.linspace(20, 50, 5)]),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_at_forty_products_methods_rank_as_in_theory(eigenvalues, seed):
    matrix, rhs = spd(eigenvalues, seed)
    op = Dense(matrix, positive_semidefinite=True)
    methods = [kind(max_products=40, rtol=0.0) for kind in (ConjugateGradient, Chebyshev, Neumann)]
    cg, chebyshev, neumann, identity = errors([*methods, Identity()], op, rhs, euclidean)
    assert cg <= chebyshev <= neumann < identity


def test_neumann_without_extrapolation_is_the_truncated_series():
    matrix, rhs = spd(DEFINITE["condition 1e4"])
    step, damping = 0.05, 0.1
    damped = shifted(matrix, damping)
    power = torch.eye(40, dtype=torch.float64) - step * damped
    term, total = step * rhs, step * rhs
    for terms in range(2, 30):
        method = Neumann(
            step=step, damping=damping, max_products=terms, rtol=0.0, extrapolate=False
        )
        term = power @ term
        total = total + term
        # One product a term, and the last one is the check of the residual.
        solution = method.solve(Dense(matrix), rhs)
        torch.testing.assert_close(solution.value, total)


def test_neumann_extrapolates_to_a_smaller_residual():
    matrix, rhs = spd(DEFINITE["condition 1e4"])
    for budget in (5, 10, 20, 40):
        published = Neumann(step=0.1, max_products=budget, extrapolate=False)
        longer = replace(published, extrapolate=True)
        op = Dense(matrix)
        assert longer.solve(op, rhs).residual < published.solve(op, rhs).residual


@each_iterative
@pytest.mark.parametrize("budget", [2, 3, 4, 7, 40])
def test_the_budget_bounds_everything_spent(name, kind, budget):
    matrix, rhs = spd(torch.logspace(-3, 1, 50))
    op, state = Counting(matrix), {}
    for _ in range(2):
        before = op.seen
        solution = kind(max_products=budget, rtol=0.0).solve(op, rhs, state)
        assert op.seen - before == solution.products <= budget
        # The residual of conjugate gradients may grow on its way.
        assert solution.residual <= 1.0 + 1e-9 or kind is ConjugateGradient


@pytest.mark.parametrize("budget", [2, 3, 4, 7, 40, 120])
@pytest.mark.parametrize("preconditioner", ["Nystrom", "KFAC"])
def test_the_budget_bounds_a_preconditioner_too(budget, preconditioner):
    matrix, rhs = spd(torch.logspace(-3, 1, 50))
    op, state = Counting(matrix), {}
    method = ConjugateGradient(
        max_products=budget, rtol=0.0, preconditioner=PRECONDITIONERS[preconditioner]
    )
    for _ in range(2):
        before = op.seen
        solution = method.solve(op, rhs, state)
        assert op.seen - before == solution.products <= budget
        assert solution.value.any()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Exact(), 31),
        (Woodbury(), 31),
        (Identity(), 1),
        (Nystrom(rank=7), 10),
        (Nystrom(rank=7, complement="damping", damping=1.0), 8),
        (Diagonal(probes=21), 22),
        (KFAC(), 31),
    ],
)
def test_direct_methods_spend_what_they_say(method, expected):
    matrix, rhs = spd(torch.linspace(1, 2, 30))
    op = Counting(matrix)
    assert method.solve(op, rhs).products == op.seen == expected


@each_iterative
def test_an_iterative_method_stops_at_its_tolerance(name, kind):
    matrix, rhs = spd(torch.linspace(1, 2, 30))
    loose = kind(max_products=400, rtol=1e-2).solve(Dense(matrix), rhs)
    tight = kind(max_products=400, rtol=1e-8).solve(Dense(matrix), rhs)
    assert loose.status == tight.status == "converged"
    assert loose.products < tight.products < 100
    assert 1e-8 < loose.residual <= 1.1e-2
    assert tight.residual <= 1.1e-8
    assert kind(max_products=4, rtol=1e-8).solve(Dense(matrix), rhs).status == "budget"


# Parametrisation.


def network(params):
    inputs = draw(12, 4, seed=5)
    z = torch.tanh(inputs @ params["w"].T + params["b"]) @ params["v"].T
    return F.cross_entropy(z, torch.arange(12) % 3) + 0.05 * sum(
        p.square().sum() for p in params.values()
    )


PARAMS = {"w": draw(4, 4), "b": draw(4, seed=1), "v": draw(3, 4, seed=2)}


def split_and_reshaped(tree):
    """The same entries in the same order, in other tensors."""
    return {"w1": tree["w"][:1], "w2": tree["w"][1:], "b": tree["b"].view(2, 2), "v": tree["v"]}


def reordered(tree):
    return {"v": tree["v"].reshape(-1), "w": tree["w"], "b": tree["b"]}


def from_split(tree):
    return {"w": torch.cat([tree["w1"], tree["w2"]]), "b": tree["b"].view(4), "v": tree["v"]}


def from_reordered(tree):
    return {"w": tree["w"], "b": tree["b"], "v": tree["v"].view(3, 4)}


def solved(method, forth, back):
    params = forth(PARAMS)
    rhs = flatten(forth(unflatten(draw(32, seed=3), PARAMS)))
    solution = method.solve(Hessian(lambda p: network(back(p)), params), rhs)
    return flatten(back(unflatten(solution.value, params))), solution.residual


@each_method
def test_splitting_and_reshaping_parameters_changes_nothing(name, kind):
    method = kind(damping=1.0)
    plain, residual = solved(method, dict, dict)
    other, other_residual = solved(method, split_and_reshaped, from_split)
    torch.testing.assert_close(other, plain)
    assert other_residual == pytest.approx(residual, rel=1e-6, abs=1e-12)


@each_method
def test_reordering_parameters_reorders_the_solution(name, kind):
    method = kind(damping=1.0)
    if kind is Nystrom:
        method = replace(method, rank=32)  # a random sketch lies elsewhere
    if kind is Diagonal:
        method = replace(method, probes=4000)
    plain, _ = solved(method, dict, dict)
    other, _ = solved(method, reordered, from_reordered)
    assert relative(other, plain) < (3e-2 if kind is Diagonal else 1e-7)


# State.


@each_method
def test_no_state_leaks_between_calls(name, kind):
    matrix, rhs = spd(torch.linspace(0.5, 3, 15))
    method = kind(damping=0.1)
    first = method.solve(Dense(matrix), rhs)
    method.solve(Dense(3 * matrix), 2 * rhs)
    assert torch.equal(method.solve(Dense(matrix), rhs).value, first.value)


@each_method
def test_a_state_saves_products_and_changes_no_answer(name, kind):
    matrix, rhs = spd(torch.linspace(0.5, 3, 30))
    method = with_full_budget(kind, 20, damping=0.1)
    op, state = Counting(matrix), {}
    first = method.solve(op, rhs, state)
    kept = set(state)
    again = method.solve(op, rhs, state)
    assert set(state) == kept
    if kept:
        assert again.products < first.products
    assert relative(again.value, first.value) < 1e-9
    assert again.status == first.status
    expected = {
        "Neumann": {"largest_eigenvalue"},
        "Chebyshev": {"largest_eigenvalue"},
        "Nystrom": {"sketch"},
        "Diagonal": {"diagonal"},
        "KFAC": {"kfac"},
    }
    if name in expected:
        assert kept == expected[name]


@each_method
def test_a_state_of_another_size_is_not_used(name, kind):
    state = {}
    kind(damping=0.1).solve(Dense(spd(torch.linspace(0.5, 3, 12))[0]), draw(12), state)
    matrix, rhs = spd(torch.linspace(0.5, 3, 15))
    solution = kind(damping=0.1).solve(Dense(matrix), rhs, state)
    fresh = kind(damping=0.1).solve(Dense(matrix), rhs)
    assert relative(solution.value, fresh.value) < 1e-2


@pytest.mark.parametrize("kind", [Neumann, Chebyshev])
@pytest.mark.parametrize("growth", [1.3, 2.5, 10.0, 1000.0])
def test_a_largest_eigenvalue_that_no_longer_holds_is_probed_again(kind, growth):
    matrix, rhs = spd(torch.linspace(1, 10, 20))
    state = {}
    first = kind(max_products=60).solve(Dense(matrix), rhs, state)
    assert state["largest_eigenvalue"] >= 0.99 * 10
    again = kind(max_products=60).solve(Dense(matrix), rhs, state)
    assert again.residual <= first.residual  # no products went into a probe
    grown = kind(max_products=60).solve(Dense(growth * matrix), rhs, state)
    fresh = kind(max_products=60).solve(Dense(growth * matrix), rhs)
    assert grown.status in ("converged", "budget")
    assert grown.products <= 60
    assert grown.residual < 3 * fresh.residual + 1e-6
    if growth > 2:
        assert state["largest_eigenvalue"] >= 0.99 * growth * 10


@pytest.mark.parametrize("kind", [Neumann, Chebyshev])
@pytest.mark.parametrize("budget", [2, 3, 4, 5, 8, 12, 20])
def test_a_second_probe_stays_inside_of_the_budget(kind, budget):
    matrix, rhs = spd(torch.linspace(1, 10, 20))
    for believed in (1e-9, 0.1, 3.0):
        op = Counting(matrix)
        solution = kind(max_products=budget).solve(op, rhs, {"largest_eigenvalue": believed})
        assert solution.products == op.seen <= budget
        assert solution.residual <= 1 + 1e-9


@pytest.mark.parametrize("kind", [Neumann, Chebyshev])
def test_growth_by_negative_curvature_is_named(kind):
    matrix, rhs = spd(torch.linspace(-1, 3, 20))
    solution = kind(max_products=60).solve(Dense(matrix), rhs)
    assert solution.status == "negative_curvature"
    assert solution.residual <= 1
    assert solution.error_bound is None


@pytest.mark.parametrize("kind", [Neumann, Chebyshev])
def test_a_probe_from_the_flat_part_does_no_harm(kind):
    """The first right-hand side has next to nothing along the steep directions."""
    eigenvalues = torch.logspace(-3, 0, 60).double()
    op, state = Dense(torch.diag(eigenvalues)), {}
    flat = torch.where(eigenvalues < 0.1, draw(60), torch.zeros(60, dtype=torch.float64))
    method = kind(damping=0.01, max_products=60)
    method.solve(op, flat, state)
    rhs = draw(60, seed=1)
    carried, fresh = method.solve(op, rhs, state), method.solve(op, rhs)
    assert carried.status in ("converged", "budget")
    assert carried.residual < 2 * fresh.residual


OTHER_SETTINGS = [
    (Nystrom(rank=5), Nystrom(rank=5, seed=1)),
    (Diagonal(probes=5), Diagonal(probes=6)),
    (Diagonal(probes=5), Diagonal(probes=5, seed=1)),
]


@pytest.mark.parametrize(("first", "second"), OTHER_SETTINGS)
def test_a_state_made_with_other_settings_is_not_used(first, second):
    matrix, rhs = spd(torch.logspace(-2, 0, 30))
    state = {}
    first.solve(Dense(matrix), rhs, state)
    found = second.solve(Dense(matrix), rhs, state)
    assert torch.equal(found.value, second.solve(Dense(matrix), rhs).value)


@pytest.mark.parametrize("method", [Nystrom(rank=30, damping=0.01), Diagonal(damping=0.01)])
@pytest.mark.parametrize("factor", [0.1, 0.5, 3.0, 10.0])
def test_a_state_ages_as_the_curvature_moves_on(method, factor):
    matrix, rhs = spd(torch.logspace(-2, 0, 30))
    state = {}
    method.solve(Dense(matrix), rhs, state)
    carried = method.solve(Dense(factor * matrix), rhs, state)
    fresh = method.solve(Dense(factor * matrix), rhs)
    assert carried.residual <= max(0.1, 2 * fresh.residual)
    # What is as good as it was is kept.
    op = Counting(factor * matrix)
    method.solve(op, rhs, state)
    assert op.seen < 10


def test_a_preconditioner_that_no_longer_serves_is_dropped():
    matrix, rhs = spd(torch.cat([torch.logspace(0, 4, 10), torch.full((50,), 1e-2)]))
    other, _ = spd(torch.cat([torch.logspace(0, 4, 10), torch.full((50,), 1e-2)]), seed=5)
    method = ConjugateGradient(max_products=40, rtol=1e-8, preconditioner=Nystrom(rank=10))
    state = {}
    first = method.solve(Dense(matrix), rhs, state)
    assert first.status == "converged"
    sketch = state["sketch"]
    assert method.solve(Dense(matrix), rhs, state).status == "converged"
    assert state["sketch"] is sketch
    stale = method.solve(Dense(other), rhs, state)
    assert stale.status != "converged"
    assert "sketch" not in state
    assert method.solve(Dense(other), rhs, state).status == "converged"


@pytest.mark.parametrize("kind", [Neumann, Chebyshev])
def test_a_state_that_says_zero_does_no_harm(kind):
    state = {"largest_eigenvalue": 0.0}
    solution = kind().solve(Dense(torch.zeros(3, 3)), torch.ones(3), state)
    assert torch.isfinite(solution.value).all()


# Right-hand sides and settings.


@each_method
def test_bad_right_hand_sides_are_refused(name, kind):
    op = Counting(torch.eye(3))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="NaN or Inf"):
            kind().solve(op, torch.tensor([1.0, bad, 0.0]))
    for wrong in (torch.ones(4), torch.ones(3, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"shape \(3,\)"):
            kind().solve(op, wrong)
    assert op.seen == 0


@each_method
def test_zero_gives_zero(name, kind):
    solution = kind().solve(Dense(torch.eye(3)), torch.zeros(3))
    assert torch.equal(solution.value, torch.zeros(3))
    assert (solution.residual, solution.error_bound, solution.products) == (0.0, 0.0, 0)
    assert solution.status == "converged"


@each_method
@pytest.mark.parametrize("size", [1e-35, 1e-25, 1e25])
def test_a_scaled_right_hand_side_scales_the_solution(name, kind, size):
    """Also where squares of its entries leave single precision."""
    matrix, rhs = spd(torch.linspace(1, 2, 10), dtype=torch.float32)
    plain = kind(damping=0.1).solve(Dense(matrix), rhs)
    scaled = kind(damping=0.1).solve(Dense(matrix), size * rhs)
    assert relative(scaled.value.double() / size, plain.value) < 1e-5
    assert scaled.status == plain.status


@each_method
def test_the_solution_has_no_graph_and_the_right_hand_side_stays(name, kind):
    matrix, rhs = spd(torch.linspace(1, 2, 10))
    before = rhs.clone()
    solution = kind(damping=0.1).solve(Dense(matrix), rhs.requires_grad_())
    assert not solution.value.requires_grad
    assert torch.equal(rhs.detach(), before)


@each_method
def test_negative_damping_is_refused(name, kind):
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping"):
            kind(damping=bad)


@each_iterative
def test_budgets_and_tolerances_are_checked(name, kind):
    for bad in (0, 1, -3):
        with pytest.raises(ValueError, match="max_products"):
            kind(max_products=bad)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="rtol"):
            kind(rtol=bad)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Neumann, {"step": 0.0}),
        (Neumann, {"step": -1.0}),
        (Neumann, {"step": math.nan}),
        (Neumann, {"step": "fast"}),
        (Neumann, {"probe_products": 0}),
        (Chebyshev, {"probe_products": 0}),
        (Nystrom, {"rank": 0}),
        (Nystrom, {"complement": "none"}),
        (Diagonal, {"probes": 0}),
    ],
)
def test_other_settings_are_checked_too(kind, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)


# Statuses.


@pytest.mark.parametrize("kind", [ConjugateGradient, Exact, Woodbury])
def test_negative_curvature_is_named(kind):
    matrix, rhs = spd(torch.linspace(-1, 3, 20))
    assert kind().solve(Dense(matrix), rhs).status == "negative_curvature"
    if kind is not Woodbury:  # which cannot hold it even where damping makes up for it
        assert kind(damping=2.0).solve(Dense(matrix), rhs).status == "converged"


def test_woodbury_names_negative_curvature_that_damping_makes_up_for():
    op = Dense(torch.diag(torch.tensor([-0.5, 1.0, 2.0], dtype=torch.float64)))
    solution = Woodbury(damping=1.0).solve(op, torch.ones(3, dtype=torch.float64))
    assert solution.status == "negative_curvature"
    assert solution.residual > 0.1


def test_minres_solves_indefinite_systems():
    matrix, rhs = spd(torch.cat([-torch.linspace(0.5, 2, 15), torch.linspace(0.5, 3, 15)]))
    solution = MinRes(max_products=100, rtol=1e-10).solve(Dense(matrix), rhs)
    assert solution.status == "converged"
    assert relative(solution.value, torch.linalg.solve(matrix, rhs)) < 1e-8
    assert solution.error_bound is None  # a small residual says nothing there
    cg = ConjugateGradient(max_products=100, rtol=1e-10).solve(Dense(matrix), rhs)
    assert cg.status == "negative_curvature"


@pytest.mark.parametrize("seed", range(20))
def test_conjugate_gradients_hand_back_their_best_at_negative_curvature(seed):
    matrix, rhs = spd(torch.cat([torch.tensor([-2.0]), torch.logspace(-4, 2, 30)]), seed=seed)
    found = [
        ConjugateGradient(max_products=k, rtol=1e-12).solve(Dense(matrix), rhs)
        for k in range(2, 40)
    ]
    named = [s for s in found if s.status == "negative_curvature"]
    assert named
    before = [s.residual for s in found if s.status == "budget"]
    # Zero is an iterate too.
    assert named[-1].residual == pytest.approx(min([1.0, *before]), rel=1e-9)


def test_conjugate_gradients_hand_back_zero_where_they_have_nothing():
    matrix = torch.diag(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    solution = ConjugateGradient().solve(Dense(matrix), torch.tensor([2.0, 1.0]).double())
    assert solution.status == "negative_curvature"
    assert solution.residual == pytest.approx(1.0)
    assert not solution.value.any()


def test_chebyshev_steps_even_where_the_probe_takes_all():
    matrix, rhs = spd(torch.linspace(1, 10, 20))
    solution = Chebyshev(max_products=2).solve(Dense(matrix), rhs)
    assert solution.products == 2
    assert 0 < solution.residual < 1


def test_neumann_names_divergence_and_keeps_the_best_iterate():
    matrix, rhs = spd(torch.linspace(1, 10, 20))
    solution = Neumann(step=1.0, max_products=50).solve(Dense(matrix), rhs)
    assert solution.status == "diverged"
    assert solution.residual <= 1.0 + 1e-9


def test_neumann_never_hands_back_worse_than_it_measured():
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 100.0], dtype=torch.float64))
    rhs = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-3], dtype=torch.float64)
    for budget in range(2, 8):
        solution = Neumann(step=0.99, max_products=budget).solve(Dense(matrix), rhs)
        assert solution.residual <= 1.0 + 1e-12, budget
        assert solution.status == "diverged"


def test_exact_says_when_a_system_has_no_solution():
    op = Dense(torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)))
    assert Exact().solve(op, torch.ones(3, dtype=torch.float64)).status == "negative_curvature"
    inside = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert Exact().solve(op, inside).status == "converged"


# Operators that misbehave, and half types.


class Broken(LinearOperator):
    """Gives NaN."""

    def _product(self, vector):
        return torch.full_like(vector, math.nan)


class BreaksLater(Counting):
    """Gives Inf from the third product on."""

    def _product(self, vector):
        product = super()._product(vector)
        return product if self.seen < 3 else product * math.inf

    def _block_product(self, block):
        return torch.stack([self._product(column) for column in block.unbind(1)], dim=1)


class Same(LinearOperator):
    """The identity, handing back its very argument."""

    def _product(self, vector):
        return vector


@each_method
def test_an_operator_that_breaks_is_named_and_not_raised(name, kind):
    rhs = torch.ones(3, dtype=torch.float64)
    solution = kind().solve(Broken(3, torch.float64, torch.device("cpu")), rhs)
    assert solution.status in ("diverged", "negative_curvature")
    matrix, rhs = spd(torch.logspace(-2, 1, 20))
    later = kind().solve(BreaksLater(matrix), rhs)
    if kind is not Identity:
        assert later.status in ("diverged", "negative_curvature")
    for found in (solution, later):
        assert torch.isfinite(found.value).all()
        assert math.isfinite(found.residual)


@each_method
def test_an_operator_may_hand_back_its_argument(name, kind):
    rhs = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    solution = kind(damping=1.0).solve(Same(3, torch.float64, torch.device("cpu")), rhs)
    value = solution.value if name == "Identity" else 2 * solution.value
    torch.testing.assert_close(value, rhs)


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_work(name, kind, dtype):
    matrix, rhs = spd(torch.linspace(1, 3, 10), dtype=dtype)
    solution = kind(damping=0.1).solve(Dense((matrix + matrix.T) / 2), rhs)
    assert solution.value.dtype == dtype
    assert solution.status in ("converged", "budget")
    if not kind.approximate:
        assert solution.residual < 0.1


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spectrum", HARD)
def test_half_types_stay_finite(name, kind, dtype, spectrum):
    matrix, rhs = spd(HARD[spectrum], dtype=dtype)
    for method in variants(kind):
        solution = method.solve(Dense((matrix + matrix.T) / 2), rhs)
        assert torch.isfinite(solution.value).all()
        assert math.isfinite(solution.residual)


# Preconditioners and Woodbury.


def test_a_preconditioner_changes_the_way_and_not_the_end():
    matrix, rhs = spd(torch.logspace(-3, 1, 60))
    inverse = torch.linalg.inv(shifted(matrix, 1e-4))
    plain = ConjugateGradient(max_products=12).solve(Dense(matrix), rhs)
    better = ConjugateGradient(max_products=12, preconditioner=lambda r: inverse @ r).solve(
        Dense(matrix), rhs
    )
    assert better.residual < 1e-3 * plain.residual
    assert relative(better.value, torch.linalg.solve(matrix, rhs)) < 1e-2


@pytest.mark.parametrize("signs", [(1.0, -1.0), (-1.0, -1.0), (0.0, 0.0), (math.nan, 1.0)])
def test_a_preconditioner_that_is_not_positive_definite_does_not_raise(signs):
    signs = torch.tensor(signs, dtype=torch.float64)
    op = Dense(torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)))
    method = ConjugateGradient(preconditioner=lambda r: signs * r)
    solution = method.solve(op, torch.ones(2, dtype=torch.float64))
    assert solution.status in ("negative_curvature", "diverged")
    assert torch.isfinite(solution.value).all()


@pytest.mark.parametrize("damping", [1e-4, 1.0])
@pytest.mark.parametrize("name", PROBLEM_NAMES)
def test_woodbury_solves_with_the_empirical_fisher(name, damping):
    problem = PROBLEMS[name]()
    op = EmpiricalFisher(problem.example_losses, problem.params)
    rhs = draw(problem.size, seed=7)
    solution = Woodbury(damping=damping).solve(op, rhs)
    assert solution.status == "converged"
    assert solution.products == len(problem.inputs) + 1
    exact = torch.linalg.solve(shifted(op.dense(), damping), rhs)
    assert relative(solution.value, exact) < 1e-9


def test_woodbury_solves_with_gauss_newton_and_in_the_range_without_damping():
    problem = PROBLEMS["MLP"]()
    op = GaussNewton(problem.outputs, problem.output_loss, problem.params)
    rhs = op @ draw(problem.size, seed=7)
    solution = Woodbury().solve(op, rhs)
    assert solution.status == "converged"
    assert solution.residual < 1e-9
    outside = Woodbury().solve(op, draw(problem.size, seed=8))
    assert outside.status == "negative_curvature"
    assert torch.isfinite(outside.value).all()


def test_hutchinsons_diagonal_nears_the_true_one():
    matrix, rhs = spd(torch.linspace(1, 3, 20))
    state = {}
    found = []
    for probes in (10, 100, 10000):
        state = {}
        Diagonal(probes=probes).solve(Dense(matrix), rhs, state)
        found.append(relative(state["diagonal"].content, torch.diagonal(matrix)))
    assert found[2] < found[1] < found[0]
    assert found[2] < 0.01
    again = Diagonal(probes=10, seed=1).solve(Dense(matrix), rhs)
    assert not torch.equal(again.value, Diagonal(probes=10).solve(Dense(matrix), rhs).value)
