"""Properties that every IHVP method must have; a new method is tested by existing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weighmatch.implicit import (
    ConjugateGradient,
    Dense,
    Exact,
    Identity,
    LinearOperator,
    Method,
    Neumann,
)
from weighmatch.implicit.method import _IterativeMethod

METHODS = sorted(Method.registry.items())
ITERATIVE = [(name, kind) for name, kind in METHODS if issubclass(kind, _IterativeMethod)]
ACCURATE = [(name, kind) for name, kind in METHODS if not kind.approximate]
each_accurate = pytest.mark.parametrize(("name", "kind"), ACCURATE)
each_method = pytest.mark.parametrize(("name", "kind"), METHODS)
each_iterative = pytest.mark.parametrize(("name", "kind"), ITERATIVE)


def spd(eigenvalues, seed=0, dtype=torch.float64):
    """A symmetric matrix with these eigenvalues in a random basis, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    matrix = ((matrix + matrix.T) / 2).to(dtype)
    return matrix, torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def test_all_methods_are_here():
    names = (
        "Exact Identity Neumann Chebyshev ConjugateGradient MinRes Nystrom Diagonal Woodbury KFAC"
    )
    assert {name for name, _ in METHODS} >= set(names.split())
    assert {name for name, _ in ITERATIVE} == {
        "Neumann",
        "Chebyshev",
        "ConjugateGradient",
        "MinRes",
    }
    approximate = {name for name, kind in METHODS if kind.approximate}
    assert approximate == {"Identity", "Nystrom", "Diagonal", "KFAC"}


@each_method
def test_residual_and_products_are_true_and_the_bound_holds(name, kind):
    matrix, rhs = spd(torch.linspace(0.1, 5, 30))
    op = Dense(matrix, positive_semidefinite=True)
    solution = kind(damping=0.5).solve(op, rhs)
    damped = matrix + 0.5 * torch.eye(30, dtype=torch.float64)
    residual = (damped @ solution.value - rhs).norm() / rhs.norm()
    assert solution.residual == pytest.approx(float(residual), rel=1e-6, abs=1e-13)
    assert solution.products == op.products
    error = (solution.value - torch.linalg.solve(damped, rhs)).norm() / rhs.norm()
    assert solution.error_bound is not None
    assert float(error) <= solution.error_bound * (1 + 1e-9) + 1e-12


@each_iterative
@pytest.mark.parametrize("budget", [2, 3, 7, 40])
def test_the_budget_bounds_everything_spent(name, kind, budget):
    matrix, rhs = spd(torch.logspace(-3, 1, 50))
    op = Dense(matrix, positive_semidefinite=True)
    solution = kind(max_products=budget, rtol=0.0).solve(op, rhs)
    assert op.products == solution.products <= budget


@each_iterative
def test_enough_products_give_the_exact_solution(name, kind):
    matrix, rhs = spd(torch.linspace(1, 4, 20))
    solution = kind(max_products=400, rtol=1e-10).solve(Dense(matrix), rhs)
    assert solution.status == "converged"
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, rhs))


def test_more_curvature_is_nearer_at_forty_products():
    matrix, rhs = spd(torch.logspace(-2, 1, 100))
    op = Dense(matrix, positive_semidefinite=True)
    exact = torch.linalg.solve(matrix, rhs)

    def error(method):
        return float((method.solve(op, rhs).value - exact).norm())

    cg = error(ConjugateGradient(max_products=40, rtol=0.0))
    neumann = error(Neumann(max_products=40, rtol=0.0))
    assert cg < neumann < error(Identity())


@each_method
def test_bad_right_hand_sides_are_refused(name, kind):
    op = Dense(torch.eye(3))
    for bad in (torch.tensor([1.0, math.nan, 0.0]), torch.tensor([1.0, math.inf, 0.0])):
        with pytest.raises(ValueError, match="NaN or Inf"):
            kind().solve(op, bad)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        kind().solve(op, torch.ones(4))


@each_method
def test_zero_gives_zero(name, kind):
    solution = kind().solve(Dense(torch.eye(3)), torch.zeros(3))
    assert torch.equal(solution.value, torch.zeros(3))
    assert (solution.residual, solution.status) == (0.0, "converged")


@each_method
def test_negative_damping_is_refused(name, kind):
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping"):
            kind(damping=bad)


@each_iterative
def test_budgets_and_tolerances_are_checked(name, kind):
    with pytest.raises(ValueError, match="max_products"):
        kind(max_products=0)
    with pytest.raises(ValueError, match="rtol"):
        kind(rtol=-1.0)


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", ["ill", "indefinite", "singular", "negative"])
def test_never_a_nan(name, kind, dtype, spectrum):
    eigenvalues = {
        "ill": torch.logspace(-10, 0, 40),
        "indefinite": torch.linspace(-1, 1, 40),
        "singular": torch.cat([torch.zeros(20), torch.ones(20)]),
        "negative": -torch.ones(40),
    }[spectrum]
    matrix, rhs = spd(eigenvalues, dtype=dtype)
    solution = kind().solve(Dense(matrix), rhs)
    assert torch.isfinite(solution.value).all()
    assert math.isfinite(solution.residual)
    assert solution.value.dtype == dtype


