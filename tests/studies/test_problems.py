"""Every bilevel problem, found by existing."""

from dataclasses import replace

import pytest
import torch

from weighmatch.data.sources.digits import load_digits
from weighmatch.implicit import Exact, flatten, implicit_gradient, unflatten
from weighmatch.studies.digits import scaled
from weighmatch.studies.minimise import minimise
from weighmatch.studies.names import LABELLED
from weighmatch.studies.problems import PROBLEMS, Size
from weighmatch.studies.problems.contaminated_pool import SEEN

pytestmark = pytest.mark.integration

IMAGES, LABELS = load_digits()
SOFTMAX = Size(inner=40, outer=40, test=60, hidden=0, l2=0.05)
MLP = Size(inner=40, outer=40, test=60, hidden=4)


def make(name, size, seed=0):
    kind = PROBLEMS[name]
    return kind(kind.draw(IMAGES, LABELS, size, seed), size, seed)


@pytest.fixture(params=sorted(PROBLEMS))
def name(request):
    return request.param


def moved(hyper):
    """Off the start, where some problems are more symmetric than elsewhere."""
    generator = torch.Generator().manual_seed(3)
    return {
        k: h + 0.3 * torch.randn(h.shape, generator=generator, dtype=h.dtype)
        for k, h in hyper.items()
    }


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 3, 4])])
@pytest.mark.parametrize("size", [SOFTMAX, MLP], ids=["softmax", "mlp"])
def test_the_inner_gradient_is_that_of_the_inner_loss(name, size, rows):
    problem = make(name, size)
    hyper = moved(problem.hyperparameters())
    loss, slopes = problem.inner_gradient(problem.initial, hyper, rows)
    theta = {k: p.clone().requires_grad_() for k, p in problem.initial.items()}
    expected = problem.inner(theta, hyper, rows)
    assert float(loss) == pytest.approx(float(expected.detach()))
    for ours, theirs in zip(
        slopes, torch.autograd.grad(expected, list(theta.values())), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gauss_newton_is_the_hessian_of_a_linear_model(name):
    problem = make(name, SOFTMAX)
    hyper = moved(problem.hyperparameters())
    hessian = problem.hessian(problem.initial, hyper).dense()
    torch.testing.assert_close(problem.gauss_newton(problem.initial, hyper).dense(), hessian)
    data_term = problem.layers(problem.initial, hyper).dense()
    decay = {k: d.expand_as(problem.initial[k]) for k, d in problem.decay(hyper).items()}
    torch.testing.assert_close(data_term + torch.diag(flatten(decay)), hessian)
    assert problem.mean_decay(hyper) == pytest.approx(float(flatten(decay).mean()))


# The weighing network's input is a constant of the inner problem by definition.
@pytest.mark.parametrize("name", sorted(set(PROBLEMS) - {"weighing_network"}))
def test_the_hypergradient_is_that_of_retraining(name):
    problem = make(name, SOFTMAX)
    hyper = moved(problem.hyperparameters())
    start = problem.initial

    def retrained(h):
        return minimise(problem, h, start, iterations=3000, tolerance=1e-11)[0]

    found, solution = implicit_gradient(
        problem.inner, problem.outer, retrained(hyper), hyper, Exact()
    )
    assert solution.status == "converged"
    direction = torch.randn(
        len(flatten(hyper)), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    values = [
        float(problem.outer(retrained(unflatten(flatten(hyper) + s * direction, hyper))))
        for s in (-1e-4, 1e-4)
    ]
    assert float(flatten(found) @ direction) == pytest.approx(
        (values[1] - values[0]) / 2e-4, rel=5e-3, abs=1e-7
    )


def test_problems_are_drawn_from_their_seed_alone(name):
    one, same, other = (make(name, MLP, seed) for seed in (0, 0, 1))
    assert torch.equal(one.digits.inner, same.digits.inner)
    assert torch.equal(flatten(one.initial), flatten(same.initial))
    assert not torch.equal(one.digits.inner, other.digits.inner)


def test_no_image_is_in_two_splits(name):
    digits = make(name, MLP).digits
    images = torch.cat([digits.inner, digits.outer, digits.test])
    assert len(images) == MLP.inner + MLP.outer + MLP.test
    # No two of the 1,797 digits are the same.
    assert len(torch.unique(images, dim=0)) == len(images)


def test_noise_is_where_it_is_said_to_be():
    kind = PROBLEMS["example_weights"]
    noisy = kind.draw(IMAGES, LABELS, MLP, 0)
    clean = kind.draw(IMAGES, LABELS, Size(inner=40, outer=40, test=60, label_noise=0.0), 0)
    assert torch.equal(noisy.inner, clean.inner)
    assert torch.equal(noisy.wrong, noisy.inner_labels != clean.inner_labels)
    assert int(noisy.wrong.sum()) == 16


def test_the_pool_is_contaminated_and_its_labels_are_the_teachers():
    size = Size(inner=LABELLED + 40, outer=40, test=60)
    problem = make("contaminated_pool", size)
    digits = problem.digits
    assert int(digits.wrong.sum()) == 30
    assert not digits.wrong[:LABELLED].any()
    assert (digits.inner_labels[digits.wrong] >= SEEN).all()
    assert (digits.outer_labels < SEEN).all()
    assert (digits.test_labels < SEEN).all()
    # What the pool's true labels are must not reach the inner loss.
    blind = scaled(
        IMAGES,
        LABELS * 0,
        *(
            _numbers(images)
            if isinstance(images, torch.Tensor) and images.is_floating_point()
            else images
            for images in (digits.inner, digits.wrong, digits.outer, digits.test)
        ),
    )
    blind.inner_labels[:LABELLED] = digits.inner_labels[:LABELLED]
    other = type(problem)(blind, size, 0)
    hyper = problem.hyperparameters()
    assert float(problem.inner(problem.initial, hyper)) == pytest.approx(
        float(other.inner(problem.initial, hyper))
    )


def _numbers(images):
    flat = torch.from_numpy(IMAGES.reshape(len(IMAGES), -1)).double() / 255 - 0.5
    return torch.stack([(flat == image).all(1).nonzero()[0, 0] for image in images]).numpy()


@pytest.mark.parametrize(
    ("problem", "size", "words"),
    [
        ("example_weights", Size(inner=1500, outer=200, test=500), "example_weights with inner"),
        ("contaminated_pool", Size(inner=1200), "contaminated_pool with inner"),
        ("contaminated_pool", Size(inner=LABELLED), "more than 24 inner images"),
    ],
)
def test_too_few_images_are_an_error_that_says_so(problem, size, words):
    with pytest.raises(ValueError, match=words):
        PROBLEMS[problem].draw(IMAGES, LABELS, size, 0)


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 3, 4])])
@pytest.mark.parametrize("size", [SOFTMAX, MLP], ids=["softmax", "mlp"])
def test_the_closed_matrix_is_that_of_products(name, size, rows):
    problem = make(name, size)
    hyper = moved(problem.hyperparameters())
    params = moved(problem.initial)
    for curvature in ("hessian", "gauss_newton"):
        products = getattr(problem, curvature)(params, hyper, rows).dense()
        found = problem.matrix(params, hyper, rows, curvature)
        torch.testing.assert_close(found, products)


def test_newton_ends_what_spread_decays_keep_from_gradients():
    problem = make("weight_decay", replace(MLP, hidden=8, l2=1e-3))
    hyper = {k: h + 4 * (moved({k: h})[k] - h) / 0.3 for k, h in problem.hyperparameters().items()}
    found, cost = minimise(problem, hyper, problem.initial, iterations=50)
    slopes = problem.inner_gradient(found, hyper)[1]
    assert max(float(s.abs().max()) for s in slopes) <= 1e-6
    # Beyond the gradients of L-BFGS, at least one Hessian of P products.
    assert cost > 100 + len(flatten(problem.initial))
    assert float(torch.linalg.eigvalsh(problem.matrix(found, hyper))[0]) > 0
