"""Eigenvalues, bounds and densities against matrices whose spectrum is known."""

import math

import pytest
import torch

from tests.implicit.problems import DEFINITE, HARD, Counting, spd
from weighmatch.implicit import (
    ConjugateGradient,
    Dense,
    extreme_eigenvalues,
    lower_bound,
    spectral_density,
)


def diagonal(eigenvalues):
    return Counting(torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)))


@pytest.mark.parametrize("spectrum", [*DEFINITE, *HARD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_full_run_is_exact(spectrum, dtype):
    eigenvalues = {**DEFINITE, **HARD}[spectrum]
    matrix, _ = spd(eigenvalues, dtype=dtype)
    found = extreme_eigenvalues(Dense(matrix), products=40)
    rounding = 100 * torch.finfo(dtype).eps * float(eigenvalues.abs().max())
    assert found == pytest.approx(
        (float(eigenvalues.min()), float(eigenvalues.max())), abs=rounding
    )


def test_a_short_run_stays_inside_the_spectrum_and_nears_its_ends():
    op = diagonal(torch.linspace(1, 100, 200))
    before = (100.0, 1.0)
    for products in (2, 5, 10, 20, 40):
        smallest, largest = extreme_eigenvalues(op, products=products)
        assert 1 - 1e-9 <= smallest < before[0]
        assert before[1] < largest <= 100 + 1e-9
        before = (smallest, largest)
    assert op.seen == op.products == 77
    assert before == pytest.approx((1, 100), abs=0.1)


def test_an_exhausted_krylov_space_stops_early():
    op = diagonal(torch.full((50,), 3.0))
    assert extreme_eigenvalues(op, products=20) == pytest.approx((3.0, 3.0))
    assert op.seen == 1


def test_extreme_eigenvalues_are_those_of_the_seed():
    op = diagonal(torch.linspace(1, 100, 200))
    one, same, other = (extreme_eigenvalues(op, products=8, seed=s) for s in (0, 0, 1))
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    "eigenvalues",
    [
        torch.linspace(-1, 5, 200),
        torch.cat([torch.tensor([-0.3]), torch.ones(199)]),
        torch.logspace(-10, 0, 200),
        torch.cat([torch.full((100,), -2.0), torch.full((100,), 7.0)]),
        torch.full((200,), 3.0),
        torch.zeros(200),
    ],
)
@pytest.mark.parametrize("products", [15, 30, 200])
def test_the_lower_bound_holds_for_every_seed(eigenvalues, products):
    smallest, largest = float(eigenvalues.min()), float(eigenvalues.max())
    for seed in range(5 if products == 200 else 20):
        bound = lower_bound(diagonal(eigenvalues), products=products, failure=0.05, seed=seed)
        assert bound <= smallest
        # Not by saying nothing.
        assert bound >= smallest - 2 * (largest - smallest) - 1e-12 * (1 + abs(largest))


def test_the_lower_bound_tightens_with_products_and_with_the_risk_that_is_taken():
    op = diagonal(torch.linspace(-1, 5, 300))
    bounds = [lower_bound(op, products=k) for k in (15, 30, 60, 120)]
    assert bounds == sorted(bounds)
    risks = [lower_bound(op, products=30, failure=f) for f in (1e-6, 1e-3, 0.1)]
    assert risks == sorted(risks)
    assert risks[0] < risks[-1] <= -1


def test_the_lower_bound_gives_an_error_bound():
    matrix, rhs = spd(torch.linspace(-0.5, 5, 100))
    op = Counting(matrix)
    method = ConjugateGradient(damping=1.5, max_products=30)
    assert method.solve(op, rhs).error_bound is None
    op.smallest_eigenvalue = lower_bound(op, products=60)
    solution = method.solve(op, rhs)
    exact = torch.linalg.solve(matrix + 1.5 * torch.eye(100, dtype=torch.float64), rhs)
    assert float((solution.value - exact).norm() / rhs.norm()) <= solution.error_bound < 1e-3


def test_too_few_products_bound_nothing():
    with pytest.raises(ValueError, match="3 products are too few"):
        lower_bound(diagonal(torch.linspace(-1, 5, 200)), products=3)


@pytest.mark.parametrize("spectrum", [*DEFINITE, *HARD])
def test_a_density_integrates_to_one(spectrum):
    matrix, _ = spd({**DEFINITE, **HARD}[spectrum])
    op = Counting(matrix)
    grid, density = spectral_density(op, products=10, probes=3)
    assert op.seen <= 30
    assert grid.shape == density.shape == (400,)
    assert grid.dtype == density.dtype == torch.float64
    assert torch.isfinite(density).all()
    assert (density >= 0).all()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1)


def test_a_density_has_the_moments_of_the_spectrum():
    """Means over eigenvalues, from probes; the Gaussians' own width adds to the second."""
    eigenvalues = torch.cat([torch.linspace(0, 1, 300), torch.linspace(4, 5, 100)]).double()
    grid, density = spectral_density(diagonal(eigenvalues), products=40, probes=60, width=0.05)
    for power in (1, 2, 3):
        moment = float(torch.trapezoid(grid**power * density, grid))
        assert moment == pytest.approx(float((eigenvalues**power).mean()), rel=0.03)
    between = (grid > 1.5) & (grid < 3.5)
    assert density[between].max() < 1e-3
    above = float(torch.trapezoid(density[grid > 2.5], grid[grid > 2.5]))
    assert above == pytest.approx(0.25, abs=0.01)


def test_a_density_is_that_of_its_seed():
    op = diagonal(torch.linspace(0, 1, 50))
    one, same, other = (spectral_density(op, products=10, seed=s)[1] for s in (0, 0, 7))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("function", "settings", "reason"),
    [
        (extreme_eigenvalues, {"products": 0}, "products"),
        (lower_bound, {"products": 0}, "products"),
        (lower_bound, {"failure": 0.0}, "failure"),
        (lower_bound, {"failure": 1.0}, "failure"),
        (lower_bound, {"failure": math.nan}, "failure"),
        (spectral_density, {"products": 0}, "products"),
        (spectral_density, {"probes": 0}, "probes"),
        (spectral_density, {"points": 1}, "points"),
        (spectral_density, {"width": 0.0}, "width"),
        (spectral_density, {"width": -1.0}, "width"),
        (spectral_density, {"width": 1e-6}, "400 points are too few for a width of 1e-06"),
    ],
)
def test_bad_settings_are_refused(function, settings, reason):
    with pytest.raises(ValueError, match=reason):
        function(diagonal(torch.linspace(0, 1, 50)), **settings)
