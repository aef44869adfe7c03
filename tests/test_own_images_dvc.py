"""Own images under DVC, from `dvc add` to a fresh clone where nothing runs again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.own_folder import make_folder
from tests.project import ROOT

pytestmark = pytest.mark.slow

STAGES = ["prepare", "extract_features", "train", "score", "evaluate", "report", "rank"]
REPRO = ("dvc", "repro", "own_images/dvc.yaml")


def call(where, *arguments):
    """Run a command of the environment that runs this test; returns what it says."""
    environment = {
        **os.environ,
        # Without the folder of this project, so that the copy's own code is imported.
        "PYTHONPATH": os.pathsep.join([str(where / "src"), *sys.path[1:]]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(arguments, cwd=where, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def copy_project(folder):
    """The files of this project that Git knows or would add, as a repository of their own."""
    listed = call(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    small = yaml.safe_load((ROOT / "conf/test/parameters.yml").read_text())
    path = folder / "conf/experiments/own_images/parameters.yml"
    own = yaml.safe_load(path.read_text())
    own["data"]["seeds"] = [0, 1]
    path.write_text(yaml.safe_dump({**own, "training": small["training"], "runs": small["runs"]}))


def commit(where, message):
    call(where, "git", "add", "--all")
    named = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
    call(where, "git", *named, "commit", "-q", "-m", message)


def test_a_fresh_clone_pulls_everything_and_runs_nothing(tmp_path):
    first, clone = tmp_path / "first", tmp_path / "clone"
    copy_project(first)
    call(first, "git", "init", "-q")
    make_folder(first / "photos", useful=40, foreign=20)
    make_folder(first / "later_photos", useful=10, foreign=10, seed=1)
    for folder in ("photos", "later_photos"):  # DVC puts a file in the place of a link
        (first / folder / "unlabelled" / "link.png").unlink()
    call(first, "dvc", "add", "photos", "later_photos")
    call(first, "dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
    commit(first, "own images")
    said = call(first, *REPRO)
    assert [
        stage for stage in STAGES if f"Running stage 'own_images/dvc.yaml:{stage}'" in said
    ] == (STAGES)
    commit(first, "results")
    call(first, "dvc", "push")
    call(tmp_path, "git", "clone", "-q", str(first), str(clone))
    call(clone, "dvc", "pull", "photos", "later_photos", "own_images/dvc.yaml")
    reporting = "data/08_reporting/own_images"
    for name in (
        "report.html",
        "ranking.csv",
        "gallery.html",
        "label_next.csv",
        "rank/ranking.csv",
    ):
        assert (clone / reporting / name).read_bytes() == (first / reporting / name).read_bytes()
    assert (clone / "data/06_models/own_images/export/model.pt2").exists()
    said = call(clone, *REPRO)
    assert "Running stage" not in said
    assert said.count("didn't change, skipping") >= len(STAGES)
    # One more image makes all stages stale that rest on it, from the first one on.
    shutil.copy(clone / "later_photos/unlabelled/bad/random.png", clone / "photos/unlabelled")
    call(clone, "dvc", "add", "photos")
    assert "own_images/dvc.yaml:prepare" in call(clone, "dvc", "status", "own_images/dvc.yaml")
