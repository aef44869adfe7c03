"""Ranking a folder with a stored run."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kedro.io import DatasetError
from PIL import Image

from tests.containers import picture, write_tar
from tests.ranked import FILES, draw_folder, manifest_in, same_ranking, score_all, train_run
from weighmatch import shards, streaming
from weighmatch.checks import ToldError
from weighmatch.cli import _sentence_of
from weighmatch.data.listing import NoImageError
from weighmatch.data.rank_config import Preparation, RankConfig
from weighmatch.evaluation.ranking import COLUMNS
from weighmatch.io import FolderDataset
from weighmatch.pipelines.rank.nodes import rank_images
from weighmatch.shards import Shards, score_shard
from weighmatch.streaming import rank_folder

run = pytest.fixture(train_run)
folder = pytest.fixture(draw_folder)


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
    assert names == {*FILES, "shards"}
    assert not (tmp_path / "out.shards").exists()
    assert sorted(path for path in folder.rglob("*")) == before


def test_a_ranking_tells_what_it_ranked_and_what_not(run, folder, tmp_path, caplog):
    caplog.set_level("INFO", "weighmatch.streaming")
    rank_folder(run, folder, tmp_path / "out", workers=1)
    assert f"{folder}: 30 images are ranked" in caplog.text
    assert "3 files or members of archives are not used, or not as a whole" in caplog.text
    assert "rejected_files.csv says why" in caplog.text
    pile = tmp_path / "pile"
    pile.mkdir()
    (folder / "0" / "0.png").rename(pile / "0.png")
    caplog.clear()
    rank_folder(run, pile, tmp_path / "out", workers=1)
    assert f"{pile}: 1 image is ranked" in caplog.text
    assert "not used" not in caplog.text
    write_tar(pile / "cut.tar", [(f"{k}.png", picture(k)[1]) for k in range(12)])
    os.truncate(pile / "cut.tar", 5_000)
    caplog.clear()
    rank_folder(run, pile, tmp_path / "out", workers=1)
    assert "1 file or member of an archive is not used, or not as a whole" in caplog.text
    page = (tmp_path / "out" / "gallery.html").read_text()
    assert f"The images lie in {pile}." in page


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


def test_the_page_has_lists_of_the_classes_with_most_images(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_CLASSES", 1)
    monkeypatch.setattr(streaming, "OVERALL", 4)
    rank_folder(run, folder, tmp_path / "out", workers=1)
    table = pd.read_csv(tmp_path / "out" / "ranking.csv", dtype={"predicted_class": str})
    counts = table["predicted_class"].value_counts()
    assert len(counts) > 1
    page = (tmp_path / "out" / "gallery.html").read_text()
    assert re.findall(r"(\w+): trusted most", page) == [counts.index[0]]
    # The lists of a class are those of the whole ranking.
    of_it = table[table["predicted_class"] == counts.index[0]]["path"]
    for path in [*of_it.head(12), *of_it.iloc[12:].tail(12)]:
        assert path in page


class KilledError(BaseException):
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
        rank_folder(run, folder, tmp_path / "parts", workers=1)
    assert scored == [0, 1, 2, 3, 4]
    # What was damaged since, or written by half, is made again.
    kept = tmp_path / "parts.shards"
    lines = [json.loads(line) for line in manifest_in(kept).read_text().splitlines()]
    (kept / lines[1]["file"]).write_bytes(b"damaged")
    (kept / lines[3]["file"]).unlink()
    with manifest_in(kept).open("a") as file:
        file.write('{"number": 7, "fi')
    scored[:] = []
    monkeypatch.setattr(
        streaming, "score_shard", lambda *call: scored.append(call[1]) or score_shard(*call)
    )
    rank_folder(run, folder, tmp_path / "parts", workers=1)
    assert scored[:3] == [1, 3, 5]
    assert len(scored) == len(list((tmp_path / "whole" / "shards").glob("*.parquet"))) - 3
    assert same_ranking(tmp_path / "parts", tmp_path / "whole")
    assert not kept.exists()


def test_the_ranking_holds_its_shards(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 4)
    rank_folder(run, folder, tmp_path / "out", workers=1)
    place = tmp_path / "out" / "shards"
    lines = [json.loads(line) for line in (place / "manifest.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(len(lines)))
    for line in lines:
        content = (place / line["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == line["sha256"]
    assert {line["file"] for line in lines} == {path.name for path in place.glob("*.parquet")}
    table = pd.concat(pd.read_parquet(place / line["file"]) for line in lines)
    assert sum(line["images"] for line in lines) == table["score"].notna().sum() == 30
    ranking = pd.read_csv(tmp_path / "out" / "ranking.csv")
    assert sorted(table["path"][table["reason"].isna()]) == sorted(ranking["path"])


def test_another_folder_in_between_removes_nothing_that_is_done(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 4)
    place = tmp_path / "out.shards"
    done = score_all(place, run, folder, limit=3)
    # The same names, sizes and times, as in piles of one origin; the images are others.
    other = shutil.copytree(folder, tmp_path / "other")
    for path in folder.rglob("*.png"):
        content = path.read_bytes()
        (other / path.relative_to(folder)).write_bytes(content[::-1])
        shutil.copystat(path, other / path.relative_to(folder))
    assert 0 in Shards(place, run, other, Preparation()).missing()
    shutil.copytree(folder, other, dirs_exist_ok=True)
    rank_folder(run, other, tmp_path / "out", workers=1)
    assert list(Shards(place, run, folder, Preparation()).kept) == done
    rank_folder(run, folder, tmp_path / "out", workers=1)
    assert not place.exists()


def test_an_error_or_a_wrong_folder_removes_nothing_that_is_done(
    run, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 4)
    out, place = tmp_path / "out", tmp_path / "out.shards"
    every = score_all(place, run, folder, limit=3)
    (tmp_path / "empty").mkdir()
    away = folder.rename(tmp_path / "away")
    for root in (folder, f"{folder}x", tmp_path / "empty"):
        with pytest.raises(ToldError):
            rank_folder(run, root, out, workers=1)
    folder.mkdir()  # a share that is not mounted
    with pytest.raises(NoImageError):
        rank_folder(run, folder, out, workers=1)
    folder.rmdir()
    away.rename(folder)
    assert list(Shards(place, run, folder, Preparation()).kept) == every

    def fail(*_):
        raise ValueError("something else")

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_write_tables", fail)
        with pytest.raises(ValueError, match="something else"):
            rank_folder(run, folder, out, workers=1)
    assert score_all(place, run, folder) == []


def test_a_ranking_is_lost_neither_before_nor_after_it_takes_its_place(
    run, folder, tmp_path, monkeypatch
):
    """The data set renames the folder; a job may be killed right before and right after that."""
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 4)
    run.save(tmp_path / "model" / "run.pt")
    (tmp_path / "model" / "classes.json").write_text('{"preparation": {}}')
    config = RankConfig(images=str(folder), workers=1)
    write = rank_images(tmp_path / "model", {"temperature": None}, config)
    dataset = FolderDataset(str(tmp_path / "rank"))
    place = tmp_path / "rank.shards"
    scored = []
    monkeypatch.setattr(
        streaming, "score_shard", lambda *call: scored.append(call[1]) or score_shard(*call)
    )
    remove = partial(shutil.rmtree, ignore_errors=True)

    def die(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KilledError):
            dataset.save(write)
    assert scored
    scored.clear()
    (tmp_path / "rank.partial").rename(tmp_path / "first")
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "rmtree", lambda path, *rest, **_: (die if path == place else remove)(path)
        )
        with pytest.raises(KilledError):
            dataset.save(write)
    assert same_ranking(tmp_path / "rank", tmp_path / "first")
    dataset.save(write)
    assert not scored
    assert not place.exists()
    assert (tmp_path / "rank" / "shards" / "manifest.jsonl").exists()


def test_no_folder_is_replaced_that_no_ranking_wrote(run, folder, tmp_path):
    out = tmp_path / "out"
    for own in (out / "shards", tmp_path / "out.shards"):
        own.mkdir(parents=True)
        (own / "part-00000000.parquet").touch()
        with pytest.raises(ToldError, match=rf"{own} holds files that no ranking wrote"):
            rank_folder(run, folder, out, workers=1)
        (own / "part-00000000.parquet").unlink()
    for _ in range(2):
        assert rank_folder(run, folder, out, workers=1) == 30


def test_the_gallery_does_without_a_picture_that_is_gone(
    run, folder, tmp_path, monkeypatch, caplog
):
    written = streaming._write_tables

    def remove_one(*given):
        written(*given)
        (folder / "0" / "0.png").unlink()

    monkeypatch.setattr(streaming, "_write_tables", remove_one)
    assert rank_folder(run, folder, tmp_path / "out", workers=1) == 30
    assert "the gallery shows no picture of 0/0.png: it cannot be read" in caplog.text


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
    with pytest.raises(ToldError, match=r"none can be used as an image; give another folder$"):
        rank_folder(run, tmp_path / "none", tmp_path / "out")
    with pytest.raises(ToldError, match=r"nowhere does not exist; give the folder that holds"):
        rank_folder(run, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "none" / ".DS_Store").touch()
    with pytest.raises(
        ToldError, match=r"an image; this is said of .DS_Store: a file of the operating "
    ):
        rank_folder(run, tmp_path / "none", tmp_path / "out")
    for name in "ab":
        (tmp_path / "none" / f"{name}.png").write_text("no image")
    why = r"said of a.png and of 1 more: it is a text file, not an image; give another folder$"
    dataset = FolderDataset(str(tmp_path / "out"))
    with pytest.raises(DatasetError) as caught:
        dataset.save(lambda place: rank_folder(run, tmp_path / "none", place, workers=1))
    assert re.search(why, _sentence_of(caught.value))


MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np
from weighmatch.semisup import TrainedRun
from weighmatch import streaming
from weighmatch.data import containers, listing
from weighmatch.data.members import Member
count = int(sys.argv[2])
listing.walk_members = lambda root: (
    Member(f"folder/of/images/{k:08d}.png", "", 0, 0, 1, 1) for k in range(count)
)
containers.decode_members = lambda root, members, shape, *rest: (
    np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8) for k in range(len(members))
)
streaming._page = lambda *rest: ""
run = TrainedRun.load(sys.argv[1])
assert streaming.rank_folder(run, "src", Path(sys.argv[3]), workers=1) == count
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
