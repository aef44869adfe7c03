"""Ordinary mistakes: one sentence with the nearest right name, before any work, no traceback."""

import subprocess
import sys

import pytest
from click.testing import CliRunner
from kedro.framework.startup import bootstrap_project
from kedro.io import DatasetError

from tests.project import ROOT
from tests.test_commands import assert_one_sentence
from weighmatch.mistakes import nearest

pytestmark = pytest.mark.integration


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    bootstrap_project(ROOT)
    from weighmatch.cli import run

    def call(*arguments):
        given = list(arguments)
        if "--params" not in given:
            given += ["--params", f"data_folder={tmp_path}"]
        return CliRunner().invoke(run, given if "--env" in given else ["--env", "test", *given])

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--pipelines trainig", "there is no pipeline 'trainig'; did you mean training?"),
        ("--pipelines moon", "there is no pipeline 'moon'; choose from __default__, data_prep"),
        ("--env tset", "--env: there is no environment 'tset'; did you mean test?"),
        ("--env experiments/benchmrak", "did you mean experiments/benchmark?"),
        ("--tags slow", "--tags: the nodes of this project have no tags; choose by --nodes or"),
        ("--nodes train_arms", "did you mean training.train_arms?"),
        ("--from-nodes evaluation.judge_run", "did you mean evaluation.judge_runs?"),
        ("--to-nodes train_arm", "have no node 'train_arm'; did you mean training."),
        ("--nodes moon", "have no node 'moon'; kedro registry describe lists the nodes"),
        ("--nodes train_arms --pipelines rank", "have no node 'train_arms'; choose from rank."),
        ("--namespaces scorin", "did you mean scoring?"),
        ("--from-inputs trainig_sets", "have no dataset 'trainig_sets'; did you mean training_se"),
        ("--to-outputs repot", "have no dataset 'repot'; did you mean report?"),
        ("--runner ParallelRunner", "--runner ParallelRunner keeps no records of files; leave it"),
        ("--params data_folder=", "data_folder is empty; name a folder, such as data_folder=res"),
        ("--params run_folder=", "run_folder is empty; name a folder"),
        ("--params data_folder=/tmp/{x}", "data_folder must be the path of a folder without brac"),
        ("--params data_folder={x}", "data_folder must be the path of a folder without braces"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest_right_one(command, arguments, message):
    assert_one_sentence(command(*arguments.split()), message)
    assert not (ROOT / "None").exists()


def test_options_that_leave_no_node_are_told(command):
    chosen = ("--from-nodes", "reporting.write_report", "--to-nodes", "scoring.score_images")
    result = command(*chosen)
    assert_one_sentence(result, "no node is chosen by --from-nodes, --to-nodes together")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "reporting",
            "others do not exist; run the pipelines data_preparation, feature_extraction, "
            "training, scoring, evaluation and ihvp_analysis",
        ),
        ("scoring", "do not exist; run the pipelines data_preparation, feature_extraction and"),
        (
            "data_preparation,feature_extraction,training,scoring,evaluation,reporting",
            "do not exist; run the pipeline ihvp_analysis",
        ),
        ("data_preparation,scoring", "run the pipelines feature_extraction and training as well"),
    ],
)
def test_all_pipelines_that_a_run_lacks_are_told_before_anything_runs(
    command, tmp_path, names, message
):
    result = command("--pipelines", names)
    assert result.exit_code == 1
    (error,) = (line for line in result.output.splitlines() if line.startswith("Error"))
    wanted, found = (set(t.replace(",", "").split()) for t in (message, error))
    assert wanted <= found
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_does_not_answer_is_told_before_anything_runs(
    command, monkeypatch, tmp_path
):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    given = f"data_folder={tmp_path},runs.engine=ray"
    names = "data_preparation,feature_extraction,training"
    result = command("--pipelines", names, "--params", given)
    assert_one_sentence(result, "no cluster of Ray answers at RAY_ADDRESS 127.0.0.1:1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["data.ratio", "=3", "data.seeds=[1"])
def test_parameters_that_cannot_be_read_are_told(command, given):
    result = command("--params", given)
    assert result.exit_code == 2
    assert "Invalid value for '--params'" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("given", "name"), [("data.ratio=0.5,data.seeds=1,2", "seeds"), ("data.root=/a=b, c", "root")]
)
def test_a_value_that_is_cut_at_its_comma_is_told_with_the_cure(command, given, name):
    result = command("--params", given)
    assert result.exit_code == 2
    assert f"--params 'data.{name}=[…]' or --params 'data.{name}=\"…\"'" in result.output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('data.root="/a=b, c",data.ratio=0.5', {"root": "/a=b, c", "ratio": 0.5}),
        ("data.ratio=0.5, data.root='/it, \"b\"' ", {"root": '/it, "b"', "ratio": 0.5}),
        ("data.root=it's,data.fit=o'clock", {"root": "it's", "fit": "o'clock"}),
        ("data.source = folder , data.seeds = [1, 2]", {"source": "folder", "seeds": [1, 2]}),
        ("data.root=a b,", {"root": "a b"}),
    ],
)
def test_quotes_lists_and_spaces_are_read(given, expected):
    from weighmatch.cli import _split_params

    assert _split_params(None, None, given) == {"data": expected}


