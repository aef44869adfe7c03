"""Nearness to the labelled images, and what it says of a pool."""

import numpy as np
import pytest
import torch

from weighmatch.semisup.weightings.head import ConfidenceHead
from weighmatch.semisup.weightings.nearness import Nearness, judge_pool, nearness_of

WIDTH, CLASSES = 40, 3


def drawn(labels, seed, spread=1.5):
    """Features (n, width) around a direction a class; labels from 3 on are foreign classes."""
    noise = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))
    return centres[labels] + spread * torch.randn(len(labels), WIDTH, generator=noise)


def pool_of(foreign, seed, size=300):
    rng = torch.Generator().manual_seed(1000 + seed)
    known = torch.randint(CLASSES, (size - round(foreign * size),), generator=rng)
    strange = torch.randint(CLASSES, 8, (round(foreign * size),), generator=rng)
    labels = torch.cat([known, strange])
    return drawn(labels, seed), labels < CLASSES


LABELS = torch.arange(12) % CLASSES


def test_nearness_is_the_largest_class_cosine_and_the_mean_of_five():
    examples = torch.eye(8)
    means = torch.eye(8)[:2]
    one = torch.tensor([[0.6, 0, 0.8, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(nearness_of(one, examples, means), torch.tensor([0.6 + 1.4 / 5]))


def test_foreign_images_lie_further_away_and_neighbours_make_that_clearer():
    pool, known = pool_of(0.5, seed=1)
    nearness = Nearness(WIDTH, CLASSES)
    labelled = drawn(LABELS, seed=2)
    nearness.fit(labelled, LABELS, pool)
    together, own = (
        nearness(pool),
        nearness_of(torch.nn.functional.normalize(pool), nearness.examples.float(), nearness.means),
    )
    gap = [float(s[known].mean() - s[~known].mean()) / float(s.std()) for s in (together, own)]
    assert gap[0] > gap[1] > 1


def test_images_that_were_never_seen_are_scored_as_those_of_the_pool():
    pool, _ = pool_of(0.5, seed=1)
    nearness = Nearness(WIDTH, CLASSES)
    nearness.fit(drawn(LABELS, seed=2), LABELS, pool)
    unseen, known = pool_of(0.5, seed=3)
    scores = nearness(unseen)
    assert scores[known].median() > scores[~known].quantile(0.9)
    assert torch.equal(nearness(unseen[:1]), nearness(unseen)[:1])


def test_a_head_comes_back_from_its_state():
    pool, _ = pool_of(0.5, seed=1)
    head = ConfidenceHead(WIDTH, CLASSES, seed=0, distance=Nearness(WIDTH, CLASSES))
    head.fit_distance(head.norm(drawn(LABELS, seed=2)), LABELS, head.norm(pool))
    again = ConfidenceHead.from_state(head.state_dict(), CLASSES)
    assert torch.equal(again(pool), head(pool))


def test_p_is_about_uniform_in_clean_pools():
    found = [
        judge_pool(drawn(LABELS, 500 + s), LABELS, pool_of(0, s)[0], CLASSES) for s in range(60)
    ]
    p = np.array([p_clean for p_clean, _ in found])
    assert (p < 0.05).mean() <= 0.15
    assert 0.3 < np.median(p) < 0.7
    assert np.mean([share for _, share in found]) > 0.85


@pytest.mark.parametrize("foreign", [0.5, 0.75])
def test_contaminated_pools_are_seen_and_the_useful_share_is_about_right(foreign):
    found = [
        judge_pool(drawn(LABELS, 500 + s), LABELS, pool_of(foreign, s)[0], CLASSES)
        for s in range(20)
    ]
    assert np.mean([p_clean < 0.05 for p_clean, _ in found]) > 0.8
    assert np.mean([share for _, share in found]) == pytest.approx(1 - foreign, abs=0.15)


def test_a_class_with_one_image_leaves_nothing_to_judge_by():
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert judge_pool(drawn(labels, 1), labels, pool_of(0.5, 1)[0], CLASSES) == (None, 1.0)
