import pytest
import torch
import torch.nn.functional as F

from weighmatch.implicit import Dense, GaussNewton, Hessian, flatten, unflatten


@pytest.fixture
def problem():
    """A softmax MLP: parameters, logits and a cross-entropy loss, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs, labels = draw(9, 4), torch.arange(9) % 3
    params = {"w": draw(5, 4), "b": draw(5), "v": draw(3, 5)}

    def outputs(p):
        return torch.tanh(inputs @ p["w"].T + p["b"]) @ p["v"].T

    return params, outputs, lambda z: F.cross_entropy(z, labels)


def dense_hessian(loss, params):
    return torch.autograd.functional.hessian(
        lambda flat: loss(unflatten(flat, params)), flatten(params)
    )


def test_hessian_equals_the_dense_one(problem):
    params, outputs, loss = problem
    op = Hessian(lambda p: loss(outputs(p)), params)
    expected = dense_hessian(lambda p: loss(outputs(p)), params)
    torch.testing.assert_close(op.dense(), expected)


def test_gauss_newton_equals_its_definition_and_is_positive_semidefinite(problem):
    params, outputs, loss = problem
    op = GaussNewton(outputs, loss, params)
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: outputs(unflatten(flat, params)).flatten(), flatten(params)
    )
    z = outputs(params)
    middle = torch.autograd.functional.hessian(lambda f: loss(f.view_as(z)), z.flatten())
    torch.testing.assert_close(op.dense(), jacobian.T @ middle @ jacobian)
    assert torch.linalg.eigvalsh(op.dense())[0] > -1e-12


def test_a_block_is_its_columns_and_counts_them(problem):
    params, outputs, loss = problem
    block = torch.randn(flatten(params).numel(), 3, dtype=torch.float64)
    for op in (GaussNewton(outputs, loss, params), Hessian(lambda p: loss(outputs(p)), params)):
        product = op @ block
        assert op.products == 3
        for k in range(3):
            torch.testing.assert_close(op @ block[:, k], product[:, k])
        assert op.products == 6


def test_hessian_of_a_loss_linear_in_a_parameter():
    params = {"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([1.0])}
    op = Hessian(lambda p: p["a"].square().sum() + p["b"].sum(), params)
    assert torch.equal(op.dense(), torch.diag(torch.tensor([2.0, 2.0, 0.0])))
    linear = Hessian(lambda p: p["a"].sum() + p["b"].sum(), params)
    assert torch.equal(linear.dense(), torch.zeros(3, 3))


def test_wrong_shapes_are_refused():
    op = Dense(torch.eye(4))
    with pytest.raises(ValueError, match=r"cannot multiply a tensor of shape \(3,\)"):
        op @ torch.ones(3)
    with pytest.raises(ValueError, match="square"):
        Dense(torch.ones(2, 3))
    with pytest.raises(ValueError, match="symmetric"):
        Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"\(4,\) is needed"):
        unflatten(torch.ones(3), {"a": torch.ones(2, 2)})
