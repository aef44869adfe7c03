import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from weighmatch.semisup import RunConfig, TrainingConfig, build_classifier
from weighmatch.semisup.config import ARMS, AugmentationConfig, RunsConfig, WeighingConfig
from weighmatch.semisup.controls import (
    Energy,
    FreeWeights,
    InlierFilter,
    SoftMatch,
    SoftmaxWeights,
    inlier_probability,
    negative_free_energy,
    one_vs_all_loss,
    truncated_gaussian,
)
from weighmatch.semisup.learned import Learned
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.parts.losses import consistency_losses, mean_one, pseudo_label
from weighmatch.semisup.parts.store import ImageStore
from weighmatch.semisup.parts.streams import Streams
from weighmatch.semisup.trainer import Run
from weighmatch.semisup.weightings import BELOW_CUT, SCORED, otsu_cut

CPU = torch.device("cpu")


def draw_logits(n=12, classes=3, seed=0):
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def draw_images(n=12):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def classifier(training_set):
    """One that knows the labelled images."""
    network = build_classifier("small_cnn", 1, 3, seed=0, width=8)
    images = torch.from_numpy(training_set.labelled_images).float() / 255
    labels = torch.from_numpy(training_set.labels)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network


@pytest.fixture
def half_noise(training_set):
    """The pool with noise from image 20 on."""
    noise = np.random.default_rng(1).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    training_set.unlabelled_images[20:] = noise
    return training_set


def parts(training_set, **settings):
    """What most weightings are built from."""
    labelled = torch.from_numpy(training_set.labelled_images)
    labels = torch.from_numpy(training_set.labels)
    config = WeighingConfig(
        **{"width": 8, "influence_batch": 32, "outer_batch": 12, "curvature_batch": 8, **settings}
    )
    return labelled, labels, Augmentation(AugmentationConfig(cutout=0.25)), config


def influential(kind, training_set, *first, **settings):
    labelled, labels, augmentation, config = parts(training_set, **settings)
    pool = ImageStore(training_set.unlabelled_images, CPU)
    outer = (labelled, labels)
    return kind(*first, labelled, labels, outer, pool, augmentation, config, Streams(0), 0.1, 1.0)


# --- SoftMatch ----------------------------------------------------------------------------------


def test_the_truncated_gaussian_is_its_formula():
    confidence = torch.tensor([0.4, 0.6, 0.7, 0.9])
    weights = truncated_gaussian(confidence, torch.tensor(0.7), torch.tensor(0.04))
    # Standard deviation .2, of which the Gaussian takes half.
    expected = [math.exp(-0.5 * (0.3 / 0.1) ** 2), math.exp(-0.5), 1.0, 1.0]
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_softmatch_follows_the_confidences_it_trains_on_and_no_others():
    weighting = SoftMatch(CPU)
    first, second = (pseudo_label(draw_logits(seed=s), 0.99) for s in (0, 1))
    images = draw_images()
    assert torch.equal(weighting.scores(images, first, None), torch.ones(12))
    weighting.weights(images, first)
    weights = weighting.weights(images, second)
    mean = (first.confidence.mean() + second.confidence.mean()) / 2
    variance = (first.confidence.var() + second.confidence.var()) / 2
    expected = truncated_gaussian(second.confidence, mean, variance)
    torch.testing.assert_close(weights, expected)
    assert float(weights.mean()) < 1  # SoftMatch's own, not scaled
    assert torch.equal(weighting.scores(images, second, None), weights)  # looking moves nothing


def test_softmatch_takes_a_batch_of_one():
    pseudo = pseudo_label(draw_logits(1), 0.5)
    assert torch.equal(SoftMatch(CPU).weights(draw_images(1), pseudo), torch.ones(1))


def test_softmatch_has_no_threshold_after_the_warm_up(training_set, run_config, tmp_path):
    """No pseudo-label reaches τ: FixMatch's loss is the supervised one, SoftMatch's is not."""
    losses = {}
    for arm in ("fixmatch", "softmatch"):
        settings = {"threshold": 0.999999, "weighing": {"warmup": 0.5}}
        run = Run(run_config(arm, steps=20, **settings), training_set, tmp_path / arm)
        run.train_steps(10)
        run.train_steps(1)
        lines = run.result()["metrics"]
        assert [line["mask_rate"] for line in lines] == [0, 0]  # of τ, whatever the arm does
        losses[arm] = [line["loss"] for line in lines]
    assert losses["fixmatch"][0] == losses["softmatch"][0]
    assert losses["fixmatch"][1] < losses["softmatch"][1] - 0.05


