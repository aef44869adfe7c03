"""Own images from the folder to the ranking of another folder, through the command line."""

import html
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks.own_images import SEEN, generate
from tests.own_folder import LETTERS, OwnFolder, make_folder
from tests.project import ROOT, run_project
from weighmatch.evaluation.lists import CHECK_COLUMNS, NEXT_COLUMNS
from weighmatch.evaluation.ranking import COLUMNS
from weighmatch.pipelines.training import nodes

pytestmark = pytest.mark.integration

UP_TO_TRAINING = ["data_preparation", "feature_extraction", "training"]
# Between the few steps of the other tests and those that the recipe recommends.
TRAINING = {
    "steps": 400,
    "batch_size": 16,
    "threshold": 0.8,
    "ranking.steps": 75,
    "ranking.batch": 256,
    "influence.outer_batch": 64,
}


@dataclass
class Job:
    """A finished job.

    Attributes:
        own: the folder that it was given.
        data: the folder with its files.
    """

    own: OwnFolder
    data: Path

    @property
    def reporting(self):
        return self.data / "08_reporting" / "test"

    def table(self, name):
        return pd.read_csv(self.reporting / name, keep_default_na=False, na_values={"score": ""})


def command(*arguments, **params):
    """Run Kedro in a process of its own."""
    given = ",".join(f"{name}={value}" for name, value in params.items())
    call = [sys.executable, "-m", "kedro", "run", "--env", "test", *arguments, "--params", given]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]),
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_job(folder, steps, **sizes):
    """Make a folder and run the whole job on it."""
    own = make_folder(folder / "photos", **sizes)
    training = {f"training.{name}": value for name, value in {**TRAINING, "steps": steps}.items()}
    source = {"data.source": "folder", "data.root": own.root, "data_folder": folder / "data"}
    before = contents(own.root)
    command(**source, **training, **{"runs.rounds": 3})
    assert contents(own.root) == before
    return Job(own, folder / "data")


def contents(root):
    """Every file of a folder with its bytes."""
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return run_job(tmp_path_factory.mktemp("own"), steps=400)


def auroc(table, useful, foreign):
    scores = table.set_index("path")["score"].astype(float)
    truth = np.repeat([1, 0], [len(useful), len(foreign)])
    return roc_auc_score(truth, scores[[*useful, *foreign]])


def check_job(job):
    own, ranking = job.own, job.table("ranking.csv")
    assert tuple(ranking.columns) == COLUMNS
    found = auroc(ranking, own.useful, own.foreign)
    assert found >= 0.9
    # Every bad file is named once, and no good file is rejected.
    rejected = job.table("rejected_files.csv")
    assert sorted(rejected["path"]) == sorted(own.bad)
    assert (rejected["reason"] != "").all()
    assert sorted(ranking["path"]) == sorted([*own.useful, *own.foreign, *own.copies])
    named = ranking[ranking["near_duplicate_of"] != ""].set_index("path")["near_duplicate_of"]
    for copy, original in own.copies.items():
        # Of two equal files either may count as the original.
        assert named.get(copy) == original or named.get(original) == copy
    pile = json.loads((job.reporting / "summary.json").read_text())["pile"]
    assert pile["primary"]["mean"] > 0
    assert f"{pile['primary']['mean']:+.1f} percentage points" in pile["verdict"]
    assert len(pile["advice"]) == 3
    return found


def test_the_job_finds_what_is_foreign_and_names_what_is_bad(job):
    assert check_job(job) >= 0.9


def test_the_outputs_are_there_and_complete(job):
    ranking = job.table("ranking.csv")
    assert (ranking["kept"].astype(str) == "True").sum() > 0
    assert set(ranking["predicted_class"]) <= {*LETTERS, ""}
    probabilities = ranking["probability"][ranking["predicted_class"] != ""].astype(float)
    assert probabilities.between(0.25, 1).all()
    pd.testing.assert_series_equal(
        pd.read_parquet(job.reporting / "ranking.parquet")["path"],
        ranking["path"],
        check_dtype=False,
    )
    to_label, to_check = job.table("label_next.csv"), job.table("labels_to_check.csv")
    assert tuple(to_label.columns) == NEXT_COLUMNS
    assert tuple(to_check.columns) == CHECK_COLUMNS
    assert len(to_label) == 20
    assert set(to_label["path"]) <= {*job.own.useful, *job.own.foreign}
    for name in ("gallery.html", "report.html"):
        page = html.unescape((job.reporting / name).read_text())
        assert "http://" not in page
        assert "https://" not in page
    metrics = json.loads((job.reporting / "summary.json").read_text())
    assert metrics["verdict"] == metrics["pile"]["verdict"]
    assert metrics["verdict"] in page
    assert metrics["sure"] in page
    export = {path.name for path in (job.data / "06_models" / "test" / "export").iterdir()}
    assert export >= {"model.pt2", "run.pt", "classes.json", "model_card.md"}


def test_the_study_of_digits_is_left_out(job):
    assert "IHVP" not in (job.reporting / "report.html").read_text()
    assert not (job.reporting / "ihvp_figures").exists()


def registered(**data):
    """Names of the nodes of the default run, and of `ihvp_analysis`, for a source of images."""
    bootstrap_project(ROOT)
    with KedroSession.create(ROOT, env="test", runtime_params={"data": data}) as session:
        session.load_context()
    names = ("__default__", "ihvp_analysis")
    return [{n.name.rpartition(".")[2] for n in pipelines[name].nodes} for name in names]


def test_the_study_of_digits_runs_by_default_with_other_sources(tmp_path):
    default, study = registered(source="folder", root=str(tmp_path))
    assert "write_report" in default
    assert not default & study
    other, same = registered(source="digits")
    assert other == default | study
    assert same == study
    assert not registered(source="stl10")[0] & study


