"""What holds for the weightings of whole runs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weighmatch.arms import arm_names
from weighmatch.semisup.parts.losses import pseudo_label
from weighmatch.semisup.training.loop import Run


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


@pytest.mark.integration
@pytest.mark.parametrize("arm", arm_names())
def test_a_plain_step_does_not_wait_for_the_device(arm, training_set, run_config, tmp_path):
    config = run_config(arm, steps=40, distribution_alignment=True)
    run = Run(config, training_set, tmp_path)
    run.train_steps(15)  # weights were updated, at step 10 and 15
    batches = run.batches.draw(3)
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
        config = run_config(arm, weighting={"outer_labels": "held_out"})
        run = Run(config, training_set, tmp_path / arm)
        assert len(run.batches.labelled) == kept
        if arm in ("ds3l", "free"):
            assert len(run.weighting.context.outer[0]) == 6
