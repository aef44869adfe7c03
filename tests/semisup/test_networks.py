import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import multivariate_normal
from sklearn.covariance import shrunk_covariance

from weighmatch.semisup import ConfidenceNetwork, build_classifier
from weighmatch.semisup.parts.networks import (
    DISTANCE_WEIGHT,
    SHRINKAGE,
    ConfidenceHead,
    Moments,
    RelativeMahalanobis,
    _PoolTo2x2,
)


@pytest.mark.parametrize(("name", "side"), [("small_cnn", 8), ("wrn_28_2", 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_output_does_not_depend_on_the_batch(name, side, channels):
    network = build_classifier(name, channels, classes=5, seed=0)
    images = torch.rand(4, channels, side, side)
    with torch.no_grad():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    assert together.shape == (4, 5)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network.head(network.features(images)), network(images))


def test_wrn_28_2_has_the_published_size():
    network = build_classifier("wrn_28_2", 3, classes=10, seed=0)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(1.47e6, rel=0.01)


def test_a_seed_gives_one_initialisation_and_leaves_the_global_stream_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = build_classifier("small_cnn", 1, 3, seed=7)
    assert torch.equal(torch.rand(1), expected)
    second, other = (build_classifier("small_cnn", 1, 3, seed=s) for s in (7, 8))
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("side", [8, 16, 32])
def test_the_confidence_network_takes_any_size(side):
    assert ConfidenceNetwork(3, width=8, seed=0)(torch.rand(5, 3, side, side)).shape == (5,)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="choose from small_cnn, wrn_28_2"):
        build_classifier("resnet", 3, 10, seed=0)


@pytest.mark.parametrize("size", [(4, 4), (6, 8), (5, 4), (3, 7)])
def test_maps_of_any_size_are_averaged_to_two_by_two(size):
    maps = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = F.adaptive_avg_pool2d(maps, 2).flatten(1)
    torch.testing.assert_close(_PoolTo2x2()(maps), expected)


def test_the_relative_distance_is_a_ratio_of_normal_densities():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 2]).repeat(20)
    means = torch.tensor([[2.0, 0, 0], [0, 0, 0], [0, 2, 1]])
    labelled = means[labels] + torch.randn(40, 3, generator=generator)
    pool, images = (torch.randn(n, 3, generator=generator) + 0.3 for n in (60, 9))
    distance = RelativeMahalanobis(3, classes=3)
    distance.fit(Moments.of(labelled, labels, 3), Moments.of(pool))

    def shrunk(centred):
        covariance = np.cov(centred.T, bias=True)
        return shrunk_covariance(covariance, SHRINKAGE)

    centres = {k: labelled[labels == k].mean(0) for k in (0, 2)}
    inside = shrunk((labelled - torch.stack([centres[int(k)] for k in labels])).numpy())
    classes = [multivariate_normal(m.numpy(), inside).logpdf(images) for m in centres.values()]
    whole = multivariate_normal(pool.mean(0).numpy(), shrunk(pool.numpy())).logpdf(images)
    expected = torch.from_numpy(np.max(classes, axis=0) - whole).float()
    found = distance(images)
    torch.testing.assert_close(found - found[0], expected - expected[0], atol=1e-4, rtol=1e-4)


def test_sums_without_a_part_are_those_of_the_rest():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 4, generator=generator)
    labels = torch.arange(12) % 3
    part = labels + torch.arange(12) // 6 > 2
    found = Moments.of(features, labels, 3).without(Moments.of(features[part], labels[part], 3))
    rest = Moments.of(features[~part], labels[~part], 3)
    for mine, expected in zip(found, rest, strict=True):
        torch.testing.assert_close(mine, expected)
    whole = Moments.together([rest, Moments.of(features[part], labels[part], 3)])
    for mine, expected in zip(whole, Moments.of(features, labels, 3), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_member_of_the_head_is_an_mlp_of_its_own():
    head = ConfidenceHead(6, classes=2, seed=0, hidden=4, members=3)
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    scores = head.members(features)
    (gradient,) = torch.autograd.grad(scores[:, 1].sum(), head.hidden.weight)
    assert gradient[4:8].abs().sum() > 0
    assert gradient[:4].abs().sum() == gradient[8:].abs().sum() == 0
    normed = F.layer_norm(features, (6,))
    hidden = F.relu(normed @ head.hidden.weight[4:8].T + head.hidden.bias[4:8])
    torch.testing.assert_close(scores[:, 1], hidden @ head.output[1] + head.bias[1])


def test_both_parts_of_the_head_have_spread_one_on_the_pool():
    generator = torch.Generator().manual_seed(0)
    pool, labelled = (torch.randn(n, 6, generator=generator) for n in (50, 8))
    head = ConfidenceHead(6, classes=2, seed=0)
    head.fit_distance(head.norm(labelled), torch.arange(8) % 2, head.norm(pool))
    head.standardise(pool)
    with torch.no_grad():
        mlps = head.members(pool).mean(1)
        distance = head.distance(head.norm(pool))
        mlps, distance = ((x - x.mean()) / x.std(correction=0) for x in (mlps, distance))
        expected = mlps + DISTANCE_WEIGHT * distance
        torch.testing.assert_close(head(pool), expected)