def test_20_labels_are_too_few_to_tell_and_that_is_said(job):
    pile = json.loads((job.reporting / "summary.json").read_text())["pile"]
    assert pile["verdict"].startswith("Whether the pile helped cannot be told yet")
    assert pile["sure"].startswith("Not yet. 20 labels cannot show it; a test folder of about ")
    assert pile["primary"]["test"] == "corrected resampled t test"
    assert pile["test_images_needed"] > 20


def check_later_ranking(job, folder):
    other = make_folder(folder / "later", useful=60, foreign=60, seed=1)
    before = contents(other.root)
    said = command("--pipelines", "rank", data_folder=job.data, **{"rank.images": other.root})
    assert contents(other.root) == before
    ranking = pd.read_csv(job.reporting / "rank" / "ranking.csv", keep_default_na=False)
    assert tuple(ranking.columns) == COLUMNS
    found = auroc(ranking, other.useful, other.foreign)
    assert found >= 0.85
    rejected = pd.read_csv(job.reporting / "rank" / "rejected_files.csv")["path"]
    # A class is nothing to a ranking of files.
    assert sorted(rejected) == sorted(path for path in other.bad if "empty class" not in path)
    assert f"{other.root}: {len(ranking)} images are ranked" in said
    assert f"{len(rejected)} files or members of archives are not used" in said
    page = (job.reporting / "rank" / "gallery.html").read_text()
    assert "images were ranked" in page or "images were kept" in page
    return found


def test_the_stored_model_ranks_another_folder_in_another_process(job, tmp_path):
    assert check_later_ranking(job, tmp_path) >= 0.85


def test_runs_of_other_data_are_kept_and_the_log_says_which_is_used(tmp_path, caplog, monkeypatch):
    # Kedro sets up all loggers anew, but not one that it does not know.
    monkeypatch.setattr(nodes, "log", logging.Logger("of this test"))
    nodes.log.addHandler(caplog.handler)
    own = make_folder(tmp_path / "photos", useful=20, foreign=10)
    data = {"source": "folder", "root": str(own.root)}
    params = {"data": data, "runs": {"arms": "supervised"}, "training": {"steps": 4}}
    runs = tmp_path / "data" / "06_models" / "test" / "runs"

    def train():
        caplog.clear()
        run_project(tmp_path / "data", names=UP_TO_TRAINING, params=params)
        return {path: path.stat().st_mtime_ns for path in runs.glob("*/run.pt")}

    first = train()
    assert "are new" not in caplog.text
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(
        own.root / "unlabelled" / "one more.png"
    )
    both = train()
    new = both.keys() - first.keys()
    assert len(first) == len(new) == 3
    assert first.items() <= both.items()
    assert "3 runs are new and 0 go on or are read" in caplog.text
    assert f"3 runs of other data, settings or code are kept beside them in {runs}" in caplog.text
    assert any(f"{path.parent.name} (new)" in caplog.text for path in new)
    assert any(f"such as {path.parent.name}. Ranking" in caplog.text for path in first)
    assert "--params data_folder=… keeps both" in caplog.text
    (own.root / "unlabelled" / "one more.png").unlink()
    assert train() == both
    assert "0 runs are new and 3 go on or are read" in caplog.text


@pytest.mark.slow
def test_weights_by_path_go_from_the_folder_to_the_report_and_to_another_ranking(tmp_path):
    import torch
    from torchvision.models import resnet18

    torch.manual_seed(0)
    weights = tmp_path / "resnet18.pth"
    torch.save(resnet18(weights=None).state_dict(), weights)
    root, data = tmp_path / "photos", tmp_path / "data"
    pile = pd.DataFrame(generate(root, files=16, labels=10, test=0), columns=["path", "kind"])
    backbone = {"training.network": "torchvision/resnet18", "training.weights": weights}
    views = {"training.features.weak_views": 1, "training.features.strong_views": 1}
    given = {"data.source": "folder", "data.root": root, "data.size": 32, "data_folder": data}
    given |= backbone | views
    assert "resnet18.pth, 3 views each" in command(**given)
    job = Job(OwnFolder(root), data)
    ranking = job.table("ranking.csv")
    assert sorted(ranking["path"]) == sorted(pile["path"][pile["kind"] != "bad"])
    assert sorted(job.table("rejected_files.csv")["path"]) == sorted(
        pile["path"][pile["kind"] == "bad"]
    )
    words = "a pretrained backbone, torchvision/resnet18, which was frozen"
    assert words in html.unescape((job.reporting / "report.html").read_text())
    # The features lie there: no image passes through the network again.
    first = "data_preparation,feature_extraction"
    assert "features of" not in command("--pipelines", first, **given)
    command("--pipelines", "rank", data_folder=data, **{"rank.images": root / "unlabelled"})
    later = pd.read_csv(job.reporting / "rank" / "ranking.csv", keep_default_na=False)
    mine = ranking[ranking["score"].notna()].set_index("path")["score"]
    theirs = later.set_index("unlabelled/" + later["path"])["score"].astype(float)
    assert theirs[mine.index].to_numpy() == pytest.approx(mine.to_numpy(), abs=2e-2)
    # The exported model has the weights in it.
    weights.unlink()
    model = torch.export.load(data / "06_models" / "test" / "export" / "model.pt2").module()
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    probabilities, scores = model(torch.from_numpy(images))
    assert probabilities.shape == (3, len(SEEN))
    assert torch.isfinite(scores).all()


@pytest.mark.slow
def test_2000_images(tmp_path):
    job = run_job(tmp_path, steps=800, useful=1000, foreign=1000)
    assert check_job(job) >= 0.9
    assert check_later_ranking(job, tmp_path) >= 0.85
