"""The folders that `benchmarks.own_images` makes, and how it judges a job."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks import own_images
from weighmatch.data.config import DataConfig
from weighmatch.data.source import get_source

BAD = {"truncated.jpg", "empty.jpg", "text.jpg", "rubbish.png", "notes.txt", ".DS_Store"}


def make(root, files=30, **options):
    own_images.main(
        ["generated", str(root), "--files", str(files), "--labels", "10", *options.get("more", ())]
    )
    return pd.read_csv(own_images.truth_of(root), dtype=str).set_index("path")["kind"]


def test_drawn_images_are_of_the_sizes_and_kinds_that_are_said(tmp_path):
    truth = make(tmp_path / "own", more=["--test", "5"])
    counts = Counter(truth)
    assert counts["useful"] + counts["foreign"] == 30
    assert min(counts["useful"], counts["foreign"]) >= 8
    assert {path.rpartition("/")[2] for path in truth.index[truth == "bad"]} == BAD
    files = {str(p.relative_to(tmp_path / "own")) for p in (tmp_path / "own").rglob("*.*")}
    assert {path for path in files if path.startswith("unlabelled/")} == set(truth.index)
    for place, count in (("labelled", 2), ("test", 1)):
        for name in own_images.SEEN:
            assert len(list((tmp_path / "own" / place / name).iterdir())) == count
    for path in truth.index[truth.isin(["useful", "foreign"])]:
        with Image.open(tmp_path / "own" / path) as image:
            assert image.format == "JPEG"
            assert min(image.size) >= 200
            assert max(image.size) <= 500
    config = DataConfig(seeds=[0], source="folder", root=str(tmp_path / "own"))
    raw = get_source("folder").load(config)
    assert {
        one.path.rpartition("/")[2] for one in get_source("folder").rejected(raw, config)
    } == BAD


def test_the_same_seed_gives_the_same_folder_and_another_one_another(tmp_path):
    first, again = make(tmp_path / "a"), make(tmp_path / "b")
    assert first.equals(again)
    for path in first.index:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    other = make(tmp_path / "c", more=["--seed", "1"])
    assert not first.equals(other)
    with pytest.raises(SystemExit):
        make(tmp_path / "a")


def test_mixed_files_have_many_forms_and_their_copies_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(own_images, "MIXED_SIDES", (120, 480))
    rows = own_images.generate(tmp_path / "own", files=120, labels=10, test=0, mixed=True)
    truth = pd.Series(dict(rows))
    counts = Counter(truth)
    assert counts["useful"] + counts["foreign"] == 120
    copies = truth.index[truth.isin(own_images.AGAIN)]
    assert 4 <= len(copies) <= 24
    forms, sizes = Counter(), []
    for path in truth.index[truth.isin(["useful", "foreign"])]:
        with Image.open(tmp_path / "own" / path) as image:
            forms.update([image.format, image.mode, f"EXIF {image.getexif().get(0x0112)}"])
            sizes.append(image.size)
    assert {"JPEG", "PNG", "WEBP", "RGB", "L", "RGBA"} <= forms.keys()
    assert {f"EXIF {k}" for k in (None, *own_images.ORIENTATIONS)} <= forms.keys()
    assert min(map(max, sizes)) < 160
    assert max(map(max, sizes)) > 360
    assert {width > height for width, height in sizes} == {True, False}
    # Near copies are upright without EXIF, so that they are copies only of what is turned back.
    config = DataConfig(seeds=[0], source="folder", root=str(tmp_path / "own"))
    source = get_source("folder")
    files = source.draw_all(source.load(config), config).files
    near = dict(zip(files.path, files.near_duplicate_of, strict=True))
    found = [path for path in copies if truth[path] == "compressed anew"]
    assert found
    assert all(Path(near[path]).stem == Path(path).stem for path in found)


def test_every_kind_can_be_told_from_the_others_by_eye():
    """Two images of a kind differ, and none of them is its background alone."""
    for kind in (*own_images.SEEN, *own_images.FOREIGN):
        first, second = (
            np.asarray(own_images.picture(kind, np.random.default_rng(seed)).resize((64, 64)))
            for seed in (0, 1)
        )
        assert not np.array_equal(first, second)
        drawn = (first.astype(int).min(axis=2) > 140).mean()
        assert drawn > 0.02 if kind != "nothing" else drawn < 0.2, kind


@pytest.fixture
def cifar(tmp_path):
    """A folder of made-up files as CIFAR-10 lies on the disk; the level tells the class."""
    root = tmp_path / "cifar10"
    for part, count in (("train", 20), ("test", 4)):
        for level, name in enumerate((*own_images.ANIMALS, *own_images.VEHICLES)):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = np.full((32, 32, 3), 20 * level, np.uint8)
                pixels[0, k] = 255
                Image.fromarray(pixels).save(root / part / name / f"{k:04d}.png")
    return root


def test_animals_are_labelled_and_vehicles_lie_in_the_pile(tmp_path, cifar):
    root = tmp_path / "own"
    asked = ["--source", str(cifar), "--labels", "13", "--pool", "40", "--test", "6"]
    own_images.main(["cifar10", str(root), *asked])
    truth = pd.read_csv(own_images.truth_of(root), dtype=str).set_index("path")["kind"]
    assert Counter(truth) == {"useful": 20, "foreign": 20, "bad": len(BAD), "copy": 1}
    labelled = {path.name: len(list(path.iterdir())) for path in (root / "labelled").iterdir()}
    assert set(labelled) == set(own_images.ANIMALS)
    assert sorted(labelled.values()) == [2, 2, 2, 2, 2, 3]
    assert len(list((root / "test").rglob("*-*"))) == 6
    seen = {path.read_bytes() for path in (root / "labelled").rglob("*-*")}
    for path, kind in truth[truth.isin(["useful", "foreign"])].items():
        level = np.median(np.asarray(Image.open(root / path)))
        assert (level < 20 * len(own_images.ANIMALS)) == (kind == "useful")
        assert (root / path).read_bytes() not in seen


def test_a_job_is_judged_by_the_truth(tmp_path, monkeypatch):
    root, data = tmp_path / "own", tmp_path / "data"
    truth = [("unlabelled/a", "useful"), ("unlabelled/b", "useful"), ("unlabelled/c", "foreign")]
    truth += [("unlabelled/d", "foreign"), ("unlabelled/e", "bad"), ("unlabelled/f", "copy")]
    truth += [("unlabelled/h", "smaller"), ("unlabelled/i", "smaller")]
    own_images.write_truth(root, truth)

    def run(command, **_):
        reporting = data / "08_reporting" / "main"
        reporting.mkdir(parents=True)
        ranking = {"path": [f"unlabelled/{k}" for k in "acbdfhi"]}
        ranking |= {"score": [4, 3, 2, 1, "", "", ""], "kept": [True] * 3 + [False] * 4}
        originals = ["", "", "", "unlabelled/a", "unlabelled/a", "unlabelled/b", ""]
        pd.DataFrame({**ranking, "near_duplicate_of": originals}).to_csv(
            reporting / "ranking.csv", index=False
        )
        rejected = {"path": ["unlabelled/e", "unlabelled/g"], "reason": ["", ""]}
        pd.DataFrame(rejected).to_csv(reporting / "rejected_files.csv", index=False)
        arms = {"learned": {"accuracy": 67.25, "seeds": 16.0}}
        summary = {"pile": {"verdict": "It helped."}, "arms": arms}
        (reporting / "summary.json").write_text(json.dumps(summary))
        assert command[-1].endswith("data_folder=" + str(data) + ",training.steps=3")

    monkeypatch.setattr(own_images.subprocess, "run", run)
    found = dict(own_images.judge(root, data, "training.steps=3"))
    # Of four pairs of a useful and a foreign image three are in the right order.
    assert found["AUROC of the ranking"] == "0.750"
    assert found["useful images kept"] == "100 %"
    assert found["foreign images kept"] == "50 %"
    assert found["bad files named"] == "1 of 1"
    assert found["good files rejected"] == "1"
    assert found["accuracy, learned"] == "67.2 %, 16 seeds"
    assert found["copies found: copy"] == "1 of 1"
    assert found["copies found: smaller"] == "1 of 2"
    assert found["other files taken for copies"] == "1"
    assert found["verdict"] == "It helped."