@pytest.mark.parametrize("kind", [ConjugateGradient, Exact])
def test_negative_curvature_is_named(kind):
    matrix, rhs = spd(torch.linspace(-1, 3, 20))
    assert kind().solve(Dense(matrix), rhs).status == "negative_curvature"
    assert kind(damping=2.0).solve(Dense(matrix), rhs).status == "converged"


def test_neumann_names_divergence_and_keeps_the_best_iterate():
    matrix, rhs = spd(torch.linspace(1, 10, 20))
    solution = Neumann(step=1.0, max_products=50).solve(Dense(matrix), rhs)
    assert solution.status == "diverged"
    assert solution.residual <= 1.0 + 1e-9


def test_neumann_takes_its_step_from_the_state_and_drops_it_when_it_fails():
    matrix, rhs = spd(torch.linspace(1, 10, 20))
    state = {}
    first = Neumann(max_products=60).solve(Dense(matrix), rhs, state)
    assert state["largest_eigenvalue"] >= 0.99 * 10
    again = Neumann(max_products=60).solve(Dense(matrix), rhs, state)
    assert again.residual < first.residual  # no products went into a probe
    assert Neumann(max_products=60).solve(Dense(10 * matrix), rhs, state).status == "diverged"
    assert "largest_eigenvalue" not in state


@each_method
def test_no_state_leaks_between_calls(name, kind):
    matrix, rhs = spd(torch.linspace(0.5, 3, 15))
    method = kind(damping=0.1)
    first = method.solve(Dense(matrix), rhs)
    method.solve(Dense(3 * matrix), 2 * rhs)
    assert torch.equal(method.solve(Dense(matrix), rhs).value, first.value)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.05, 20.0), min_size=2, max_size=12),
    st.integers(0, 1000),
    st.floats(0.0, 2.0),
)
def test_conjugate_gradients_solve_any_small_spd_system(eigenvalues, seed, damping):
    matrix, rhs = spd(eigenvalues, seed)
    method = ConjugateGradient(damping=damping, max_products=100, rtol=1e-11)
    exact = Exact(damping=damping).solve(Dense(matrix), rhs)
    torch.testing.assert_close(
        method.solve(Dense(matrix), rhs).value, exact.value, rtol=1e-6, atol=1e-8
    )


def test_a_preconditioner_changes_the_way_and_not_the_end():
    matrix, rhs = spd(torch.logspace(-3, 1, 60))
    inverse = torch.linalg.inv(matrix + 1e-4 * torch.eye(60, dtype=torch.float64))
    plain = ConjugateGradient(max_products=12).solve(Dense(matrix), rhs)
    better = ConjugateGradient(max_products=12, preconditioner=lambda r: inverse @ r).solve(
        Dense(matrix), rhs
    )
    assert better.residual < 1e-3 * plain.residual


class Broken(LinearOperator):
    """Gives NaN."""

    def _product(self, vector):
        return torch.full_like(vector, math.nan)


class Same(LinearOperator):
    """The identity, handing back its very argument."""

    def _product(self, vector):
        return vector


@each_method
def test_an_operator_that_breaks_is_named_and_not_raised(name, kind):
    op = Broken(3, torch.float64, torch.device("cpu"))
    solution = kind().solve(op, torch.ones(3, dtype=torch.float64))
    assert solution.status in ("diverged", "negative_curvature")
    assert torch.isfinite(solution.value).all()


@each_method
def test_an_operator_may_hand_back_its_argument(name, kind):
    rhs = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    solution = kind(damping=1.0).solve(Same(3, torch.float64, torch.device("cpu")), rhs)
    error = solution.value if name == "Identity" else 2 * solution.value
    torch.testing.assert_close(error, rhs)


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_work(name, kind, dtype):
    matrix, rhs = spd(torch.linspace(1, 3, 10), dtype=dtype)
    solution = kind(damping=0.1).solve(Dense((matrix + matrix.T) / 2), rhs)
    assert solution.value.dtype == dtype
    assert solution.status in ("converged", "budget")
    if not kind.approximate:
        assert solution.residual < 0.1


def test_exact_says_when_a_system_has_no_solution():
    op = Dense(torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)))
    assert Exact().solve(op, torch.ones(3, dtype=torch.float64)).status == "negative_curvature"
    inside = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert Exact().solve(op, inside).status == "converged"


def test_neumann_never_hands_back_worse_than_it_measured():
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 100.0], dtype=torch.float64))
    rhs = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-3], dtype=torch.float64)
    for budget in range(2, 8):
        solution = Neumann(step=0.99, max_products=budget).solve(Dense(matrix), rhs)
        assert solution.residual <= 1.0 + 1e-12, budget
        assert solution.status == "diverged"


def test_neumann_with_a_state_that_says_zero():
    op = Dense(torch.zeros(3, 3))
    solution = Neumann().solve(op, torch.ones(3), {"largest_eigenvalue": 0.0})
    assert torch.isfinite(solution.value).all()
