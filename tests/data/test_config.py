import pickle
from dataclasses import replace

import pytest

from weighmatch.data.config import DataConfig
from weighmatch.data.splits import proportional


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 1.0}, "data.ratio must be a number at least 0 and below 1"),
        ({"ratio": -0.1}, "data.ratio"),
        ({"ratio": "much"}, "data.ratio"),
        ({"ratio": float("nan")}, "data.ratio"),
        ({"ratio": 0.9999, "ood_source": "noise"}, "leaves no in-distribution image"),
        ({"labels_per_class": 178}, "rarest seen class has only 177 images; lower it"),
        ({"labels_per_class": 150}, "lower data.labels_per_class"),
        ({"labels_per_class": 0}, "data.labels_per_class must be an integer of at least 1"),
        ({"ood_source": "moon"}, "choose from mix, unseen, patches, noise"),
        ({"regime": "both"}, "choose from fixed_total, added"),
        ({"seeds": [1, "two"]}, "data.seeds must be a list of different whole numbers"),
        ({"seeds": [1.5]}, "data.seeds"),
        ({"seeds": [1, 1]}, "data.seeds"),
        ({"seeds": []}, "data.seeds"),
        ({"seeds": 3}, "data.seeds"),
        ({"seeds": [True]}, "data.seeds"),
        ({"seen_classes": [0]}, "data.seen_classes"),
        ({"seen_classes": [0, 11]}, "data.seen_classes"),
        ({"pool_size": 900}, "unseen classes"),
        ({"sides": 9, "shape": 2}, "no parameter shape, sides; did you mean size for sides?"),
        ({"glyphs": {"size": 4}}, "data.glyphs.size"),
        ({"source": "moon"}, "data.source 'moon' is unknown; choose from digits, folder"),
        ({"regime": "added", "ratio": 0.9}, "lower data.ratio"),
        ({"ratio": 0.0, "pool_size": 800}, "lower data.labels_per_class, data.pool_size"),
    ],
)
def test_wrong_parameters_are_named_with_the_cure(wrong, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below)
        DataConfig(**{"seeds": [0], **wrong})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_regimes_hold_what_they_say():
    total = DataConfig(seeds=[0], ratio=0.75)
    assert (total.pool_id, total.pool_ood) == (150, 450)
    added = DataConfig(seeds=[0], ratio=0.6, regime="added", id_size=100)
    assert (added.pool_id, added.pool_ood) == (100, 150)
    clean = DataConfig(seeds=[0], ratio=0)
    assert (clean.pool_id, clean.pool_ood) == (600, 0)


def test_a_mix_has_equal_parts():
    counts = DataConfig(seeds=[0], ood_source="mix").ood_counts(100)
    assert counts == {"unseen": 34, "patches": 33, "noise": 33, "foreign": 0}


def test_parameters_of_other_sources_are_checked_but_not_kept():
    config = DataConfig(seeds=[0], glyphs={"size": 32})
    assert config.parameters()["seen_classes"] == (0, 1, 2, 3, 4, 5)
    assert "glyphs" not in config.parameters()
    assert replace(config, ratio=0.5) == DataConfig(seeds=[0], ratio=0.5)
    assert pickle.loads(pickle.dumps(config)) == config


def test_proportional_cuts_add_up():
    assert proportional([10, 20, 30], 6) == [1, 2, 3]
    assert sum(proportional([7, 7, 7], 20)) == 20
    assert proportional([1, 1], 2) == [1, 1]
