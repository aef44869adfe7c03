import pytest
import torch
import torch.nn.functional as F

from weighmatch.checks import ToldError
from weighmatch.semisup import ConfidenceNetwork, build_classifier
from weighmatch.semisup.parts.networks import _PoolTo2x2


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
    for name, message in (
        (
            "moon",
            r"choose from small_cnn, wrn_28_2, efficientnet_lite0, torchvision/<name> or timm/",
        ),
        ("resnet18", r"'resnet18' is unknown; did you mean torchvision/resnet18\?"),
        ("efficientnet_b0", r"did you mean torchvision/efficientnet_b0\?"),
        ("wrn_28", r"did you mean wrn_28_2\?"),
    ):
        with pytest.raises(ToldError, match=message):
            build_classifier(name, 3, 10, seed=0)


@pytest.mark.parametrize("size", [(4, 4), (6, 8), (5, 4), (3, 7)])
def test_maps_of_any_size_are_averaged_to_two_by_two(size):
    maps = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = F.adaptive_avg_pool2d(maps, 2).flatten(1)
    torch.testing.assert_close(_PoolTo2x2()(maps), expected)