# --- energy -------------------------------------------------------------------------------------


def test_energy_is_cut_where_the_pool_falls_apart(classifier, half_noise):
    pool = ImageStore(half_noise.unlabelled_images, CPU)
    weighting = Energy(pool, Streams(0))
    logits = draw_logits()
    torch.testing.assert_close(negative_free_energy(logits), logits.exp().sum(dim=1).log())
    pseudo = pseudo_label(logits, 0.5)
    assert torch.equal(weighting.weights(draw_images(), pseudo), torch.ones(12))
    report = weighting.update(classifier)
    with torch.no_grad():
        pool_logits = classifier(pool[torch.arange(40)].float() / 255)
    scores = negative_free_energy(pool_logits)
    assert weighting.cut == otsu_cut(scores) == -report["energy_cut"]
    weights = weighting.scores(draw_images(40), pseudo_label(pool_logits, 0.5), None)
    assert torch.equal(weights, torch.where(scores > weighting.cut, 1.0, BELOW_CUT))
    assert weights[:20].mean() > weights[20:].mean() + 0.3


def test_a_large_pool_is_sampled_for_the_cut(classifier):
    images = np.zeros((SCORED + 1, 1, 8, 8), dtype=np.uint8)
    seen = []
    classifier.head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    Energy(ImageStore(images, CPU), Streams(0)).update(classifier)
    assert seen == [SCORED]


# --- inlier filter ------------------------------------------------------------------------------


def test_the_one_vs_all_loss_takes_the_hardest_negative():
    logits, labels = draw_logits(5, 4).double(), torch.tensor([0, 1, 2, 3, 1])
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = [1 / (1 + math.exp(-z)) for z in row]
        total -= math.log(p[label]) + math.log(1 - max(p[:label] + p[label + 1 :]))
    assert float(one_vs_all_loss(logits, labels)) == pytest.approx(total / 5)
    chosen = [1 / (1 + math.exp(-row[k])) for row, k in zip(logits, labels, strict=True)]
    assert inlier_probability(logits, labels).tolist() == pytest.approx(chosen)


def test_the_inlier_filter_weighs_foreign_images_down(classifier, half_noise):
    labelled, labels, augmentation, config = parts(half_noise, fit_steps=20, learning_rate=0.05)
    weighting = InlierFilter(classifier, labelled, labels, augmentation, config, Streams(0))
    images = torch.from_numpy(half_noise.unlabelled_images).float() / 255
    with torch.no_grad():
        pseudo = pseudo_label(classifier(images), 0.1)
    assert torch.equal(weighting.weights(images, pseudo), torch.ones(40))  # heads know nothing
    before = [p.clone() for p in classifier.parameters()]
    first = weighting.update(classifier)["inlier_loss"]
    for _ in range(9):
        last = weighting.update(classifier)["inlier_loss"]
    assert last < 0.5 * first
    weights = weighting.scores(images, pseudo, None)
    probability = inlier_probability(weighting.heads(classifier.features(images)), pseudo.labels)
    assert torch.equal(weights, torch.where(probability > 0.5, 1.0, BELOW_CUT))
    assert weights[:20].mean() > weights[20:].mean() + 0.3
    # The classifier is read, never trained, by the heads.
    assert all(map(torch.equal, before, classifier.parameters()))
    assert all(p.grad is None for p in classifier.parameters())


# --- DS3L ---------------------------------------------------------------------------------------


def test_softmax_weights_are_a_function_of_the_softmax_vector_alone(classifier, training_set):
    weighting = influential(SoftmaxWeights, training_set, 3)
    report = weighting.update(classifier)
    assert report["weight_spread"] > 0
    pseudo = pseudo_label(draw_logits(), 0.5)
    scores = weighting.scores(draw_images(), pseudo, torch.arange(12))
    expected = torch.sigmoid(weighting.network(pseudo.probabilities))
    assert torch.equal(scores, expected)
    assert weighting.cut is None  # soft, though `weights` is hard
    assert len(set(scores.tolist())) > 2


def test_softmax_weights_descend_the_one_step_hypergradient(classifier, training_set, monkeypatch):
    """The step is along the gradient of L_outer(θ − η ∇ mean_i w_i m_i CE_i) in φ."""
    settings = {"fit_steps": 1, "proximity": 0.0}
    weighting = influential(SoftmaxWeights, training_set, 3, **settings)
    twin = influential(SoftmaxWeights, training_set, 3, **settings)
    _, _, strong, pseudo = twin._draw_pool(classifier)
    direction = twin._outer_gradient(classifier)
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


