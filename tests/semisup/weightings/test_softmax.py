import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from tests.semisup.weightings.drawing import draw_images, draw_logits
from weighmatch.semisup import RunConfig
from weighmatch.semisup.parts.losses import consistency_losses, mean_one, pseudo_label
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.weightings.softmax import SoftmaxWeights

MEASURED = {"batch": 32, "outer_batch": 12, "curvature_batch": 8}


def test_softmax_weights_are_a_function_of_the_softmax_vector_alone(classifier, make_context):
    weighting = SoftmaxWeights(make_context(influence=MEASURED))
    report = weighting.update(classifier)
    assert report["weight_spread"] > 0
    pseudo = pseudo_label(draw_logits(), 0.5)
    scores = weighting.scores(draw_images(), pseudo, torch.arange(12))
    expected = torch.sigmoid(weighting.network(pseudo.probabilities))
    assert torch.equal(scores, expected)
    assert weighting.cut is None  # soft, though `weights` is hard
    assert len(set(scores.tolist())) > 2


def test_softmax_weights_descend_the_one_step_hypergradient(classifier, make_context, monkeypatch):
    """The step is along the gradient of L_outer(θ − η ∇ mean_i w_i m_i CE_i) in φ."""
    settings = {"fit_steps": 1, "proximity": 0.0}
    weighting, twin = (SoftmaxWeights(make_context(None, settings, MEASURED)) for _ in range(2))
    _, _, strong, pseudo = twin.meter.draw_views(classifier)
    direction = twin.meter.outer_gradient(classifier)
    theta = {name: p.detach().clone().requires_grad_() for name, p in classifier.named_parameters()}
    losses = consistency_losses(functional_call(classifier, theta, (strong,)), pseudo)
    weights = mean_one(torch.sigmoid(twin.network(pseudo.probabilities)))
    inner = torch.autograd.grad((weights * losses).mean(), list(theta.values()), create_graph=True)
    # d/dη-scaled outer loss after a step: −⟨∇_θ L_inner(φ), ∇_θ L_outer⟩.
    outer = -torch.cat([g.flatten() for g in inner]) @ direction
    expected = torch.cat(
        [g.flatten() for g in torch.autograd.grad(outer, list(twin.network.parameters()))]
    )
    monkeypatch.setattr(weighting.optimizer, "step", lambda: None)
    weighting.update(classifier)
    actual = torch.cat([p.grad.flatten() for p in weighting.network.parameters()])
    assert float(F.cosine_similarity(actual, expected, dim=0)) == pytest.approx(1, abs=1e-4)


def test_softmax_weights_have_the_runs_classes(training_set, run_config, tmp_path):
    config = run_config("ds3l")
    more = RunConfig("ds3l", 0, 40, classes=5, training=config.training)
    run = Run(more, training_set, tmp_path)
    run.train_steps(15)
    assert run.weighting.network.layers[0].in_features == 5
