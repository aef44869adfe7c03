import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import multivariate_normal
from sklearn.covariance import shrunk_covariance

from weighmatch.semisup.weightings.head import (
    DISTANCE_WEIGHT,
    SHRINKAGE,
    ConfidenceHead,
    Moments,
    RelativeMahalanobis,
)


def test_the_relative_distance_is_a_ratio_of_normal_densities():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 2]).repeat(20)
    means = torch.tensor([[2.0, 0, 0], [0, 0, 0], [0, 2, 1]])
    labelled = means[labels] + torch.randn(40, 3, generator=generator)
    pool, images = (torch.randn(n, 3, generator=generator) + 0.3 for n in (60, 9))
    distance = RelativeMahalanobis(3, classes=3)
    distance.fit(labelled, labels, pool)

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
    head.standardise(head.parts(pool))
    with torch.no_grad():
        mlps = head.members(pool).mean(1)
        distance = head.distance(head.norm(pool))
        mlps, distance = ((x - x.mean()) / x.std(correction=0) for x in (mlps, distance))
        expected = mlps + DISTANCE_WEIGHT * distance
        torch.testing.assert_close(head(pool), expected)
