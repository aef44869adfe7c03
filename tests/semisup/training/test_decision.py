import numpy as np
import pytest
import torch

from weighmatch.semisup.training.decision import clean_chance, keep_best


def test_the_best_of_each_pseudo_class_are_kept():
    scores = torch.linspace(0, 1, 100)
    classes = torch.tensor([0] * 60 + [1] * 40)  # all of class 1 score above all of class 0
    kept = keep_best(scores, classes, share=0.4, count=2)
    assert kept[:60].sum() == kept[60:].sum() == 20
    assert kept[40:60].all()
    assert kept[80:].all()


def test_a_class_with_few_images_keeps_them_all_and_gives_nothing_to_others():
    classes = torch.tensor([0] * 95 + [1] * 5)
    kept = keep_best(torch.rand(100), classes, share=0.5, count=2)
    assert kept[95:].all()
    assert kept[:95].sum() == 25


def test_few_clean_pools_and_all_contaminated_ones_look_contaminated():
    # Features that know nothing of labels.
    generator = torch.Generator().manual_seed(0)

    def chance(shift):
        labelled = torch.randn(18, 4, generator=generator) + shift * torch.tensor([1, -1, 0, 0])
        pool = torch.randn(1, 120, 4, generator=generator)
        return clean_chance(labelled.repeat(10, 1), torch.arange(18) % 3, pool, 3)

    # The level is nominal: folds that share images err together.
    clean = np.array([chance(0.0) for _ in range(30)])
    assert (clean < 0.05).mean() < 0.3
    assert 0.35 < clean.mean() < 0.65
    assert all(chance(2.0) < 0.05 for _ in range(5))


@pytest.mark.parametrize("labels_per_class", [2, 3, 5])
def test_few_labels_a_class_do_not_make_a_pool_look_clean(labels_per_class):
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(9, 32, generator=generator)
    labels = torch.arange(6).repeat(labels_per_class)

    def draw(classes):
        return means[classes] + torch.randn(len(classes), 32, generator=generator)

    def chance(seen):
        pool = torch.randint(6, (200,), generator=generator)
        pool[seen:] = torch.randint(6, 9, (200 - seen,), generator=generator)
        return clean_chance(draw(labels.repeat(8)), labels, draw(pool)[None], 6)

    assert 0.3 < np.mean([chance(200) for _ in range(20)]) < 0.8
    assert np.mean([chance(100) < 0.05 for _ in range(10)]) > 0.8


def test_where_a_class_has_one_labelled_image_there_is_no_test():
    features = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    assert clean_chance(features, labels, features[None], 3) is None
