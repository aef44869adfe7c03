import pytest
import torch

from weighmatch.semisup.parts.losses import pseudo_label
from weighmatch.semisup.parts.running import DECAY, DistributionAlignment, RunningMean
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.training.online import train_online

CPU = torch.device("cpu")


def draw_logits(n=12, classes=3, seed=0):
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def test_a_running_mean_is_a_mean_at_first_and_forgets_later():
    running = RunningMean(1, CPU)
    values = torch.rand(300, 1, generator=torch.Generator().manual_seed(0))
    for value in values[:50]:
        running.update(value)
    torch.testing.assert_close(running.value, values[:50].mean(dim=0))
    expected = float(values[:100].mean())
    for value in values[50:]:
        running.update(value)
    for value in values[100:, 0].tolist():
        expected = DECAY * expected + (1 - DECAY) * value
    assert float(running.value) == pytest.approx(expected, rel=1e-5)


def test_alignment_is_the_ratio_of_marginals():
    labels = torch.tensor([0, 0, 0, 1, 2])
    alignment = DistributionAlignment(labels, 3)
    logits = draw_logits()
    p = logits.softmax(dim=1)
    assert torch.equal(alignment(p), p)  # nothing is known of the predictions yet
    alignment.observe(logits)
    unnormalised = p * torch.tensor([0.6, 0.2, 0.2]) / p.mean(dim=0)
    expected = unnormalised / unnormalised.sum(dim=1, keepdim=True)
    torch.testing.assert_close(alignment(p), expected)
    pseudo = pseudo_label(logits, 0.7, alignment)
    torch.testing.assert_close(pseudo.probabilities, expected)
    assert torch.equal(pseudo.labels, expected.argmax(dim=1))
    assert torch.equal(pseudo.mask, (expected.amax(dim=1) >= 0.7).float())
    assert torch.equal(pseudo.logits, logits)


def test_alignment_turns_pseudo_labels_to_neglected_classes():
    logits = draw_logits(600) + torch.tensor([1.5, 0.0, 0.0])
    alignment = DistributionAlignment(torch.tensor([0, 1, 2]), 3)
    alignment.observe(logits)
    plain, aligned = (pseudo_label(logits, 0.5, a).labels.bincount() for a in (None, alignment))
    assert plain[0] > 300  # of 600
    assert aligned.max() - aligned.min() < 0.6 * (plain.max() - plain.min())


@pytest.mark.integration
@pytest.mark.parametrize("arm", ["fixmatch", "learned"])
def test_alignment_changes_what_is_trained(arm, training_set, run_config, tmp_path):
    losses = {}
    for wanted in (False, True):
        run = Run(
            run_config(arm, distribution_alignment=wanted), training_set, tmp_path / str(wanted)
        )
        run.train_steps(10)
        losses[wanted] = run.result().log[0]["loss"]
        if wanted:
            assert run.alignment.predicted.seen == 10  # snapshots and updates do not count
            assert float(run.alignment.predicted.value.sum()) == pytest.approx(1, abs=1e-4)
            assert arm != "learned" or run.weighting.context.align is run.alignment
    assert losses[False] != losses[True]


@pytest.mark.integration
@pytest.mark.parametrize("aligned", [False, True])
def test_the_realigned_arm_is_fixmatch_with_the_other_alignment(
    aligned, training_set, run_config, tmp_path
):
    found = {}
    for arm, wanted in (("fixmatch_realigned", aligned), ("fixmatch", not aligned)):
        config = run_config(arm, distribution_alignment=wanted)
        found[arm] = train_online(config, training_set, tmp_path / arm)
    realigned, plain = (run.classifier.state_dict() for run in found.values())
    assert all(torch.equal(realigned[name], value) for name, value in plain.items())
