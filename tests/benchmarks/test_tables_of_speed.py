"""The parts of `python -m benchmarks` on tiny settings; what they print are times."""

import dataclasses
import os
import sys

import numpy as np
import pytest
import torch

from benchmarks import __main__ as everything
from benchmarks import augmentation, startup, steps
from benchmarks.timing import by_turns
from weighmatch.data.config import DataConfig

pytestmark = pytest.mark.integration


def test_calls_take_turns_and_the_first_round_is_for_warming_up():
    calls = []
    times = by_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "abababab"
    assert [len(found) for found in times.values()] == [3, 3]


@pytest.mark.parametrize("build", [augmentation.ours, augmentation.pillow])
def test_both_augmentations_give_pairs_of_views(build):
    images = augmentation.images_of(5)
    weak, strong = build()(images)
    for views in (weak, strong):
        assert views.shape == (5, 3, 32, 32)
        assert views.dtype == torch.float32
        assert 0 <= float(views.min()) <= float(views.max()) <= 1
    assert not torch.equal(weak, strong)


def test_a_missing_package_is_left_out_with_a_word(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    table = augmentation.beside_others(count=4, rounds=1)
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| weighmatch", "| Pillow"]
    assert table[-1].startswith("Not installed: torchvision v2, one by one, torchvision v2, kornia")


def test_scaling_has_a_column_a_batch():
    table = augmentation.scaling([2, 4], rounds=1, device="cpu")
    assert len(table) == 3
    assert table[0].count("|") == 4


def test_steps_updates_and_the_bare_loop_are_timed(run_config, training_set, tmp_path):
    training = run_config(weighting={"interval": 4}).training
    setting = steps.Setting("tiny CNN", training_set, training, 4, 4, run_steps=40)
    times = steps.time_steps(setting, rounds=2, folder=tmp_path)
    assert all(len(column) == 2 for column in dataclasses.astuple(times))
    assert min(times.bare + times.fixmatch + times.learned) > 0
    table = steps.step_table([setting], rounds=1, folder=tmp_path / "table")
    assert len(table) == 3
    ranked = steps.ranking_table([setting], stages=3, rounds=1, folder=tmp_path / "ranking")
    assert ranked[0].endswith("| learned arm in 3 rounds / FixMatch |")
    share, whole = (float(ranked[2].split(" | ")[k].split()[0]) for k in (2, 4))
    assert whole == pytest.approx(1 + 3 * share / 40, abs=0.01)
    assert len(steps.throughput_table([setting], rounds=1, folder=tmp_path / "rate")) == 4


def test_whole_runs_are_timed_beside_fixmatch(run_config, training_set, tmp_path):
    training = run_config(steps=12, weighting={"interval": 4}).training
    table = steps.whole_run_table(training_set, training, stages=3, rounds=2, folder=tmp_path)
    plain, one_stage, in_rounds = (line.strip("| ").split(" | ") for line in table[2:])
    assert plain[2].startswith("1.00 (1.00")
    assert one_stage[0] == "learned weights, online"
    assert in_rounds[0] == "learned weights, 3 rounds"
    assert not list(tmp_path.iterdir())  # every run starts anew


def test_memory_profile_and_runs_at_once_are_measured(run_config, training_set, tmp_path):
    training = run_config(weighting={"interval": 4}).training
    setting = steps.Setting("tiny CNN", training_set, training, 4, 4, run_steps=40)
    memory = steps.memory_table([setting], folder=tmp_path)
    assert all(float(cell.strip(" |").replace(",", "")) > 0 for cell in memory[2].split(" | ")[2:])
    profile = steps.profile_table(setting, folder=tmp_path, longest=3)
    shares = [float(line.split(" | ")[1].rstrip("%")) for line in profile[2:]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) < 100
    runs = steps.many_runs_table(setting, 4, [1, 2], rounds=1, folder=tmp_path)
    assert [line.split(" | ")[0] for line in runs[2:]] == ["| 1", "| 2"]
    assert runs[2].split(" | ")[2].startswith("1.00 (1.00")


def test_settings_have_the_images_that_were_asked_for(run_config):
    training = run_config().training
    digits = steps.digits_cnn(training, pool=2000).data.unlabelled_images
    assert digits.shape == (2000, 1, 8, 8)
    wide = steps.wide_resnet(training, pool=12, labelled=20).data
    assert wide.unlabelled_images.shape == (12, 3, 32, 32)
    assert np.bincount(wide.labels).tolist() == [2] * 10


def test_options_are_timed_beside_the_step_as_it_is(
    run_config, training_set, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "compile", lambda module: module)
    setting = steps.Setting("tiny CNN", training_set, run_config().training, 2, 2, run_steps=40)
    table = steps.option_table(setting, rounds=1, folder=tmp_path)
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| as it is",
        "| channels_last",
        "| bfloat16",
        "| channels_last and bfloat16",
        "| compile",
    ]
    assert table[2].split(" | ")[1].startswith("1.00 (1.00")


def test_the_share_of_an_update_counts_probes_once_in_ten():
    times = steps.StepTimes([1.0], [2.0], [2.0], [10.0], [30.0])
    config = dataclasses.replace(steps.WeightingConfig(), interval=20)
    assert times.overheads(config) == [pytest.approx((2 + 12 / 20) / 2)]
    assert times.updates_in_steps() == [5.0]
    config = dataclasses.replace(config, warmup=0.5)
    assert times.run_overheads(config) == [pytest.approx(1 + 0.5 * (1.3 - 1))]


def test_cpu_time_of_a_command_is_told_and_a_failing_one_named():
    assert startup._spent(os.getpid()) > 0
    with pytest.raises(RuntimeError, match="no_such_pipeline"):
        startup._cpu_seconds(startup._run_of(["--pipelines", "no_such_pipeline"]), None)


def test_unknown_sections_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "steps,magic"])
    with pytest.raises(SystemExit):
        everything.main()
    assert "magic is unknown; choose from augmentation" in capsys.readouterr().err


def test_the_configuration_is_that_of_the_main_job():
    data = steps.training_set(DataConfig(seeds=(10,)))
    assert data.labelled_images.shape == (24, 1, 8, 8)
    assert data.unlabelled_images.shape == (600, 1, 8, 8)
