"""Ranking a folder with a stored run."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from weighmatch import shards, streaming
from weighmatch.data.rank_config import Preparation
from weighmatch.evaluation.ranking import COLUMNS
from weighmatch.semisup import make_schedule
from weighmatch.shards import Scorer, Shards, score_shard
from weighmatch.streaming import rank_folder


@pytest.fixture
def run(training_set, run_config, tmp_path):
    config = run_config(steps=40, schedule="rounds", rounds=2)
    return make_schedule(config).fit(training_set, tmp_path / "run")


@pytest.fixture
def folder(tmp_path):
    """30 images in two folders, and files that are none."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for k in range(30):
        place = root / f"{k % 2}" / f"{k}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(place)
    (root / "notes.txt").write_text("no image")
    (root / "1" / "empty.png").touch()
    (root / ".DS_Store").write_bytes(b"\0")
    return root


def images_of(root, paths):
    return np.stack([np.asarray(Image.open(root / path))[None] for path in paths])


def test_the_ranking_is_what_the_run_says(run, folder, tmp_path):
    assert rank_folder(run, folder, tmp_path / "out", workers=1) == 30
    table = pd.read_csv(tmp_path / "out" / "ranking.csv", keep_default_na=False)
    assert tuple(table.columns) == COLUMNS
    scored = run.score(images_of(folder, table["path"]))
    assert table["score"].to_numpy() == pytest.approx(scored.scores, abs=1e-6)
    assert table["weight"].to_numpy() == pytest.approx(scored.weights, abs=1e-6)
    assert table["confidence"].to_numpy() == pytest.approx(scored.probabilities.max(axis=1))
    assert table["kept"].tolist() == sorted(table["kept"], reverse=True)
    assert (table["kept"] == (table["score"] > run.pool.cut)).all() or run.pool.cut == 0
    for _, part in table.groupby("kept"):
        assert part["score"].is_monotonic_decreasing
    assert ((table["why_low"] == "") == table["kept"]).all()


def test_both_files_of_the_ranking_are_the_same(run, folder, tmp_path):
    rank_folder(run, folder, tmp_path / "out", temperature=1.5, workers=1)
    text = pd.read_csv(
        tmp_path / "out" / "ranking.csv", keep_default_na=False, dtype={"predicted_class": str}
    )
    binary = pd.read_parquet(tmp_path / "out" / "ranking.parquet")
    pd.testing.assert_frame_equal(text, binary, check_dtype=False)
    assert (binary["probability"] < binary["confidence"]).all()


def test_every_bad_file_is_named_once_and_nothing_is_left_behind(run, folder, tmp_path):
    before = sorted(path for path in folder.rglob("*"))
    rank_folder(run, folder, tmp_path / "out", workers=1)
    rejected = pd.read_csv(tmp_path / "out" / "rejected_files.csv")
    assert rejected["path"].tolist() == [".DS_Store", "1/empty.png", "notes.txt"]
    assert rejected["reason"].notna().all()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"ranking.csv", "ranking.parquet", "gallery.html", "rejected_files.csv"}
    assert sorted(path for path in folder.rglob("*")) == before


def test_parts_make_no_difference(run, folder, tmp_path, monkeypatch):
    rank_folder(run, folder, tmp_path / "whole", workers=1)
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 7)
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 4)
    rank_folder(run, folder, tmp_path / "parts", workers=1)
    whole, parts = (pd.read_csv(tmp_path / name / "ranking.csv") for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(whole, parts)
    page = (tmp_path / "parts" / "gallery.html").read_text()
    assert page == (tmp_path / "whole" / "gallery.html").read_text()
    assert page.count("data:image/png;base64,") > 30


class KilledError(Exception):
    pass


def test_a_ranking_that_was_killed_goes_on_at_the_shards_that_are_missing(
    run, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 4)
    rank_folder(run, folder, tmp_path / "whole", workers=1)
    scored = []

    def score(place, number, progress):
        if len(scored) == 5:
            raise KilledError
        scored.append(number)
        return score_shard(place, number, progress)

    monkeypatch.setattr(streaming, "score_shard", score)
    with pytest.raises(KilledError):
        rank_folder(run, folder, tmp_path / "parts.partial", workers=1)
    assert scored == [0, 1, 2, 3, 4]
    # What was damaged since, or written by half, is made again.
    kept = tmp_path / "parts.shards"
    (kept / "part-00000001.parquet").write_bytes(b"damaged")
    (kept / "part-00000003.parquet").unlink()
    with (kept / "manifest.jsonl").open("a") as file:
        file.write('{"number": 7, "fi')
    scored[:] = []
    monkeypatch.setattr(
        streaming, "score_shard", lambda *call: scored.append(call[1]) or score_shard(*call)
    )
    rank_folder(run, folder, tmp_path / "parts.partial", workers=1)
    assert scored == [1, 3, 5, 6, 7]
    for name in ("ranking.csv", "ranking.parquet", "rejected_files.csv", "gallery.html"):
        again, whole = (tmp_path / place / name for place in ("parts.partial", "whole"))
        assert again.read_bytes() == whole.read_bytes()
    assert not kept.exists()


def test_shards_of_other_files_or_of_another_run_are_not_kept(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 4)
    place = tmp_path / "work"

    def missing(preparation):
        found = Shards(place, run, folder, preparation)
        for number in found.missing():
            yield number
            found.add(score_shard(place, number, lambda files: None))

    assert list(missing(Preparation())) == list(range(8))
    assert list(missing(Preparation())) == []
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "0" / "0.png")
    assert list(missing(Preparation())) == [0]
    assert list(missing(Preparation("pad"))) == list(range(8))


def test_images_are_prepared_as_in_training(run, tmp_path):
    root = tmp_path / "wide"
    root.mkdir()
    Image.fromarray(np.full((4, 8), 200, np.uint8)).save(root / "wide.png")
    found = {}
    for fit in ("crop", "pad"):
        rank_folder(run, root, tmp_path / fit, Preparation(fit, "black"), workers=1)
        found[fit] = pd.read_csv(tmp_path / fit / "ranking.csv")["confidence"][0]
    assert found["crop"] != found["pad"]


def test_a_folder_without_an_image_is_one_sentence(run, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"no file in .*none can be used as an image"):
        rank_folder(run, tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        rank_folder(run, tmp_path / "nowhere", tmp_path / "out")


MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np
from weighmatch.semisup import TrainedRun
from weighmatch import shards, streaming
from weighmatch.data.containers import Member
count = int(sys.argv[2])
shards.walk_members = lambda root: (
    Member(f"folder/of/images/{k:08d}.png", "", 0, 0, 1, 1) for k in range(count)
)
shards.decode_members = lambda root, members, shape, *rest: (
    np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8) for k in range(len(members))
)
streaming._page = lambda *rest: ""
run = TrainedRun.load(sys.argv[1])
assert streaming.rank_folder(run, "", Path(sys.argv[3]), workers=1) == count
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_many_files_need_no_more_memory_than_some(run, tmp_path):
    run.save(tmp_path / "run.pt")
    peaks = []
    for count in (20_000, 400_000):
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "run.pt"), str(count)]
        done = subprocess.run(
            [*command, str(tmp_path / str(count))],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 100  # MiB


def test_a_scorer_says_of_parts_what_it_says_of_all(run):
    images = np.random.default_rng(2).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    scorer = Scorer(run)
    whole, half = scorer(images), scorer(images[:10])
    for all_of_them, some in zip(whole, half, strict=True):
        assert some == pytest.approx(all_of_them[:10], abs=1e-6)
