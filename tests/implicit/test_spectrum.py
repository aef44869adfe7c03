import pytest
import torch

from weighmatch.implicit import Dense, extreme_eigenvalues


def test_a_full_run_is_exact():
    matrix = torch.diag(torch.tensor([-2.0, 0.5, 1.0, 7.0], dtype=torch.float64))
    smallest, largest = extreme_eigenvalues(Dense(matrix), products=4)
    assert (smallest, largest) == pytest.approx((-2.0, 7.0), abs=1e-10)


def test_a_short_run_stays_inside_the_spectrum():
    matrix = torch.diag(torch.linspace(1, 100, 200, dtype=torch.float64))
    op = Dense(matrix)
    smallest, largest = extreme_eigenvalues(op, products=15)
    assert op.products == 15
    assert 1 <= smallest < 10
    assert 97 < largest <= 100 + 1e-9


def test_an_exhausted_krylov_space_stops_early():
    op = Dense(3 * torch.eye(50, dtype=torch.float64))
    assert extreme_eigenvalues(op, products=20) == pytest.approx((3.0, 3.0))
    assert op.products == 1


def test_no_product_is_refused():
    with pytest.raises(ValueError, match="products"):
        extreme_eigenvalues(Dense(torch.eye(2)), products=0)
