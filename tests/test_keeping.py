"""Whole runs of the project: one writer at a time, whole files, and data that belong together."""

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from kedro.framework.startup import bootstrap_project

from benchmarks import faults
from benchmarks.reliability import kill_one, starve
from tests.project import ROOT, run_project
from weighmatch.io.lock import Lock
from weighmatch.io.provenance import Records

pytestmark = pytest.mark.integration

STAGES = ["data_preparation", "feature_extraction", "training", "scoring", "evaluation"]
RUNS = {"arms": ["fixmatch", "oracle"], "schedule": "online"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two arms, up to its tables; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    run_project(folder, names=STAGES, params={"runs": RUNS})
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it, without its times, as a fresh clone gets from DVC."""
    copy = tmp_path / "data"
    shutil.copytree(finished, copy, copy_function=shutil.copyfile)
    return copy


@pytest.fixture
def run(folder, monkeypatch):
    """Runs pipelines by the command line; gives its one sentence, or "" if all went well."""
    monkeypatch.chdir(ROOT)

    def call(names, *params):
        bootstrap_project(ROOT)
        from weighmatch.cli import run as command

        given = ",".join([*params, f"data_folder={folder}"])
        arguments = ["--env", "test", "--pipelines", names, "--params", given]
        done = CliRunner().invoke(command, arguments)
        return faults.sentence(done.output, done.exit_code)

    return call


def test_a_copy_is_read_as_the_folder_itself(run, folder):
    before = faults.result(folder)
    assert not run("scoring,evaluation")
    assert faults.result(folder) == before


def test_a_deleted_seed_is_named(run, folder):
    for place, reader, maker in (
        ("05_model_input/test/training_sets", "training", "data_preparation"),
        ("06_models/test/checkpoints", "scoring", "training"),
        ("07_model_output/test/predictions", "evaluation", "scoring"),
    ):
        path = next((folder / place).glob("*seed_0001*"))
        content = path.read_bytes()
        path.unlink()
        assert run(reader) == f"{path} is missing; run the pipeline {maker}"
        path.write_bytes(content)
        assert not run("evaluation")


@pytest.mark.parametrize(
    ("place", "reader", "maker"),
    [
        ("05_model_input/test/ood_truth/unseen-r0.75-seed_0000.npz", "evaluation", STAGES[0]),
        ("05_model_input/test/manifest.json", "scoring", STAGES[0]),
        (
            "06_models/test/checkpoints/fixmatch-online-unseen-r0.75-seed_0000.pt",
            "scoring",
            "training",
        ),
        ("06_models/test/trained_runs.parquet", "scoring", "training"),
        ("07_model_output/test/runs.parquet", "evaluation", "scoring"),
    ],
)
def test_a_flipped_bit_is_named_with_the_pipeline_to_run(run, folder, place, reader, maker):
    path = folder / place
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    text = "is not as it was written: it is damaged, or was overwritten since"
    assert run(reader) == f"{path} {text}; run the pipeline {maker}"


def test_new_data_under_old_results_are_refused_everywhere(run, folder):
    assert not run("data_preparation", "data.pool_size=60")
    text = "the dataset oracle_sets was made from other ood_truth than lie in the data folder"
    names = "training and feature_extraction"
    assert run("scoring") == f"{text}; run the pipelines {names} again"
    names = "training, feature_extraction and scoring"
    assert run("evaluation") == f"{text}; run the pipelines {names} again"
    assert run("reporting").endswith("and 1 other do not exist; run the pipeline ihvp_analysis")
    # Preparation and evaluation in one go do not hide it.
    assert run("data_preparation,evaluation", "data.pool_size=60").startswith(text)
    given = "runs.arms=fixmatch+oracle,runs.schedule=online"
    assert not run("feature_extraction,training,scoring,evaluation", given)


def test_data_prepared_as_before_fit_the_old_results(run):
    assert not run("data_preparation", "data.ratio=0.25")
    assert not run("data_preparation")
    assert not run("scoring,evaluation")


def test_a_preparation_that_was_killed_half_way_trains_no_oracle(run, folder):
    records = folder / "09_records" / "test" / "data_preparation"
    old = {
        path: path.read_bytes()
        for name in ("ood_truth", "test_labels")
        for path in [
            *(folder / "05_model_input" / "test" / name).iterdir(),
            records / f"{name}.json",
        ]
    }
    assert not run("data_preparation", "data.ratio=0.25")
    for path, content in old.items():
        path.write_bytes(content)
    assert run("training") == (
        "ood_truth and evaluation_images are of two different runs of the pipeline "
        "data_preparation; run the pipelines data_preparation and feature_extraction again"
    )


def test_an_error_names_what_older_code_made(run, folder, monkeypatch, caplog):
    records = Records(folder / "09_records" / "test")
    monkeypatch.setattr("weighmatch.evaluation.judging.judge_runs", lambda *_: {}["a column"])
    with pytest.raises(faults.LostError):
        run("evaluation")
    assert "another version of the code" not in caplog.text
    for name in ("runs", "training_log"):  # of one node
        records.write(replace(records.read(name), code="older"))
    with pytest.raises(faults.LostError):
        run("evaluation")
    assert "runs, training_log were made by another version of the code" in caplog.text
    assert "run the pipeline scoring again" in caplog.text


def test_a_file_of_the_users_stays_and_changes_nothing(run, folder):
    before = faults.result(folder)
    mine = folder / "05_model_input" / "test" / "training_sets" / "mine-seed_0007.npz"
    np.savez(mine, x=np.ones(1))
    assert not run(",".join(STAGES), "runs.arms=fixmatch+oracle", "runs.schedule=online")
    assert mine.exists()
    assert faults.result(folder) == before


HOLD = """
import sys, time
from pathlib import Path
from weighmatch.io.lock import Locks
locks = Locks()
locks.take([Path(sys.argv[1])])
print("held", flush=True)
time.sleep(300)
"""


def test_another_writer_is_refused_and_readers_are_not(run, folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    lock = folder / "09_records" / "test" / "training.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        assert run("training").startswith(
            f"another run writes to what this one writes to (training of the job test): "
            f"process {other.pid} on "
        )
        after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        after.pop(lock)
        assert after == before
        assert not run("scoring,evaluation")
        other.send_signal(signal.SIGKILL)
    # What it left is taken over, and nothing is left of the lock.
    orphan = folder / "06_models" / "test" / "trained_runs.parquet.4194999.partial"
    orphan.touch()
    assert not run("training", "runs.arms=fixmatch+oracle", "runs.schedule=online")
    assert not list(folder.rglob("*.lock"))
    assert not orphan.exists()


def test_a_run_that_fails_gives_the_lock_back(run, folder):
    rate = ["training.learning_rate=99", "training.momentum=0.99", "training.weight_decay=0.9"]
    said = run("training", *rate, "runs.arms=fixmatch", "runs.schedule=online")
    assert "fixmatch, seed 0: the loss is no longer finite" in said
    assert said.endswith("lower training.learning_rate")
    assert not list(folder.rglob("*.lock"))


def test_a_folder_of_runs_that_two_jobs_share_has_one_writer(run, folder, tmp_path):
    shared = tmp_path / "runs"
    lock = Lock(shared / "training.lock")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, lock.path], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        assert "another run writes" in run("training", f"run_folder={shared}")
        other.kill()


@pytest.mark.slow
def test_dvc_gives_back_a_state_that_passes(run, folder, tmp_path):
    dvc = [sys.executable, "-m", "dvc"]

    def call(*arguments, where):
        subprocess.run([*dvc, *arguments], cwd=where, check=True, capture_output=True)

    first, clone = tmp_path / "first", tmp_path / "clone"
    for place in (first, clone):
        place.mkdir()
        call("init", "--no-scm", "-q", where=place)
        call("remote", "add", "-d", "store", str(tmp_path / "store"), where=place)
    shutil.copytree(folder, first / "data")
    call("add", "data", where=first)
    call("push", where=first)
    shutil.copy(first / "data.dvc", clone)
    call("pull", where=clone)
    shutil.rmtree(folder)
    time.sleep(0.01)
    shutil.move(clone / "data", folder)
    assert not run("scoring,evaluation")


# --- as the benchmark of reliability does it -------------------------------------------------


def survived(trial, *arguments):
    """Whether nothing is lost: a trial raises `faults.LostError`, which says what is."""
    trial(*arguments)
    return True


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return faults.Workshop(tmp_path_factory.mktemp("shop"))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["online", "two_stages", "rounds"])
def test_training_that_is_killed_goes_on_to_the_same_end(schedule, shop):
    assert survived(faults.killed, shop, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True])
def test_of_two_runs_at_once_one_is_done_and_one_refused(other, shop):
    assert survived(faults.two_at_once, shop, other)


@pytest.mark.slow
@pytest.mark.parametrize("hit", [kill_one, starve])
def test_a_worker_that_is_killed_or_starved_loses_nothing(hit, shop):
    assert survived(faults.hit_worker, shop, hit)


@pytest.mark.slow
def test_a_worker_of_a_study_that_is_killed_loses_nothing(shop):
    assert survived(faults.killed_study_worker, shop)


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_the_same_table(shop):
    assert survived(faults.killed_study, shop)


@pytest.mark.slow
def test_a_preparation_that_is_killed_mixes_nothing(shop):
    assert survived(faults.killed_preparation, shop)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint.pt", "ranking.pt", "run.pt"])
def test_a_flipped_bit_in_an_unfinished_run_is_made_good(name, shop):
    assert survived(faults.flipped_unfinished, shop, name)