# --- free weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["hard", "soft"])
def test_free_weights_are_the_running_means_of_learned(weights, classifier, training_set):
    free, learned = (
        influential(kind, training_set, weights=weights, influence_batch=12)
        for kind in (FreeWeights, Learned)
    )
    indices, _, strong, pseudo = free._draw_pool(classifier)
    direction = free._outer_gradient(classifier)
    influence = free._influence(classifier, strong, pseudo, direction)
    for weighting in (free, learned):
        weighting._remember(indices, influence)
    free._fit()
    free.score_pool()
    everyone = torch.arange(40)
    known = learned.evidence > 0
    assert 0 < int(known.sum()) < 40
    means = learned.influence[known] / learned.evidence[known]
    scores = free.scores(draw_images(40), pseudo, everyone)
    if weights == "soft":
        torch.testing.assert_close(scores[known], means.sigmoid())
    else:
        cut = otsu_cut(means.sigmoid())
        assert torch.equal(scores[known] == 1, means.sigmoid() > cut)
    assert (scores[~known] == 1).all()
    # Images outside of the pool: no opinion.
    assert torch.equal(free.scores(draw_images(), pseudo, None), torch.ones(12))


def test_free_weights_measure_as_learned_does(classifier, training_set):
    weighting = influential(FreeWeights, training_set)
    report = weighting.update(classifier)
    assert report["products"] <= weighting.config.max_products
    assert report["weight_spread"] > 0
    assert int((weighting.evidence > 0).sum()) > 0
    assert not hasattr(weighting, "network")


# --- checkpoints and configuration --------------------------------------------------------------


@pytest.mark.parametrize("arm", ["softmatch", "energy", "inlier", "ds3l", "free"])
def test_a_restored_weighting_weighs_the_same(arm, training_set, run_config, tmp_path):
    run = Run(run_config(arm), training_set, tmp_path / "a")
    run.train_steps(20)
    fresh = Run(run_config(arm), training_set, tmp_path / "b")
    fresh.classifier.load_state_dict(run.classifier.state_dict())
    images = torch.from_numpy(training_set.unlabelled_images).float() / 255
    # From hardly sure to as sure as the classifier is.
    logits = torch.linspace(0.1, 1, 40).unsqueeze(1) * run.classifier(images)
    pseudo, everyone = pseudo_label(logits, 0.4), torch.arange(40)
    expected = run.weighting.scores(images, pseudo, everyone)
    assert not torch.equal(fresh.weighting.scores(images, pseudo, everyone), expected)
    fresh.weighting.load_state_dict(run.weighting.state_dict())
    assert torch.equal(fresh.weighting.scores(images, pseudo, everyone), expected)


class Synchronisations(TorchDispatchMode):
    """Records operations that make the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arm", ARMS)
def test_a_plain_step_does_not_wait_for_the_device(arm, training_set, run_config, tmp_path):
    config = run_config(arm, steps=40, distribution_alignment=True)
    run = Run(config, training_set, tmp_path)
    run.train_steps(15)  # weights were updated, at step 10 and 15
    batches = run._views(3)
    with Synchronisations() as waits:
        for batch in batches:
            run._train_step(batch)
    assert waits.found == []
    with Synchronisations() as waits:
        float(torch.ones(1))
    assert waits.found


def test_the_held_out_half_is_kept_by_every_arm_with_an_outer_loss(
    training_set, run_config, tmp_path
):
    for arm, kept in (("ds3l", 6), ("free", 6), ("inlier", 12), ("energy", 12)):
        config = run_config(arm, weighing={"outer_labels": "held_out"})
        run = Run(config, training_set, tmp_path / arm)
        assert len(run.labelled) == kept
        if arm in ("ds3l", "free"):
            assert len(run.weighting.outer_images) == 6


def test_softmax_weights_have_the_runs_classes(training_set, run_config, tmp_path):
    config = run_config("ds3l")
    more = RunConfig("ds3l", 0, 40, classes=5, training=config.training)
    run = Run(more, training_set, tmp_path)
    run.train_steps(15)
    assert run.weighting.network.layers[0].in_features == 5


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"training\.distribution_alignment"):
        TrainingConfig(distribution_alignment="yes")
    with pytest.raises(ValueError, match="softmatch, energy"):
        RunsConfig(arms=("openmatch",))
