import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from weighmatch.semisup import Trainer
from weighmatch.semisup.config import ARMS, REALIGNED
from weighmatch.semisup.trainer import Run, fingerprint, pick_device


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks even in a short run."""
    monkeypatch.setattr("weighmatch.semisup.trainer.CHUNK", 16)


def same(a, b):
    """Whether two nested checkpoints are equal, leaving out times."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if "seconds" not in str(k))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def fit_until_killed(trainer, data, folder, killed_at):
    """Train until `killed_at` steps are done and then stop as a signal would."""

    class KilledError(Exception):
        pass

    done = []

    def kill(steps):
        done.append(steps)
        if sum(done) >= killed_at:
            raise KilledError

    with pytest.raises(KilledError):
        trainer.fit(data, folder, kill)


@pytest.mark.parametrize("arm", ["supervised", "fixmatch", "learned"])
def test_the_images_augmented_together_change_nothing(
    arm, training_set, run_config, tmp_path, monkeypatch
):
    first = Trainer(run_config(arm)).fit(training_set, tmp_path / "a")
    monkeypatch.setattr("weighmatch.semisup.trainer.CHUNK", 7)
    second = Trainer(run_config(arm)).fit(training_set, tmp_path / "b")
    assert same(first["classifier"], second["classifier"])


def test_a_run_that_stops_goes_on_in_another_folder(training_set, run_config, tmp_path):
    trainer = Trainer(run_config())
    half = trainer.fit(training_set, tmp_path / "half", until=13)
    again = trainer.fit(training_set, tmp_path / "half", until=13)
    assert same(half, again)
    assert half["metrics"][-1]["step"] == 13
    rest = trainer.fit(training_set, tmp_path / "rest", earlier=tmp_path / "half")
    whole = trainer.fit(training_set, tmp_path / "whole")
    assert same(rest["classifier"], whole["classifier"])
    assert rest["metrics"][0] == half["metrics"][0]
    # What another run left is nothing to go on from.
    other = Trainer(run_config(seed=7))
    fresh = other.fit(training_set, tmp_path / "fresh")
    assert same(other.fit(training_set, tmp_path / "c", earlier=tmp_path / "half"), fresh)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_repeats_to_the_bit(arm, training_set, run_config, tmp_path):
    first = Trainer(run_config(arm)).fit(training_set, tmp_path / "a")
    second = Trainer(run_config(arm)).fit(training_set, tmp_path / "b")
    assert same(first, second)
    assert all(torch.isfinite(v).all() for v in first["classifier"].values())
    if arm == "supervised":
        assert first["history"]["step"] == []
    else:
        assert first["history"]["step"] == [20, 40]
        assert first["history"]["weights"].shape == (2, 40)
        means = first["history"]["weights"].mean(dim=1)
        torch.testing.assert_close(means, torch.ones(2))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    "arm", ["fixmatch", "softmatch", "energy", "ds3l", "pu", "inlier", "free", "learned"]
)
def test_a_killed_run_resumes_to_the_same_end(arm, aligned, training_set, run_config, tmp_path):
    config = run_config(arm, steps=48, distribution_alignment=aligned)
    whole = Trainer(config).fit(training_set, tmp_path / "whole")
    fit_until_killed(Trainer(config), training_set, tmp_path / "killed", 32)
    reported = []
    resumed = Trainer(config).fit(training_set, tmp_path / "killed", reported.append)
    assert reported[0] >= 16  # what was done before the kill
    assert sum(reported) == 48
    assert same(whole, resumed)
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [16, 32, 48]


def test_a_finished_run_is_not_trained_again(training_set, run_config, tmp_path, monkeypatch):
    first = Trainer(run_config()).fit(training_set, tmp_path)
    monkeypatch.setattr(Run, "train_steps", lambda self: pytest.fail("trained again"))
    assert same(Trainer(run_config()).fit(training_set, tmp_path), first)


def test_a_damaged_checkpoint_is_named_and_kept(training_set, run_config, tmp_path):
    Trainer(run_config()).fit(training_set, tmp_path)
    path = tmp_path / "checkpoint.pt"
    for damaged in (path.read_bytes()[:1000], b"", b"not a checkpoint" * 9):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="delete its folder to train that run anew"):
            Trainer(run_config()).fit(training_set, tmp_path)
        assert path.read_bytes() == damaged


