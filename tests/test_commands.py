"""`kedro run`: mistakes are told in one sentence before any work."""

import json
import shutil

import pytest
from click.testing import CliRunner
from kedro.framework.startup import bootstrap_project

from tests.project import ROOT, run_project

pytestmark = pytest.mark.integration


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    bootstrap_project(ROOT)
    from weighmatch.cli import run

    def call(params, *more, env="test"):
        folder = "" if "data_folder" in params else f",data_folder={tmp_path}"
        arguments = ["--env", env, "--params", params + folder, *more]
        return CliRunner().invoke(run, arguments)

    return call


def assert_one_sentence(result, message):
    assert result.exit_code == 1
    assert message in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("data.ratio=1.5", "data.ratio must be a number at least 0 and below 1, got 1.5"),
        ("data.labels_per_class=400", "only 177 images; lower it"),
        ("data.ood_source=moon", "data.ood_source 'moon' is unknown; choose from mix, unseen"),
        ("data.source=moon", "data.source 'moon' is unknown; choose from digits, folder"),
        ("data.seeds=abc", "data.seeds must be a list of different whole numbers"),
        ("data.seeds=10", "a list has brackets and, in a command, quotes: --params 'data.seeds=["),
        ("data.rato=0.5", "data has no parameter rato; did you mean ratio?"),
        ("data.sorce=folder,data.root=x", "data has no parameter sorce; did you mean source?"),
        ("training.netwrk=x", "training has no parameter netwrk; did you mean network?"),
        ("runs.arms=fixmatch+foo", "runs.arms 'foo' is unknown; choose from supervised"),
        ("runs.schedule=twice", "runs.schedule 'twice' is unknown; choose from online"),
        ("training.threshold=1.2", "training.threshold must be a number above 0 and below 1"),
        ("training.threshold=0", "training.threshold"),
        ("training.device=tpu", "training.device 'tpu' is unknown; choose from auto, cpu, cuda"),
        ("training.influence.solver=magic", "training.influence.solver 'magic' is unknown"),
        ("training.influence.spede=1", "training.influence has no parameter spede"),
        ("training.augmentation.cutout=2", "training.augmentation.cutout must be a number"),
        ("ihvp_analysis.steps=0", "ihvp_analysis.steps must be an integer of at least 1"),
        ("training.weighting.proximity=abc", "training.weighting.proximity must be a number"),
        ("training.network=resnet18", "'resnet18' is unknown; did you mean torchvision/resnet18?"),
        ("training.network=torchvision/resnt18", "did you mean torchvision/resnet18?"),
        (
            "training.network=torchvision/resnet18,training.weights=/nothing.pt",
            "training.weights '/nothing.pt' is neither none, packaged, DEFAULT nor a file; give",
        ),
        ("data=3", "data is a group of parameters"),
        ("rns.arms=learned", "there is no parameter rns"),
        ("training.device=cuda", "set it to auto or cpu"),
        (
            "training.weighting.outer_labels=held_out,data.labels_per_class=1,runs.schedule=online",
            "needs data.labels_per_class of at least 2",
        ),
        ("training.steps=3", "runs.rounds 4 are more rounds than there are steps (3); lower them"),
        ("runs.processes=9", "training.batch_size 8 cannot be divided over 9 processes; raise it"),
        ("runs.processes=2,runs.time_limit=9m", "2 processes train together without a time limit"),
        ("run_folder=/dev/null/x", "cannot be written"),
        ("data_folder=/dev/null/x", "choose another with --params data_folder="),
        # What has no effect is not asked for.
        ("training.weighting.interval=5", "training.weighting.interval has no effect on these"),
        ("training.ranking.steps=5,runs.schedule=online", "ranking.steps has no effect on these"),
        ("training.influence.damping=1,runs.arms=pu", "influence.damping has no effect on these"),
        ("runs.rounds=5,runs.schedule=online", "runs.rounds has no effect without an arm"),
        ("data.glyphs.clutter=1", "data.glyphs.clutter has no effect, as data.source is digits"),
        ("data.id_size=10", "data.id_size has no effect, as the regime is fixed_total"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(command, tmp_path, params, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_one_sentence(command(params), message)
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("grid.ratios=0.5", "a list has brackets and, in a command, quotes: --params 'grid"),
        ("grid.ratio=0.5", "grid has no parameter ratio; did you mean ratios?"),
        ("data.ratio=0.2", "data.ratio has no effect, as grid.ratios sets it"),
        ("data.ood_source=patches", "as every setting of grid.settings sets it"),
        ("training.steps=0", "training.steps must be an integer of at least 1, got 0"),
        ("data.labels_per_class=400,data.source=digits", "data.labels_per_class is 400"),
        ("data.glyphs.sie=3", "data.glyphs has no parameter sie"),
        ("training.device=cuda", "set it to auto or cpu"),
        ("training.steps=5", "runs.rounds 6 are more rounds than there are steps (5)"),
    ],
)
def test_a_benchmark_that_cannot_be_is_refused_in_a_sentence(
    command, tmp_path, params, message, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_one_sentence(command(params, env="experiments/benchmark"), message)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_pipeline_can_be_run_by_itself(command, tmp_path):
    result = command("data.ratio=0.25", "--pipelines", "data_preparation")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "05_model_input" / "test" / "manifest.json").read_text())
    pools = [cell["pool"] for cell in manifest["cells"]]
    assert [(pool["id"], pool["ood"], pool["by_source"]["unseen"]) for pool in pools] == [
        (60, 20, 20)
    ] * 2