def test_a_list_can_be_given(command, tmp_path):
    given = f"data.seeds=[4,5],data.ratio=0.25,data_folder={tmp_path}"
    result = command("--pipelines", "data_preparation", "--params", given)
    assert result.exit_code == 0, result.output
    sets = (tmp_path / "05_model_input" / "test" / "training_sets").glob("*.npz")
    assert {path.stem for path in sets} == {f"unseen-r0.25-seed_000{seed}" for seed in (4, 5)}


def test_a_flag_shows_the_traceback_of_an_error(command):
    result = command("--traceback", "--pipelines", "trainig")
    assert result.exit_code == 1
    assert "Traceback" in result.output
    assert "did you mean training?" in result.output.splitlines()[-1]


def test_a_full_disk_is_told(command, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "/data/raw_images.npz")

    monkeypatch.setattr("weighmatch.io.arrays.write_atomically", fail)
    result = command("--pipelines", "data_preparation")
    assert_one_sentence(result, "/data/raw_images.npz: No space left on device; make room or")


def test_an_error_of_the_program_itself_keeps_its_traceback(command, monkeypatch):
    def fail(*_):
        raise KeyError("a column")

    monkeypatch.setattr("weighmatch.io.arrays.write_atomically", fail)
    result = command("--pipelines", "data_preparation")
    assert isinstance(result.exception, DatasetError)
    assert "a column" in str(result.exception)


def test_a_folder_outside_of_a_project_is_told(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(command(), f"{tmp_path} is not within a project; go to the folder that")


def test_a_project_in_a_folder_with_braces_is_told(command, monkeypatch, tmp_path):
    folder = tmp_path / "{a}"
    (folder / "conf" / "base").mkdir(parents=True)
    for name in ("pyproject.toml", "conf/logging.yml", "conf/base/globals.yml"):
        (folder / name).write_text((ROOT / name).read_text())
    monkeypatch.chdir(folder)
    result = command("--env", "base", "--params", "data.ratio=0.5")
    assert_one_sentence(
        result, f"without braces, which stand for names in Kedro's catalog, got {folder}"
    )


@pytest.mark.parametrize("which", ["notebook", "lab", "setup"])
def test_jupyter_that_is_not_there_is_told(monkeypatch, which):
    from weighmatch.cli import cli

    monkeypatch.setattr("kedro.framework.cli.jupyter._check_module_importable", _lacks)
    result = CliRunner().invoke(cli, ["jupyter", which])
    assert_one_sentence(result, "Jupyter is not part of this project; start it with uv run --with")


def _lacks(module):
    from kedro.framework.cli.utils import KedroCliError

    raise KedroCliError(f"Module '{module}' not found")


def test_the_commands_of_the_project_are_found_by_kedro():
    said = {}
    for arguments in (["run", "--help"], ["jupyter", "--help"], ["run", "--pipelines", "rnk"]):
        done = subprocess.run(
            [sys.executable, "-m", "kedro", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        said[arguments[-1], arguments[0]] = done.stdout + done.stderr
    assert "--traceback" in said["--help", "run"]
    assert "notebook" in said["--help", "jupyter"]
    assert (
        "Error: --pipelines: there is no pipeline 'rnk'; did you mean rank?" in said["rnk", "run"]
    )


def test_the_nearest_name_may_be_the_last_part_of_one():
    known = ["a.b.draw_samples", "a.c.write_report"]
    assert nearest("draw_sample", known) == "did you mean a.b.draw_samples?"
    assert nearest("a.c.write_repor", known) == "did you mean a.c.write_report?"
    assert nearest("zzz", known) == "choose from a.b.draw_samples, a.c.write_report"
