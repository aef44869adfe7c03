"""Own images from Python: `Folder` and `fit`."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from tests.own_folder import LETTERS, SIDE, make_folder
from weighmatch import Folder, fit, own_images
from weighmatch.evaluation.ranking import COLUMNS
from weighmatch.semisup import TrainedRun


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("own") / "photos", useful=40, foreign=40)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


FEW = {
    "steps": 24,
    "width": 8,
    "batch_size": 8,
    "influence": {"outer_batch": 24, "curvature_batch": 16, "batch": 24, "max_products": 2},
    "ranking": {"steps": 10, "batch": 16},
}


@pytest.mark.integration
def test_five_lines_go_from_a_folder_to_a_ranking_and_a_model(own, tmp_path, capfd):
    data = Folder(own.root)
    run = fit(data, training=FEW, runs={"rounds": 2})
    assert "training: 100 %" in capfd.readouterr().err  # progress is shown
    assert tuple(run.ranking.columns) == COLUMNS
    assert sorted(run.ranking["path"]) == sorted([*own.useful, *own.foreign, *own.copies])
    assert run.class_names == data.class_names == tuple(sorted(LETTERS))
    assert sorted(data.rejected["path"]) == sorted(own.bad)
    images = np.zeros((3, 1, SIDE, SIDE), np.uint8)
    scored = run.score(images)
    assert scored.probabilities.shape == (3, len(LETTERS))
    run.save(tmp_path / "run.pt")
    loaded = TrainedRun.load(tmp_path / "run.pt")
    assert np.array_equal(loaded.score(images).scores, scored.scores)
    run.save(tmp_path / "export")
    described = json.loads((tmp_path / "export" / "classes.json").read_text())
    assert described["preparation"] == {"fit": "crop", "background": "white"}
    table = run.rank(own.root / "unlabelled", tmp_path / "ranked")
    assert tuple(table.columns) == COLUMNS
    # What was seen in training is scored alike from its file.
    mine = run.ranking[run.ranking["kept"]].set_index("path")["score"]
    theirs = table.set_index("unlabelled/" + table["path"])["score"]
    assert theirs[mine.index].to_numpy() == pytest.approx(mine.to_numpy(), abs=1e-5)


@pytest.mark.integration
def test_a_finished_run_is_read_again(own, tmp_path, monkeypatch):
    first = fit(Folder(own.root), training=FEW, runs={"rounds": 2}, folder=tmp_path / "runs")
    (place,) = (tmp_path / "runs").iterdir()
    before = (place / "run.pt").stat().st_mtime_ns
    second = fit(Folder(own.root), training=FEW, runs={"rounds": 2}, folder=tmp_path / "runs")
    assert (place / "run.pt").stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(first.ranking, second.ranking)


class StoppedError(Exception):
    pass


@pytest.mark.integration
def test_a_run_is_trained_where_its_parameters_say(own, tmp_path, monkeypatch):
    def stop(jobs, folder, workers, engine, processes):
        raise StoppedError(engine.engine, processes)

    monkeypatch.setattr(own_images, "finish_jobs", stop)
    with pytest.raises(StoppedError, match=r"\('ray', 2\)"):
        fit(Folder(own.root), training=FEW, runs={"engine": "ray", "processes": 2})


SCRIPT = """
import sys
from weighmatch import Folder
from weighmatch.data import files
files.MANY_FILES = 1
print("read", len(Folder(sys.argv[1]).splits.labels), __file__, __spec__)
"""


@pytest.mark.integration
def test_a_script_needs_no_guard_for_the_processes_that_read_files(own, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(own.root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["read", "20", str(tmp_path / "script.py"), "None"]


def test_mistakes_are_one_sentence(own, tmp_path):
    with pytest.raises(ValueError, match="does not exist; give the folder of your images"):
        Folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="data has no parameter colour"):
        Folder(own.root, colour=1)
    assert repr(Folder(own.root)) == f"Folder({str(own.root)!r})"


def test_importing_the_package_costs_nothing():
    code = (
        "import sys, weighmatch\n"
        "assert weighmatch.__version__\n"
        "heavy = {'torch', 'numpy', 'pandas', 'kedro'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
