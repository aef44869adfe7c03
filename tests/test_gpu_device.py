"""What is computed on a GPU is what is computed on the CPU; skipped where there is none.

`python -m benchmarks.gpu` runs these without pytest-xdist and without the development packages.
"""

import warnings

import pytest
import torch

from benchmarks.gpu.device import synchronising_lines
from benchmarks.gpu.parts import compare
from weighmatch.implicit import ConjugateGradient, GaussNewton, Hessian, extreme_eigenvalues
from weighmatch.semisup.config import AugmentationConfig
from weighmatch.semisup.parts.augmentation import Augmentation
from weighmatch.semisup.training.online import train_online

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("arm", ["fixmatch", "learned"])
def test_a_run_is_that_of_the_cpu(arm, tmp_path):
    found = compare(arm, "cuda", tmp_path)
    assert found.equal, found


@pytest.mark.parametrize("view", ["weak", "strong"])
def test_views_are_those_of_the_cpu(view):
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    augment = getattr(Augmentation(AugmentationConfig(flip=True)), view)
    expected = augment(images, torch.Generator().manual_seed(0))
    found = augment(images.cuda(), torch.Generator().manual_seed(0)).cpu()
    # Where interpolation rounds to another grey level, or a level falls on the other side of a
    # threshold, a few pixels differ.
    assert (found - expected).abs().gt(0.01).float().mean() < 1e-3


@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
def test_a_solve_is_that_of_the_cpu(curvature):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(32) % 4
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    rhs = torch.randn(24, generator=generator, dtype=torch.float64)

    def solve(device):
        x, y = inputs.to(device), labels.to(device)

        def outputs(params):
            return x @ params["w"].T

        def loss(logits):
            return torch.nn.functional.cross_entropy(logits, y)

        params = {"w": weight.to(device)}
        if curvature is Hessian:
            operator = Hessian(lambda p: loss(outputs(p)), params)
        else:
            operator = GaussNewton(outputs, loss, params)
        damping = 0.1 * extreme_eigenvalues(operator)[1]
        return ConjugateGradient(damping=damping, max_products=40).solve(operator, rhs.to(device))

    assert torch.allclose(solve("cuda").value.cpu(), solve("cpu").value, rtol=1e-6)


def test_a_pool_on_the_host_gives_the_run_of_one_on_the_device(run_config, training_set, tmp_path):
    def classifier(memory):
        config = run_config("fixmatch", device="cuda", deterministic=True, pool_memory=memory)
        return train_online(config, training_set, tmp_path / memory).classifier.state_dict()

    host, device = classifier("host"), classifier("device")
    assert all(torch.equal(host[name], device[name]) for name in host)


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    run_config, training_set, tmp_path
):
    config = run_config("learned", device="cuda", deterministic=True)
    whole = train_online(config, training_set, tmp_path / "whole").classifier.state_dict()
    train_online(config, training_set, tmp_path / "parts", until=20)
    parts = train_online(config, training_set, tmp_path / "parts").classifier.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_torch_warns_of_a_call_that_waits_for_the_device():
    value = torch.ones(1, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = synchronising_lines(lambda: value.item(), torch.device("cuda"))
    assert [line.split(":")[0] for line in lines] == ["test_gpu_device.py"]
