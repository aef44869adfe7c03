import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from tests.semisup.weightings.drawing import draw_logits
from weighmatch.implicit import Exact, GaussNewton, implicit_gradient, weight_gradient
from weighmatch.semisup import build_classifier
from weighmatch.semisup.parts.losses import mean_one, pseudo_label
from weighmatch.semisup.parts.networks import ConfidenceNetwork
from weighmatch.semisup.weightings.learned import Learned
from weighmatch.semisup.weightings.positive_unlabelled import PositiveUnlabelled


def inductive(kind, make_context, weights="hard", **influence):
    return kind(make_context(None, {"weights": weights, "fit_steps": 20}, influence))


@pytest.mark.parametrize("kind", [PositiveUnlabelled, Learned])
@pytest.mark.parametrize("weights", ["hard", "soft"])
def test_inductive_weights_have_mean_one_and_survive_a_checkpoint(kind, weights, make_context):
    weighting = inductive(kind, make_context, weights)
    classifier = build_classifier("small_cnn", 1, 3, seed=0, width=8)
    report = weighting.update(classifier)
    assert report
    assert all(np.isfinite(value) for value in report.values())
    images = torch.rand(16, 1, 8, 8)
    before = weighting.weights(images, pseudo_label(draw_logits(16), 0.5))
    assert float(before.mean()) == pytest.approx(1, abs=1e-5)
    assert float(before.min()) > 0
    restored = inductive(kind, make_context, weights)
    restored.load_state_dict(weighting.state_dict())
    assert torch.equal(restored.weights(images, pseudo_label(draw_logits(16), 0.5)), before)


@pytest.mark.integration
def test_pu_scores_labelled_looks_above_foreign_ones(training_set, make_context):
    noisy = np.random.default_rng(1).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    training_set.unlabelled_images[20:] = noisy[20:]
    weighting = inductive(PositiveUnlabelled, make_context)
    for _ in range(10):
        weighting.update(build_classifier("small_cnn", 1, 3, seed=0, width=8))
    with torch.no_grad():
        scores = weighting.network(torch.from_numpy(training_set.unlabelled_images).float() / 255)
    assert float(scores[:20].mean()) > float(scores[20:].mean()) + 0.5


@pytest.mark.parametrize("solver", ["identity", "neumann", "conjugate_gradient"])
def test_learned_updates_with_every_solver(solver, make_context):
    weighting = inductive(Learned, make_context, solver=solver)
    classifier = build_classifier("small_cnn", 1, 3, seed=0, width=8)
    before = {name: p.clone() for name, p in classifier.named_parameters()}
    report = weighting.update(classifier)
    assert report["products"] <= max(weighting.meter.config.max_products, 1)
    assert report["largest_eigenvalue"] > 0
    assert weighting.meter.measured.influence.abs().sum() > 0
    # The classifier is read, never written, and keeps no gradient.
    for name, p in classifier.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


@pytest.mark.integration
def test_gradient_through_the_weights_is_the_hypergradient():
    """−mean(s_i w_φ(u_i)) has the gradient of double backward through the inner loss."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(10, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(10) % 3
    classifier = build_classifier("small_cnn", 1, 3, seed=0, width=4).double()
    network = ConfidenceNetwork(1, width=4, seed=1).double()
    theta = {name: p.detach() for name, p in classifier.named_parameters()}
    phi = {name: p.detach() for name, p in network.named_parameters()}
    logits = classifier(images).detach()
    pseudo = pseudo_label(logits, 0.0)

    def losses(params):
        z = functional_call(classifier, params, (images,))
        return F.cross_entropy(z, pseudo.labels, reduction="none")

    def inner(params, hyper):
        weights = mean_one(torch.sigmoid(functional_call(network, hyper, (images,))))
        return (weights * losses(params)).mean()

    def outer(params):
        return F.cross_entropy(functional_call(classifier, params, (images.flip(3),)), labels)

    def gauss_newton(loss, params):
        return GaussNewton(
            lambda p: functional_call(classifier, p, (images,)),
            lambda z: F.cross_entropy(z, pseudo.labels),
            params,
        )

    solver = Exact(damping=0.1)
    expected, solution = implicit_gradient(inner, outer, theta, phi, solver, curvature=gauss_newton)
    influence = -weight_gradient(losses, theta, solution.value)
    leaves = {name: p.clone().requires_grad_() for name, p in phi.items()}
    weights = mean_one(torch.sigmoid(functional_call(network, leaves, (images,))))
    loss = -(influence * weights).mean()
    actual = torch.autograd.grad(loss, list(leaves.values()))
    for (name, value), gradient in zip(expected.items(), actual, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-8, atol=1e-12, msg=name)
