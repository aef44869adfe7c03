import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from tests.semisup.helpers import fit_until_killed, parameters, same
from weighmatch.arms import arm_names
from weighmatch.semisup.training.loop import Run
from weighmatch.semisup.training.online import train_online
from weighmatch.semisup.training.schedules import make_schedule


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks even in a short run."""
    monkeypatch.setattr("weighmatch.semisup.training.batches.CHUNK", 16)


@pytest.mark.integration
@pytest.mark.parametrize("arm", ["supervised", "fixmatch", "learned"])
def test_the_images_augmented_together_change_nothing(
    arm, training_set, run_config, tmp_path, monkeypatch
):
    first = make_schedule(run_config(arm)).fit(training_set, tmp_path / "a")
    monkeypatch.setattr("weighmatch.semisup.training.batches.CHUNK", 7)
    second = make_schedule(run_config(arm)).fit(training_set, tmp_path / "b")
    assert same(parameters(first), parameters(second))


@pytest.mark.integration
def test_a_run_that_stops_goes_on_in_another_folder(training_set, run_config, tmp_path):
    config = run_config()
    half = train_online(config, training_set, tmp_path / "half", until=13)
    again = train_online(config, training_set, tmp_path / "half", until=13)
    assert same(half, again)
    assert half.log[-1]["step"] == 13
    rest = train_online(config, training_set, tmp_path / "rest", earlier=tmp_path / "half")
    whole = train_online(config, training_set, tmp_path / "whole")
    assert same(parameters(rest), parameters(whole))
    assert rest.log[0] == half.log[0]
    # What another run left is nothing to go on from.
    other = run_config(seed=7)
    fresh = train_online(other, training_set, tmp_path / "fresh")
    assert same(train_online(other, training_set, tmp_path / "c", earlier=tmp_path / "half"), fresh)


@pytest.mark.integration
@pytest.mark.parametrize("arm", arm_names())
def test_every_arm_trains_and_repeats_to_the_bit(arm, training_set, run_config, tmp_path):
    first = make_schedule(run_config(arm)).fit(training_set, tmp_path / "a")
    second = make_schedule(run_config(arm)).fit(training_set, tmp_path / "b")
    assert same(first, second)
    assert all(torch.isfinite(v).all() for v in parameters(first).values())
    if arm == "supervised":
        assert first.history.step == []
    else:
        assert first.history.step == [20, 40]
        assert first.history.weights.shape == (2, 40)
        means = first.history.weights.mean(dim=1)
        torch.testing.assert_close(means, torch.ones(2))


@pytest.mark.integration
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    "arm", ["fixmatch", "softmatch", "energy", "ds3l", "pu", "inlier", "free", "learned"]
)
def test_a_killed_run_resumes_to_the_same_end(arm, aligned, training_set, run_config, tmp_path):
    config = run_config(arm, steps=48, distribution_alignment=aligned)
    whole = make_schedule(config).fit(training_set, tmp_path / "whole")
    fit_until_killed(make_schedule(config), training_set, tmp_path / "killed", 32)
    reported = []
    resumed = make_schedule(config).fit(training_set, tmp_path / "killed", reported.append)
    assert reported[0] >= 16  # what was done before the kill
    assert sum(reported) == 48
    assert same(whole, resumed)
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [16, 32, 48]


@pytest.mark.integration
def test_a_finished_run_is_not_trained_again(training_set, run_config, tmp_path, monkeypatch):
    first = make_schedule(run_config()).fit(training_set, tmp_path)
    monkeypatch.setattr(Run, "train_steps", lambda *_: pytest.fail("trained again"))
    assert same(make_schedule(run_config()).fit(training_set, tmp_path), first)
    # From the last checkpoint alone, too.
    (tmp_path / "run.pt").unlink()
    assert same(make_schedule(run_config()).fit(training_set, tmp_path), first)


@pytest.mark.integration
def test_a_damaged_checkpoint_is_named_and_trained_again(
    training_set, run_config, tmp_path, caplog
):
    config = run_config(steps=20)
    first = train_online(config, training_set, tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    place = whole.index(parameters(first)["head.weight"].numpy().tobytes())
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for damaged in (whole[:1000], b"", b"not a checkpoint" * 9, flipped):
        path.write_bytes(damaged)
        caplog.clear()
        assert same(train_online(config, training_set, tmp_path), first)
        assert "checkpoint.pt is damaged" in caplog.text
        assert "what it held is trained again" in caplog.text


@pytest.mark.integration
def test_a_damaged_finished_run_is_made_again_from_its_checkpoints(
    training_set, run_config, tmp_path, monkeypatch, caplog
):
    first = make_schedule(run_config()).fit(training_set, tmp_path)
    path = tmp_path / "run.pt"
    whole = path.read_bytes()
    place = whole.index(parameters(first)["head.weight"].numpy().tobytes())
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    monkeypatch.setattr(Run, "train_steps", lambda *_: pytest.fail("trained again"))
    for damaged in (whole[:1000], b"", flipped):
        path.write_bytes(damaged)
        caplog.clear()
        assert same(make_schedule(run_config()).fit(training_set, tmp_path), first)
        assert "run.pt is damaged" in caplog.text
        assert path.read_bytes() == whole


def test_a_cut_line_of_metrics_is_dropped(training_set, run_config, tmp_path):
    first = train_online(run_config(), training_set, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    assert same(train_online(run_config(), training_set, tmp_path), first)


@pytest.mark.integration
def test_another_configuration_starts_over(training_set, run_config, tmp_path):
    make_schedule(run_config(seed=0)).fit(training_set, tmp_path)
    other = make_schedule(run_config(seed=1)).fit(training_set, tmp_path)
    assert other.config.seed == 1
    assert same(other, make_schedule(run_config(seed=1)).fit(training_set, tmp_path / "fresh"))


@pytest.mark.integration
def test_arms_of_a_seed_are_paired_until_their_weights_differ(training_set, run_config, tmp_path):
    """Same initialisation, batches and augmentation: equal losses through the warm-up."""
    losses = {}
    for arm in (arm for arm in arm_names() if arm != "supervised"):
        # So that none is aligned.
        aligned = arm == "fixmatch_realigned"
        config = run_config(
            arm, steps=32, weighting={"warmup": 0.9}, distribution_alignment=aligned
        )
        result = make_schedule(config).fit(training_set, tmp_path / arm)
        losses[arm] = result.log[0]["loss"]
    assert len(set(losses.values())) == 1


def test_training_learns(training_set, run_config, tmp_path):
    result = make_schedule(run_config("fixmatch", steps=200)).fit(training_set, tmp_path)
    losses = [line["loss"] for line in result.log]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("arm", ["supervised", "learned"])
def test_divergence_is_an_error_with_a_cure(arm, training_set, run_config, tmp_path):
    config = run_config(arm, learning_rate=99.0, momentum=0.99, weight_decay=0.9)
    with pytest.raises(FloatingPointError, match=r"lower training\.learning_rate"):
        make_schedule(config).fit(training_set, tmp_path)


def test_held_out_outer_labels_leave_training(training_set, run_config, tmp_path):
    config = run_config("learned", weighting={"outer_labels": "held_out"})
    run = Run(config, training_set, tmp_path)
    assert len(run.batches.labelled) == len(run.weighting.context.outer[0]) == 6
    inside = {image.numpy().tobytes() for image in run.batches.labelled}
    assert not any(image.numpy().tobytes() in inside for image in run.weighting.context.outer[0])
    assert np.bincount(run.batches.labels.numpy()).tolist() == [2, 2, 2]


def final(result):
    return torch.cat([value.flatten() for value in parameters(result).values()])


@pytest.mark.integration
@pytest.mark.parametrize("arm", ["fixmatch", "learned"])
def test_the_memory_layout_changes_rounding_only(arm, training_set, run_config, tmp_path):
    config = run_config(arm, steps=20)
    plain = make_schedule(config).fit(training_set, tmp_path / "plain")
    last = dataclasses.replace(
        config, training=dataclasses.replace(config.training, channels_last=True)
    )
    arranged = make_schedule(last).fit(training_set, tmp_path / "last")
    run = Run(last, training_set, tmp_path / "fresh")
    kernels = [p for p in run.classifier.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert not all(p.is_contiguous() for p in kernels)
    torch.testing.assert_close(final(arranged), final(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.integration
def test_half_precision_is_for_the_classifiers_passes_alone(training_set, run_config, tmp_path):
    config = run_config("learned", steps=40, precision="bfloat16")
    run = Run(config, training_set, tmp_path / "look")
    seen = []
    run.classifier.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run.train_steps(10)  # the tenth step updates the weights
    assert set(seen) == {torch.bfloat16, torch.float32}
    assert all(p.dtype == torch.float32 for p in run.classifier.parameters())
    # Two steps: after many, rounding has led the runs apart, on some processors by more than this.
    few = run_config("learned", steps=2, precision="bfloat16")
    half = make_schedule(few).fit(training_set, tmp_path / "half")
    whole = make_schedule(run_config("learned", steps=2)).fit(training_set, tmp_path / "whole")
    assert half.log[0]["loss"] == pytest.approx(whole.log[0]["loss"], rel=0.05)
    assert not torch.equal(final(half), final(whole))


@pytest.mark.integration
@pytest.mark.parametrize("wanted", [True, False])
def test_repeatable_algorithms_are_asked_for_and_given_back(
    wanted, training_set, run_config, tmp_path
):
    asked = torch.are_deterministic_algorithms_enabled
    during = []
    watch = lambda steps: during.append((asked(), torch.backends.cudnn.allow_tf32))  # noqa: E731
    before = torch.backends.cudnn.allow_tf32
    make_schedule(run_config(deterministic=wanted)).fit(training_set, tmp_path, watch)
    assert set(during) == {(wanted, False)}
    assert (asked(), torch.backends.cudnn.allow_tf32) == (False, before)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_run_trains_to_the_same_end(training_set, run_config, tmp_path):
    plain = make_schedule(run_config(steps=20)).fit(training_set, tmp_path / "plain")
    compiled = make_schedule(run_config(steps=20, compile=True)).fit(training_set, tmp_path / "c")
    assert compiled.seconds > plain.seconds  # the warm-up counts
    torch.testing.assert_close(final(compiled), final(plain), rtol=1e-3, atol=1e-3)
