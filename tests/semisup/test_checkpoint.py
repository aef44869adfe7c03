"""Trained runs: what they say of images, and what survives being written to a file."""

import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.semisup.helpers import same
from weighmatch.arms import SCHEDULES, all_arms
from weighmatch.semisup import TrainedRun, make_schedule
from weighmatch.semisup.parts.state_file import DamagedFileError, write_state
from weighmatch.semisup.training.online import train_online

# Their scores are those of FixMatch.
UNSCORED = ("supervised", "oracle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images.astype(np.float32) / 255, "images must be uint8"),
        (lambda images: images[0], "images must be uint8"),
        (lambda images: images[:0], "images must have at least one image"),
        (lambda images: images.repeat(2, axis=3), "8 by 8, these are of 1, 8 by 16; convert or"),
        (lambda images: images.repeat(3, axis=1), "trained on images of 1 channel"),
    ],
)
def test_images_of_another_kind_are_not_scored(change, message, training_set, run_config, tmp_path):
    found = train_online(run_config("fixmatch", steps=2), training_set, tmp_path)
    with pytest.raises(ValueError, match=message):
        found.score(change(training_set.unlabelled_images))


@pytest.mark.integration
@pytest.mark.parametrize("arm", [arm for arm in all_arms() if arm.name not in UNSCORED])
def test_scoring_is_the_trained_run(arm, training_set, run_config, tmp_path):
    schedule, rounds = ("online", 1) if "online" in arm.schedules else ("rounds", 3)
    config = run_config(arm.name, schedule=schedule, rounds=rounds)
    run = make_schedule(config).fit(training_set, tmp_path)
    images = training_set.unlabelled_images
    scored = run.score(images)
    assert scored.probabilities.shape == (40, 3)
    assert scored.probabilities.sum(axis=1) == pytest.approx(1)
    assert scored.weights.mean() == pytest.approx(1)
    last = run.history.weights[-1]
    if arm.name == "learned":  # φ is on the image alone: the weights as recorded in training
        assert scored.weights == pytest.approx(last.double().numpy(), abs=1e-5)
    confidence = scored.probabilities.max(axis=1)
    ranked = len(set(scored.scores)) > 1
    assert ranked == (arm.weighs and arm.inductive)
    if arm.name in ("max_prob", "softmatch"):
        assert scored.scores == pytest.approx(confidence)
    if arm.name in ("energy", "pu", "inlier", "learned"):  # two sizes, the larger ranked first
        high = scored.weights > 1
        assert len(set(scored.weights)) <= 2
        assert not high.any() or scored.scores[high].min() > scored.scores[~high].max()
    with pytest.raises(ValueError, match="1 channel"):
        run.score(images.repeat(3, 1))


def test_softmatch_weighs_new_images_by_the_gaussian_of_its_run(training_set, run_config, tmp_path):
    run = train_online(run_config("softmatch"), training_set, tmp_path)
    images = training_set.unlabelled_images
    mean, spread = np.median(run.score(images).scores), 0.01
    run.weighting["moments"]["value"] = torch.tensor([mean, spread**2])
    scored = run.score(images)
    below = np.minimum(scored.scores - mean, 0)
    expected = np.exp(-(below**2) / (2 * (spread / 2) ** 2))
    assert len(set(expected)) > 10
    assert scored.weights == pytest.approx(expected / expected.mean(), rel=1e-2, abs=1e-6)


# --- files --------------------------------------------------------------------------------------

ARMS_IN_SCHEDULES = [
    (arm.name, schedule)
    for schedule in SCHEDULES
    for arm in all_arms()
    if schedule in arm.schedules
]


@pytest.mark.integration
@pytest.mark.parametrize(("arm", "schedule"), ARMS_IN_SCHEDULES)
def test_a_run_that_was_saved_is_the_same_to_the_bit(
    arm, schedule, training_set, run_config, tmp_path
):
    data = replace(training_set, class_names=("left", "middle", "right"))
    config = run_config(arm, steps=12, schedule=schedule, rounds=2)
    run = make_schedule(config).fit(data, tmp_path / "folder")
    run.save(tmp_path / "made" / "run.pt")
    loaded = TrainedRun.load(tmp_path / "made" / "run.pt")
    foreign = np.random.default_rng(3).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    for images in (data.unlabelled_images, foreign):
        before, after = run.score(images), loaded.score(images)
        for name in ("probabilities", "scores", "weights"):
            assert np.array_equal(getattr(before, name), getattr(after, name)), name
    assert loaded.class_names == ("left", "middle", "right")
    assert loaded.config == config
    assert loaded.image_shape == run.image_shape == (1, 8, 8)
    assert loaded.pool_fingerprint == data.pool_fingerprint
    assert loaded.mask_rate() == run.mask_rate()
    assert (loaded.seconds, loaded.update_seconds) == (run.seconds, run.update_seconds)
    assert same(loaded, run)
    assert not loaded.classifier.training
    # The same run gives the same file, and so does the folder that it was trained in.
    again = make_schedule(config).fit(data, tmp_path / "folder")
    again.save(tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "made" / "run.pt").read_bytes()


@pytest.fixture
def saved(training_set, run_config, tmp_path):
    """A run and its file."""
    run = train_online(run_config("fixmatch", steps=2), training_set, tmp_path / "folder")
    run.save(tmp_path / "run.pt")
    return run, tmp_path / "run.pt"


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_loading_runs_no_code(saved, tmp_path):
    _, path = saved
    planted, rebuilt = tmp_path / "planted", tmp_path / "rebuilt.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(rebuilt, "w") as new:
        for item in old.infolist():
            inside = item.filename.endswith("/data.pkl")
            new.writestr(item, pickle.dumps(Planted(planted), 2) if inside else old.read(item))
    with pytest.raises(DamagedFileError, match=r"rebuilt\.pt is damaged"):
        TrainedRun.load(rebuilt)
    assert not planted.exists()
    # The trap works where a file is trusted.
    torch.load(rebuilt, weights_only=False).close()
    assert planted.exists()


def test_a_damaged_or_missing_file_is_named(saved, tmp_path):
    run, path = saved
    whole = path.read_bytes()
    place = whole.index(run.classifier.head.weight.detach().numpy().tobytes())
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for damaged in (whole[: len(whole) // 2], b"", flipped):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"run\.pt is damaged or was not written by"):
            TrainedRun.load(path)
    with pytest.raises(FileNotFoundError, match=r"there is no trained run at .*none\.pt"):
        TrainedRun.load(tmp_path / "none.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("history"),
        lambda state: state.update(another=1),
        lambda state: state["config"].update(stages=2),
        lambda state: state["classifier"].pop("head.bias"),
        lambda state: state["config"]["training"].update(weighing={}),
        lambda state: state["config"].update(arm="an arm of another version"),
    ],
)
def test_a_file_of_another_version_is_named(change, saved, tmp_path):
    run, _ = saved
    state = run.to_state()
    state["classifier"] = dict(state["classifier"])
    change(state)
    write_state(tmp_path / "other.pt", state)
    with pytest.raises(DamagedFileError, match=r"other\.pt is no trained run of this version"):
        TrainedRun.load(tmp_path / "other.pt")


def test_a_run_without_a_pool_has_no_history(training_set, run_config, tmp_path):
    run = train_online(run_config("supervised", steps=2), training_set, tmp_path)
    assert run.mask_rate() is None
    assert run.history.step == []
    assert run.pool.labels is None
    assert run.update_seconds is None
    assert set(run.score(training_set.unlabelled_images).weights) == {1.0}