def test_a_cut_line_of_metrics_is_dropped(training_set, run_config, tmp_path):
    first = Trainer(run_config()).fit(training_set, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    assert same(Trainer(run_config()).fit(training_set, tmp_path), first)


def test_another_configuration_starts_over(training_set, run_config, tmp_path):
    Trainer(run_config(seed=0)).fit(training_set, tmp_path)
    other = Trainer(run_config(seed=1)).fit(training_set, tmp_path)
    assert other["config"]["seed"] == 1
    assert same(other, Trainer(run_config(seed=1)).fit(training_set, tmp_path / "fresh"))


def test_the_fingerprint_sees_data_seed_configuration_and_code(training_set, run_config):
    prints = {
        fingerprint(run_config(), training_set),
        fingerprint(run_config(seed=1), training_set),
    }
    prints.add(fingerprint(run_config(learning_rate=0.01), training_set))
    images = training_set.unlabelled_images.copy()
    images[0, 0, 0, 0] ^= 1
    changed = dataclasses.replace(training_set, unlabelled_images=images)
    prints.add(fingerprint(run_config(), changed))
    prints.add(fingerprint(dataclasses.replace(run_config(), code="another"), training_set))
    assert len(prints) == 5
    assert fingerprint(run_config(), training_set) in prints


def test_arms_of_a_seed_are_paired_until_their_weights_differ(training_set, run_config, tmp_path):
    """Same initialisation, batches and augmentation: equal losses through the warm-up."""
    losses = {}
    for arm in (arm for arm in ARMS if arm != "supervised"):
        # So that none is aligned.
        aligned = arm == REALIGNED
        config = run_config(arm, steps=32, weighing={"warmup": 0.9}, distribution_alignment=aligned)
        result = Trainer(config).fit(training_set, tmp_path / arm)
        losses[arm] = result["metrics"][0]["loss"]
    assert len(set(losses.values())) == 1


def test_training_learns(training_set, run_config, tmp_path):
    result = Trainer(run_config("fixmatch", steps=200)).fit(training_set, tmp_path)
    losses = [line["loss"] for line in result["metrics"]]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("arm", ["supervised", "learned"])
def test_divergence_is_an_error_with_a_cure(arm, training_set, run_config, tmp_path):
    config = run_config(arm, learning_rate=99.0, momentum=0.99, weight_decay=0.9)
    with pytest.raises(FloatingPointError, match=r"lower training\.learning_rate"):
        Trainer(config).fit(training_set, tmp_path)


def test_held_out_outer_labels_leave_training(training_set, run_config, tmp_path):
    config = run_config("learned", weighing={"outer_labels": "held_out"})
    run = Run(config, training_set, tmp_path)
    assert len(run.labelled) == len(run.outer[0]) == 6
    inside = {image.numpy().tobytes() for image in run.labelled}
    assert not any(image.numpy().tobytes() in inside for image in run.outer[0])
    assert np.bincount(run.labels.numpy()).tolist() == [2, 2, 2]


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="set it to auto or cpu"):
        pick_device("cuda")


def final(result):
    return torch.cat([value.flatten() for value in result["classifier"].values()])


@pytest.mark.parametrize("arm", ["fixmatch", "learned"])
def test_the_memory_layout_changes_rounding_only(arm, training_set, run_config, tmp_path):
    config = run_config(arm, steps=20)
    plain = Trainer(config).fit(training_set, tmp_path / "plain")
    last = dataclasses.replace(
        config, training=dataclasses.replace(config.training, channels_last=True)
    )
    arranged = Trainer(last).fit(training_set, tmp_path / "last")
    run = Run(last, training_set, tmp_path / "fresh")
    kernels = [p for p in run.classifier.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert not all(p.is_contiguous() for p in kernels)
    torch.testing.assert_close(final(arranged), final(plain), rtol=1e-3, atol=1e-3)


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
    half = Trainer(few).fit(training_set, tmp_path / "half")
    whole = Trainer(run_config("learned", steps=2)).fit(training_set, tmp_path / "whole")
    assert half["metrics"][0]["loss"] == pytest.approx(whole["metrics"][0]["loss"], rel=0.05)
    assert not torch.equal(final(half), final(whole))


@pytest.mark.parametrize("wanted", [True, False])
def test_repeatable_algorithms_are_asked_for_and_given_back(
    wanted, training_set, run_config, tmp_path
):
    asked = torch.are_deterministic_algorithms_enabled
    during = []
    watch = lambda steps: during.append((asked(), torch.backends.cudnn.allow_tf32))  # noqa: E731
    before = torch.backends.cudnn.allow_tf32
    Trainer(run_config(deterministic=wanted)).fit(training_set, tmp_path, watch)
    assert set(during) == {(wanted, False)}
    assert (asked(), torch.backends.cudnn.allow_tf32) == (False, before)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_run_trains_to_the_same_end(training_set, run_config, tmp_path):
    plain = Trainer(run_config(steps=20)).fit(training_set, tmp_path / "plain")
    compiled = Trainer(run_config(steps=20, compile=True)).fit(training_set, tmp_path / "c")
    assert compiled["seconds"] > plain["seconds"]  # the warm-up counts
    torch.testing.assert_close(final(compiled), final(plain), rtol=1e-3, atol=1e-3)
