"""The randomised Nyström approximation as an inverse and as a preconditioner."""

import itertools

import pytest
import torch

from tests.implicit.problems import DEFINITE, HARD, draw, relative, shifted, spd
from weighmatch.implicit import ConjugateGradient, Dense, Nystrom


def sketch_of(matrix, **settings):
    state = {}
    Nystrom(**settings).solve(Dense(matrix), draw(len(matrix)).to(matrix.dtype), state)
    return state["sketch"].content


def approximation(matrix, **settings):
    """U Λ Uᵀ."""
    sketch = sketch_of(matrix, **settings)
    return (sketch.vectors * sketch.eigenvalues) @ sketch.vectors.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", ["even", "condition 1e10", "two far clusters", "singular"])
def test_any_rank_and_damping_give_a_finite_solution_inside_the_bound(spectrum, dtype):
    eigenvalues = {**DEFINITE, **HARD}[spectrum]
    matrix, rhs = spd(eigenvalues, dtype=dtype)
    for rank in (1, 2, 7, 19, 39, 40, 100):
        for damping in (0.0, 1e-10, 1e-6, 1e-3, 1.0, 1e3):
            for complement in ("measured", "damping"):
                method = Nystrom(rank=rank, damping=damping, complement=complement)
                solution = method.solve(Dense(matrix), rhs)
                assert torch.isfinite(solution.value).all()
                # 1/δ for all that lies outside of the sketch is as wrong as δ is small.
                assert solution.residual < 1e3 or complement == "damping"
                if damping > 0 and solution.error_bound is not None:
                    exact = torch.linalg.solve(shifted(matrix, damping), rhs.double())
                    error = float((solution.value - exact).norm() / rhs.norm())
                    assert error <= solution.error_bound * (1 + 1e-9)


@pytest.mark.parametrize("rank", [5, 8, 30])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_a_matrix_of_low_rank_is_recovered(rank, damping):
    eigenvalues = torch.cat([torch.zeros(25), torch.tensor([0.1, 0.5, 1.0, 3.0, 10.0])])
    matrix, rhs = spd(eigenvalues)
    assert relative(approximation(matrix, rank=rank), matrix) < 1e-10
    exact = torch.linalg.solve(shifted(matrix, damping), rhs)
    for complement in ("measured", "damping"):
        method = Nystrom(rank=rank, damping=damping, complement=complement)
        assert relative(method.solve(Dense(matrix), rhs).value, exact) < 1e-8


@pytest.mark.parametrize("spectrum", ["even", "condition 1e4", "one outlier"])
def test_the_approximation_lies_between_zero_and_the_matrix(spectrum):
    matrix, _ = spd(DEFINITE[spectrum])
    scale = float(DEFINITE[spectrum].max())
    traces = []
    for rank in (1, 5, 10, 20, 40):
        near = approximation(matrix, rank=rank)
        assert torch.linalg.eigvalsh(near)[0] > -1e-12 * scale
        assert torch.linalg.eigvalsh(matrix - near)[0] > -1e-10 * scale
        traces.append(float(torch.trace(matrix - near)))
    assert all(after < before for before, after in itertools.pairwise(traces))
    assert traces[-1] < 1e-9 * scale


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_its_error_falls_with_the_rank_in_the_norm_of_the_system(damping, seed):
    """Where the spectrum decays; on a flat one, half a sketch can be worse than none."""
    matrix, rhs = spd(DEFINITE["condition 1e4"], seed)
    damped = shifted(matrix, damping)
    exact = torch.linalg.solve(damped, rhs)
    errors = []
    for rank in (2, 5, 10, 20, 40):
        method = Nystrom(rank=rank, damping=damping, shorten=False)
        error = method.solve(Dense(matrix), rhs).value - exact
        errors.append(float(error @ damped @ error))
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_the_measured_complement_is_the_best_scalar_in_the_norm_of_the_system():
    matrix, rhs = spd(DEFINITE["condition 1e4"])
    damped = shifted(matrix, 0.01)
    exact = torch.linalg.solve(damped, rhs)
    sketch = sketch_of(matrix, rank=8)
    rest = rhs - sketch.vectors @ (sketch.vectors.T @ rhs)

    def energy(value):
        return float((value - exact) @ damped @ (value - exact))

    best = Nystrom(rank=8, damping=0.01, shorten=False).solve(Dense(matrix), rhs).value
    for shift in (-1.0, -0.01, 0.01, 1.0):
        assert energy(best) < energy(best + shift * rest)


