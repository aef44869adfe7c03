"""The exported model: two formats, one file of classes, and no need for weighmatch."""

import json
import subprocess
import sys

import numpy as np
import pytest

from weighmatch import export
from weighmatch.arms import SCHEDULES, all_arms
from weighmatch.export import export_run, has_onnx, model_card
from weighmatch.semisup import TrainedRun, make_schedule
from weighmatch.semisup.checkpoint import Ranker
from weighmatch.semisup.training.online import train_online

# Loads both files where weighmatch cannot be imported, and writes what they say.
ELSEWHERE = """
import sys
import numpy as np
sys.modules["weighmatch"] = None
images = np.load("images.npy")
import torch
module = torch.export.load("model.pt2").module()
with torch.no_grad():
    probabilities, scores = module(torch.from_numpy(images))
found = {"pt2_probabilities": probabilities.numpy(), "pt2_scores": scores.numpy()}
if "onnx" in sys.argv:
    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx")
    names = [output.name for output in session.get_outputs()]
    assert names == ["probabilities", "scores"], names
    for name, value in zip(names, session.run(None, {"images": images})):
        found[f"onnx_{name}"] = value
assert not [name for name in sys.modules if name.startswith("weighmatch.")]
np.savez("found.npz", **found)
"""


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (13, 1, 8, 8), dtype=np.uint8)


def compare_elsewhere(run, folder, images):
    """How far the files, read in another process, are from the run."""
    np.save(folder / "images.npy", images)
    formats = ["pt2", *(["onnx"] if has_onnx() else [])]
    command = [sys.executable, "-c", ELSEWHERE, *formats]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scored = run.score(images)
    with np.load(folder / "found.npz") as found:
        return max(
            np.abs(found[f"{kind}_{name}"] - getattr(scored, name)).max()
            for kind in formats
            for name in ("probabilities", "scores")
        )


ARMS_IN_SCHEDULES = [
    (arm.name, schedule)
    for schedule in SCHEDULES
    for arm in all_arms()
    if schedule in arm.schedules and (arm.weighs or schedule == "online")
]


@pytest.mark.integration
@pytest.mark.parametrize(("arm", "schedule"), ARMS_IN_SCHEDULES)
def test_every_arm_can_be_exported(arm, schedule, training_set, run_config, tmp_path, images):
    import torch

    config = run_config(arm, steps=24, schedule=schedule, rounds=2)
    run = make_schedule(config).fit(training_set, tmp_path / "run")
    export_run(run, tmp_path / "export")
    module = torch.export.load(tmp_path / "export" / "model.pt2").module()
    for part in (images, images[:1]):
        probabilities, scores = module(torch.from_numpy(part))
        scored = run.score(part)
        assert probabilities.detach().numpy() == pytest.approx(scored.probabilities, abs=1e-5)
        assert scores.detach().numpy() == pytest.approx(scored.scores, abs=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 11, 9)])
def test_both_files_say_the_same_without_weighmatch(shape, run_config, tmp_path):
    from weighmatch.semisup import TrainingSet

    rng = np.random.default_rng(0)

    def draw(count):
        return rng.integers(0, 256, (count, *shape), dtype=np.uint8)

    data = TrainingSet(draw(9), np.arange(9) % 3, draw(40), ("left", "middle", "right"))
    run = make_schedule(run_config(steps=24, schedule="rounds", rounds=2)).fit(data, tmp_path / "r")
    assert isinstance(run.ranker, Ranker)
    export_run(run, tmp_path / "export", {"images": "9 and 40"}, {"fit": "pad"})
    assert compare_elsewhere(run, tmp_path / "export", draw(13)) < 1e-5
    described = json.loads((tmp_path / "export" / "classes.json").read_text())
    assert described["classes"] == ["left", "middle", "right"]
    assert [described[name] for name in ("channels", "height", "width")] == list(shape)
    assert described["preparation"] == {"fit": "pad"}
    card = (tmp_path / "export" / "model_card.md").read_text()
    assert "| classes | left, middle, right |" in card
    assert "| images | 9 and 40 |" in card
    loaded = TrainedRun.load(tmp_path / "export" / "run.pt")
    assert loaded.score(draw(2)).scores.shape == (2,)


@pytest.fixture
def run(training_set, run_config, tmp_path):
    return train_online(run_config(steps=5), training_set, tmp_path / "run")


def test_onnx_is_left_out_with_a_sentence_where_it_is_not_installed(
    run, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(export, "has_onnx", lambda: False)
    export_run(run, tmp_path / "export")
    assert "uv sync --extra export installs them" in caplog.text
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names == {"model.pt2", "run.pt", "classes.json", "model_card.md"}


def test_classes_without_names_are_numbered(run, tmp_path):
    export_run(run, tmp_path / "export")
    described = json.loads((tmp_path / "export" / "classes.json").read_text())
    assert described["classes"] == ["0", "1", "2"]
    assert export.read_preparation(tmp_path / "export") == {}


@pytest.mark.parametrize(
    ("fit", "how"), [("crop", "cut at its centre"), ("pad", "padded with red")]
)
def test_the_card_tells_how_a_file_becomes_an_image(fit, how, run, tmp_path):
    export_run(run, tmp_path, preparation={"fit": fit, "background": "red"})
    (row,) = [line for line in (tmp_path / "model_card.md").read_text().splitlines() if how in line]
    assert row.startswith("| preparation | an image stands upright, on red where it is transparent")


def test_exporting_leaves_the_run_as_it_was(run, tmp_path, images):
    before = run.score(images)
    export_run(run, tmp_path / "export")
    assert np.array_equal(before.scores, run.score(images).scores)
    assert "| network | small_cnn" in model_card(run, ["a", "b", "c"], {})