def test_checks_before_work_leave_no_empty_folder(command, tmp_path):
    folder = tmp_path / "new"
    result = command(f"data_folder={folder}", "--pipelines", "training")
    message = "do not exist; run the pipelines data_preparation and feature_extraction"
    assert_one_sentence(result, message)
    assert not folder.exists()


def test_the_report_speaks_of_the_data_and_not_of_the_parameters(command, tmp_path):
    one = {"runs": {"arms": "fixmatch"}}
    names = ["data_preparation", "feature_extraction", "training", "scoring", "evaluation"]
    run_project(tmp_path, names=names, params=one)
    folder = tmp_path / "copy"
    shutil.copytree(tmp_path, folder)
    given = f"data.ratio=0.25,data_folder={folder}"
    result = command(given, "--pipelines", ",".join(names[1:]))
    assert_one_sentence(result, "data.ratio has no effect on the pipelines of this run")
    # New data under the old names, and the old checkpoints.
    for part in ("training_sets", "evaluation_images", "ood_truth", "test_labels"):
        shutil.rmtree(folder / "05_model_input" / "test" / part)
    given = f"data.labels_per_class=3,data_folder={folder}"
    assert command(given, "--pipelines", "data_preparation").exit_code == 0
    assert command(f"data_folder={folder}", "--pipelines", "feature_extraction").exit_code == 0
    result = command(f"data_folder={folder}", "--pipelines", "scoring,evaluation")
    message = "the dataset checkpoints was made from other training_sets than lie in the data"
    assert_one_sentence(result, message)
    # New data under new names.
    given = f"data.ratio=0.25,data_folder={folder}"
    assert command(given, "--pipelines", "data_preparation,feature_extraction").exit_code == 0
    result = command(f"data_folder={folder}", "--pipelines", "scoring")
    assert_one_sentence(result, "the dataset oracle_sets was made from other ood_truth than lie")
    run_project(folder, names=names[1:], params=one)
    metrics = json.loads((folder / "08_reporting" / "test" / "summary.json").read_text())
    assert metrics["setting"]["ratio"] == 0.25


def test_a_ranking_needs_a_folder_and_a_model(command, tmp_path):
    result = command("rank.workers=1", "--pipelines", "rank")
    assert_one_sentence(result, "rank.images names no folder; say which to rank with kedro run")
    result = command("rank.workers=0,rank.images=x", "--pipelines", "rank")
    assert_one_sentence(result, "rank.workers (or auto) must be an integer of at least 1")
    result = command("rank.images=x", "--pipelines", "data_preparation")
    assert_one_sentence(result, "rank.images has no effect on the pipelines of this run")
    result = command(f"rank.images={tmp_path}/none", "--pipelines", "rank")
    assert_one_sentence(result, "none does not exist; give the folder that holds the images")
    result = command(f"rank.images={tmp_path}", "--pipelines", "rank")
    assert_one_sentence(result, "export and 1 other do not exist; run the pipelines data")


@pytest.mark.parametrize("browser", [True, False])
def test_the_graph_is_opened_without_the_data_sets_between_its_steps(monkeypatch, capsys, browser):
    from kedro_viz.launchers.cli.main import viz

    from weighmatch import graph
    from weighmatch.cli import cli

    assert cli
    assert viz.get_command(None, "run") is graph.run
    opened = []
    monkeypatch.setattr("webbrowser.open_new", opened.append)
    monkeypatch.setattr(graph.started, "_VIZ_PROCESSES", {})

    def start(*, host, port, browser, **_):
        assert not browser
        graph.started._VIZ_PROCESSES[port + 1] = host  # the port that was asked for is taken

    monkeypatch.setattr(graph.started.run, "callback", start)
    flag = "--browser" if browser else "--no-browser"
    graph.run.main([flag, "--port", "4300"], standalone_mode=False)
    page = "http://127.0.0.1:4301/?types=nodes"
    assert page in capsys.readouterr().out
    assert opened == [page] * browser
