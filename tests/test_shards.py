"""Shards of a pile: which are scored again, and on which machines and devices they can be."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.ranked import draw_folder, manifest_in, same_ranking, score_all, train_run
from weighmatch import shards, streaming
from weighmatch.data import containers, files
from weighmatch.data.containers import UnseenError
from weighmatch.data.files import RejectedFileError
from weighmatch.data.rank_config import Preparation, RankConfig
from weighmatch.engine_config import EngineConfig
from weighmatch.shards import Scorer, Shards, score_shard
from weighmatch.streaming import rank_folder

run = pytest.fixture(train_run)
folder = pytest.fixture(draw_folder)


def test_a_line_that_was_torn_spoils_no_other_one(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 4)
    place = tmp_path / "work"
    assert score_all(place, run, folder, limit=1) == [0]
    with manifest_in(place).open("a") as file:
        file.write('{"number": 7, "fi')
    assert score_all(place, run, folder, limit=1) == [1]
    assert score_all(place, run, folder, limit=1) == [2]


def test_shards_of_other_files_or_of_another_run_are_not_kept(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 4)
    place = tmp_path / "work"
    every = score_all(place, run, folder)
    assert len(every) >= 8
    assert score_all(place, run, folder) == []
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "0" / "0.png")
    assert score_all(place, run, folder) == [0]
    assert score_all(place, run, folder, Preparation("pad")) == every


def test_a_new_file_leaves_the_other_shards_as_they_are(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 4)
    place = tmp_path / "work"
    every = score_all(place, run, folder)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "!new.png")
    found = Shards(place, run, folder, Preparation())
    assert 1 <= len(found.missing()) <= 3 < len(every)
    # The numbers of those that are kept have changed.
    parts = [found.listed.part(number) for number in range(len(found))]
    assert all(parts[number].listed == shard.listed for number, shard in found.kept.items())
    rank_folder(run, folder, tmp_path / "again", workers=1, work=place)
    rank_folder(run, folder, tmp_path / "anew", workers=1)
    assert same_ranking(tmp_path / "again", tmp_path / "anew")
    assert place.exists()


def test_a_shard_of_an_earlier_list_is_not_taken(run, folder, tmp_path):
    """A machine may see the working folder as it was a moment ago."""
    place = tmp_path / "work"
    Shards(place, run, folder, Preparation())
    shard = score_shard(place, 0, lambda files: None)
    (folder / "0" / "0.png").unlink()
    found = Shards(place, run, folder, Preparation())
    with pytest.raises(UnseenError, match=r"sees an earlier state of .*/work; start"):
        found.add(shard)


def test_a_file_that_was_removed_is_rejected(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MOMENT", 0)
    place = tmp_path / "work"
    found = Shards(place, run, folder, Preparation())
    (folder / "0" / "0.png").unlink()
    tables = []
    for number in found.missing():
        found.add(score_shard(place, number, lambda files: None))
        tables.append(found.read(number).to_pandas())
    reasons = pd.concat(tables).set_index("path")["reason"]
    assert reasons["0/0.png"] == containers.REMOVED
    assert reasons.notna().sum() == 3  # notes.txt and empty.png


def test_a_machine_that_does_not_see_the_images_is_told(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MOMENT", 0)
    place = tmp_path / "work"
    found = Shards(place, run, folder, Preparation())
    away = folder.rename(tmp_path / "away")
    for mounted in (False, True):
        if mounted:
            (folder / "0").mkdir(parents=True)
        with pytest.raises(UnseenError, match=rf"cannot read {folder}/0/0.png \(No such file"):
            score_shard(place, 0, lambda files: None)
    shutil.rmtree(folder)
    away.rename(folder)
    assert 0 in Shards(place, run, folder, Preparation()).missing()
    assert found.add(score_shard(place, 0, lambda files: None)) is None


def test_a_file_that_cannot_be_read_for_a_moment_is_read_again(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MOMENT", 0)
    place = tmp_path / "work"
    Shards(place, run, folder, Preparation())
    read, failures = Path.read_bytes, [errno.ESTALE]

    def stumble(path):
        if path.name == "10.png" and failures:
            failure = OSError(failures.pop(), "Stale file handle")
            raise RejectedFileError(files.cannot_be_read(failure))
        return read(path)

    monkeypatch.setattr(files, "_read_bytes", stumble)
    assert score_shard(place, 0, lambda files: None).rejected == 2
    assert not failures
    failures[:] = [errno.EIO] * 2
    with pytest.raises(UnseenError, match=r"10.png \(Stale file handle\); give all machines"):
        score_shard(place, 0, lambda files: None)


def test_a_scorer_says_of_parts_what_it_says_of_all(run):
    images = np.random.default_rng(2).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    scorer = Scorer(run)
    whole, half = scorer(images), scorer(images[:10])
    for all_of_them, some in zip(whole, half, strict=True):
        assert some == pytest.approx(all_of_them[:10], abs=1e-6)


def test_all_of_a_scorer_is_on_its_device(run):
    """The device meta computes nothing, and refuses to be mixed with another one."""
    images = np.zeros((2, 1, 8, 8), np.uint8)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        Scorer(run, torch.device("meta"))(images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_scores_as_the_cpu_does(run):
    images = np.random.default_rng(2).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    there, here = Scorer(run, torch.device("cuda"))(images), Scorer(run)(images)
    for first, second in zip(there, here, strict=True):
        assert first == pytest.approx(second, abs=1e-3)


def test_a_worker_scores_on_the_gpu_that_it_was_given(run, folder, tmp_path, monkeypatch):
    class Pool:
        def run_in_pool(self, function, jobs, *_, **__):
            for place, job in enumerate(jobs):
                yield place, function(*job, lambda images: None)

    monkeypatch.setattr(streaming, "make_engine", lambda config: Pool())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpus = EngineConfig(engine="ray", num_gpus=0.5)
    with pytest.raises(UnseenError, match=r"^rank.num_gpus asks for a GPU, and torch sees none"):
        rank_folder(run, folder, tmp_path / "out", engine=gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    devices = []

    def make(run, device):
        devices.append(device.type)
        return Scorer(run)

    monkeypatch.setattr(shards, "Scorer", make)
    assert rank_folder(run, folder, tmp_path / "out", engine=gpus) == 30
    assert rank_folder(run, folder, tmp_path / "out", engine=EngineConfig()) == 30
    assert devices == ["cuda", "cpu"]
    with pytest.raises(ValueError, match=r"rank.num_gpus has no effect with rank.engine local"):
        RankConfig(num_gpus=1)