@pytest.mark.parametrize("damping", [1e-3, 1.0, 100.0])
def test_with_damping_outside_it_is_the_textbook_formula(damping):
    """(Ĉ + δI)⁻¹ g for Ĉ = CΩ (ΩᵀCΩ)⁻¹ ΩᵀC, solved densely."""
    matrix, rhs = spd(DEFINITE["condition 1e4"])
    generator = torch.Generator().manual_seed(3)
    omega, _ = torch.linalg.qr(torch.randn(40, 6, generator=generator, dtype=torch.float64))
    near = matrix @ omega @ torch.linalg.solve(omega.T @ matrix @ omega, omega.T @ matrix)
    method = Nystrom(rank=6, damping=damping, complement="damping", seed=3, shorten=False)
    solution = method.solve(Dense(matrix), rhs)
    assert relative(solution.value, torch.linalg.solve(shifted(near, damping), rhs)) < 1e-9


def test_single_precision_is_near_double():
    matrix, rhs = spd(DEFINITE["condition 1e4"])
    for rank in (5, 20, 40):
        method = Nystrom(rank=rank, damping=0.01)
        double = method.solve(Dense(matrix), rhs).value
        single = method.solve(Dense(matrix.float()), rhs.float()).value
        assert single.dtype == torch.float32
        assert relative(single, double) < 1e-3


def test_as_a_preconditioner_it_saves_iterations():
    """Ten large eigenvalues that it takes away, before a well-conditioned rest."""
    eigenvalues = torch.cat([torch.linspace(0.5, 1, 90), torch.logspace(1, 4, 10)])
    matrix, rhs = spd(eigenvalues)
    settings = {"damping": 1e-3, "max_products": 300, "rtol": 1e-8}
    exact = torch.linalg.solve(shifted(matrix, 1e-3), rhs)
    plain = ConjugateGradient(**settings).solve(Dense(matrix), rhs)
    method = ConjugateGradient(**settings, preconditioner=Nystrom(rank=20))
    state = {}
    first = method.solve(Dense(matrix), rhs, state)
    again = method.solve(Dense(matrix), rhs, state)
    assert first.products - 20 < 0.5 * plain.products
    assert again.products == first.products - 20
    for solution in (plain, first, again):
        assert solution.status == "converged"
        assert relative(solution.value, exact) < 1e-6


def test_a_preconditioner_takes_at_most_half_of_the_budget():
    matrix, rhs = spd(DEFINITE["condition 1e4"])
    state = {}
    method = ConjugateGradient(max_products=11, preconditioner=Nystrom(rank=30), rtol=0.0)
    method.solve(Dense(matrix), rhs, state)
    assert state["sketch"].content.vectors.shape == (40, 5)


def test_a_preconditioner_that_finds_nothing_is_the_identity():
    op = Dense(torch.zeros(5, 5, dtype=torch.float64))
    method = ConjugateGradient(damping=2.0, preconditioner=Nystrom(rank=2))
    rhs = draw(5)
    torch.testing.assert_close(method.solve(op, rhs).value, rhs / 2)


def test_a_sketch_is_reused_for_another_right_hand_side_and_damping():
    matrix, rhs = spd(DEFINITE["condition 1e4"])
    state = {}
    method = Nystrom(rank=10, damping=0.1)
    assert method.solve(Dense(matrix), rhs, state).products == 13
    sketch = state["sketch"].content
    other = Nystrom(rank=10, damping=1.0)
    reused = other.solve(Dense(matrix), draw(40, seed=9), state)
    assert reused.products == 3
    assert state["sketch"].content is sketch
    assert torch.equal(reused.value, other.solve(Dense(matrix), draw(40, seed=9)).value)


def test_the_sketch_is_that_of_its_seed():
    matrix, rhs = spd(DEFINITE["condition 1e4"])
    one, same, other = (Nystrom(rank=5, seed=s).solve(Dense(matrix), rhs) for s in (1, 1, 2))
    assert torch.equal(one.value, same.value)
    assert not torch.equal(one.value, other.value)


def test_negative_curvature_in_the_sketch_is_named():
    matrix, rhs = spd(torch.linspace(-3, 1, 30))
    op = Dense(matrix)
    assert Nystrom(rank=30).solve(op, rhs).status == "negative_curvature"
    assert sketch_of(matrix, rank=30).negative == pytest.approx(-3.0)
    assert Nystrom(rank=5, damping=5.0).solve(op, rhs).status == "budget"


def test_a_sketch_of_a_lower_rank_is_drawn_anew():
    matrix, rhs = spd(torch.logspace(-3, 0, 40))
    op, state = Dense(matrix), {}
    Nystrom(rank=5, damping=1e-3).solve(op, rhs, state)
    higher = Nystrom(rank=30, damping=1e-3)
    assert torch.equal(higher.solve(op, rhs, state).value, higher.solve(op, rhs).value)
    # One of a higher rank is there already and does at least as well.
    before = op.products
    Nystrom(rank=5, damping=1e-3).solve(op, rhs, state)
    assert op.products - before <= 3
