"""The project as a whole: its graph, its commands and the rules that both keep."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from kedro.framework.project import configure_project, pipelines
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "weighmatch"
ONE = {"runs": {"arms": "fixmatch"}}


@pytest.fixture(scope="module")
def graph():
    configure_project("weighmatch")
    return pipelines["__default__"]


def run_project(folder, *, names=None, params=None):
    bootstrap_project(ROOT)
    runtime_params = {"data_folder": str(folder), **(params or {})}
    with KedroSession.create(ROOT, env="test", runtime_params=runtime_params) as session:
        return session.run(pipeline_names=names or ["__default__"])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The folder of one whole run at tiny size."""
    folder = tmp_path_factory.mktemp("data")
    run_project(folder)
    return folder


# --- the whole graph -------------------------------------------------------------------------


def test_the_whole_graph_runs_and_reports(outputs):
    metrics = json.loads((outputs / "08_reporting" / "metrics.json").read_text())
    arms = {
        "supervised",
        "fixmatch",
        "fixmatch_matched",
        "max_prob",
        "pu",
        "learned",
        "oracle",
    }
    assert set(metrics["arms"]) == arms
    assert all(arm["seeds"] == 2 for arm in metrics["arms"].values())
    assert metrics["setting"]["ratio"] == 0.75
    page = (outputs / "08_reporting" / "report.html").read_text()
    assert metrics["verdict"].split(":")[0] in page
    assert page.count("data:image/png;base64,") == 8
    assert "http://" not in page
    assert "https://" not in page


def test_the_longest_study_runs_by_name_and_only_so(outputs, graph, tmp_path):
    assert not any("meta_learning" in node.name for node in graph.nodes)
    assert not list(outputs.rglob("meta_learning*"))
    run_project(tmp_path, names=["meta_learning_analysis"])
    runs = pd.read_parquet(tmp_path / "08_reporting" / "meta_learning_runs.parquet")
    assert set(runs["problem"]) == {
        "example_weights",
        "weight_decay",
        "weighing_network",
        "distillation",
        "contaminated_pool",
    }
    for name in ("generalisation", "forgetting", "influence", "instability", "efficiency"):
        assert (tmp_path / "08_reporting" / f"{name}.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The folder of one run of the benchmark at tiny size."""
    folder = tmp_path_factory.mktemp("benchmark")
    run_project(folder, names=["benchmark"])
    return folder


RUN_COLUMNS = {"setting", "regime", "ratio", "arm", "stages", "steps", "seed", "labels_per_class"}


def test_the_benchmark_has_a_row_a_run(outputs, graph, benchmark):
    assert not any("benchmark" in node.name for node in graph.nodes)
    assert not list(outputs.rglob("benchmark*"))
    table = pd.read_parquet(benchmark / "08_reporting" / "benchmark.parquet")
    measured = {
        "accuracy",
        "validation_accuracy",
        "seconds",
        "cost",
        "auroc_heldout",
        "auroc_near",
        "auroc_far",
        "auroc_confidence",
        "ece",
        "nll",
        "mask_rate",
        "weight_id",
        "weight_ood",
        "worst_class_kept",
    }
    assert set(table.columns) >= {"source", *RUN_COLUMNS, *measured}
    fixmatch = {"fixmatch", "fixmatch_matched", "fixmatch_converged", "fixmatch_rounds"}
    assert set(table["arm"]) == {*fixmatch, "supervised", "pu", "learned", "oracle"}
    assert (table.groupby("arm")["seed"].agg(set) == {0, 1}).all()
    assert set(table["source"]) == {"glyphs"}
    assert table["accuracy"].between(0, 1).all()
    weighted = table["arm"].isin(["pu", "learned"])
    assert (table["auroc_heldout"].notna() == weighted).all()
    by_arm = table[table["seed"] == 0].set_index("arm")
    matched, converged = (by_arm.loc[f"fixmatch_{name}"] for name in ("matched", "converged"))
    assert converged["steps"] == 2 * matched["steps"]
    assert matched["cost"] == pytest.approx(by_arm.loc["learned", "cost"], abs=1)
    assert by_arm.loc["supervised", "cost"] < by_arm.loc["fixmatch", "cost"] == 40
    for name in ("benchmark_compute", "benchmark_gap"):
        assert (benchmark / "08_reporting" / f"{name}.png").stat().st_size > 10_000


def test_the_benchmark_compares_what_it_must(benchmark):
    table = pd.read_parquet(benchmark / "08_reporting" / "benchmark_comparison.parquet")
    pairs = {tuple(pair) for pair in table[["arm", "against"]].to_numpy()}
    assert pairs >= {
        ("learned", "fixmatch_matched"),
        ("learned", "fixmatch_converged"),
        ("learned", "pu"),
        ("fixmatch_converged", "fixmatch_matched"),
        ("oracle", "fixmatch"),
    }
    assert (table["seeds"] == 2).all()


def test_the_benchmark_resumes_run_by_run_to_the_same_rows(benchmark, monkeypatch):
    from weighmatch.semisup.trainer import Run

    path = benchmark / "08_reporting" / "benchmark.parquet"
    before = pd.read_parquet(path)
    folder = benchmark / "06_models" / "runs"
    (state,) = folder.glob("learned_6_stages-*-seed_0001-*/round_5/checkpoint.pt")
    state.unlink()
    trained = []
    train_steps = Run.train_steps

    def train(self, limit=None):
        done = train_steps(self, limit)
        trained.append((self.config.arm, done))
        return done

    monkeypatch.setattr(Run, "train_steps", train)
    run_project(benchmark, names=["benchmark"])
    # A round is FixMatch on what the one before has chosen.
    assert trained == [("fixmatch", 7)]
    times = ["seconds", "update_seconds"]
    pd.testing.assert_frame_equal(
        pd.read_parquet(path).drop(columns=times), before.drop(columns=times)
    )


def test_every_output_is_where_the_catalog_says(outputs, graph):
    made = {str(p.relative_to(outputs)) for p in outputs.rglob("*") if p.is_file()}
    for name in (
        "accuracy",
        "differences",
        "weights",
        "auroc",
        "calibration",
        "gallery",
        "ihvp",
        "samples",
    ):
        assert f"08_reporting/{name}.png" in made
    assert "05_model_input/manifest.json" in made
    assert "06_models/checkpoints/learned-seed_0000.pt" in made
    assert "06_models/oracle_checkpoints/oracle-seed_0001.pt" in made
    assert not any("oracle" in name for name in made if name.startswith("06_models/checkpoints"))


def test_predictions_cover_every_run_and_image(outputs):
    table = pd.read_parquet(outputs / "07_model_output" / "predictions.parquet")
    counts = table.groupby(["arm", "seed", "split"]).size()
    assert (counts == 60).all()  # 60 test images; 30 in-distribution and 30 OOD held out
    assert len(counts) == 7 * 2 * 2
    sums = table[[c for c in table.columns if c.startswith("p_")]].sum(axis=1)
    assert sums.between(0.999, 1.001).all()


def test_the_learned_arm_leaves_mean_and_variance_of_every_influence(outputs):
    table = pd.read_parquet(outputs / "07_model_output" / "influences.parquet")
    assert set(table["arm"]) == {"learned"}
    assert set(table["seed"]) == {0, 1}
    assert not table.duplicated(["seed", "index"]).any()
    assert table["index"].between(0, 79).all()
    assert table["evidence"].between(0, 1, inclusive="right").all()
    assert (table["variance"] >= 0).all()
    assert table["mean"].std() > 0


def test_glyphs_go_through_the_whole_graph(tmp_path):
    parameters = {
        "data": {"source": "glyphs", "ood_source": "unseen+patches"},
        "runs": {"arms": "fixmatch+learned"},
    }
    run_project(
        tmp_path,
        names=["data_preparation", "training", "scoring", "evaluation"],
        params=parameters,
    )
    metrics = json.loads((tmp_path / "08_reporting" / "metrics.json").read_text())
    assert set(metrics["arms"]) == {"fixmatch", "learned"}
    truth = np.load(tmp_path / "05_model_input" / "ood_truth" / "seed_0000.npz")
    assert np.bincount(truth["pool_sources"]).tolist() == [20, 30, 30]


def test_a_second_run_trains_nothing_and_says_the_same(outputs, monkeypatch):
    from weighmatch.semisup.trainer import Run

    monkeypatch.setattr(Run, "train_steps", lambda self, limit=0: pytest.fail("trained again"))
    before = (outputs / "08_reporting" / "metrics.json").read_bytes()
    # Counting operations takes steps of its own: leave that arm's count out.
    monkeypatch.setattr(
        "weighmatch.semisup.runs.matched_steps",
        lambda *_: int(
            pd.read_parquet(outputs / "07_model_output/runs.parquet")
            .query("arm == 'fixmatch_matched'")["steps"]
            .iloc[0]
        ),
    )
    for name in ("training", "scoring", "evaluation", "reporting"):
        run_project(outputs, names=[name])
    assert (outputs / "08_reporting" / "metrics.json").read_bytes() == before


def test_one_arm_and_another_ratio(tmp_path):
    params = {"runs": {"arms": "learned"}, "data": {"ratio": 0.5, "seeds": [5]}}
    run_project(tmp_path, params=params)
    metrics = json.loads((tmp_path / "08_reporting" / "metrics.json").read_text())
    assert set(metrics["arms"]) == {"learned"}
    assert metrics["setting"]["ratio"] == 0.5
    assert "no verdict" in metrics["verdict"]


def test_the_report_speaks_of_the_data_and_not_of_the_parameters(command, outputs, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(outputs, folder)
    given = f"data.ratio=0.25,data_folder={folder}"
    result = command(given, "--pipelines", "training,scoring,evaluation")
    assert result.exit_code == 1
    assert "data.ratio has no effect on the pipelines of this run" in result.output
    # New data, and the old checkpoints.
    assert command(given, "--pipelines", "data_preparation").exit_code == 0
    result = command(f"data_folder={folder}", "--pipelines", "scoring,evaluation")
    assert result.exit_code == 1
    assert "was trained on other data than lie in the data folder" in str(result.exception)
    run_project(folder, names=["training", "scoring", "evaluation"], params=ONE)
    metrics = json.loads((folder / "08_reporting" / "metrics.json").read_text())
    assert metrics["setting"]["ratio"] == 0.25


def test_checks_before_work_leave_no_empty_folder(command, tmp_path):
    folder = tmp_path / "new"
    result = command(f"data_folder={folder}", "--pipelines", "training")
    assert result.exit_code == 1
    assert "training_sets does not exist; run the pipeline that makes it" in str(result.exception)
    assert not folder.exists()


# --- leakage ---------------------------------------------------------------------------------


def consumers(graph, dataset):
    """Names of the nodes that `dataset` reaches, directly or through what is made of it."""
    return {node.name for node in graph.from_inputs(dataset).nodes}


def test_only_the_oracle_and_the_evaluation_start_from_the_truth(graph):
    direct = {node.name for node in graph.nodes if "ood_truth" in node.inputs}
    assert direct == {"draw_samples", "remove_intruders", "join_truth", "trace_weights"}
    reached = consumers(graph, "ood_truth")
    assert "train_oracle" in reached
    assert "train_arms" not in reached
    assert "compare_ihvps" not in reached


def test_no_test_image_or_label_reaches_training(graph):
    for dataset in ("evaluation_images", "test_labels"):
        reached = consumers(graph, dataset)
        assert not reached & {"train_arms", "train_oracle", "remove_intruders", "compare_ihvps"}
    training = {node.name: set(node.inputs) for node in graph.nodes if node.name == "train_arms"}
    assert training == {
        "train_arms": {"training_sets", "params:training", "params:runs", "params:run_folder"}
    }


def test_the_benchmark_keeps_the_truth_from_what_is_judged_by_it(graph):
    configure_project("weighmatch")  # a run by names before it knows these alone
    whole = pipelines["benchmark"]
    direct = {node.name for node in whole.nodes if "benchmark_truth" in node.inputs}
    assert direct == {"remove_benchmark_intruders", "judge_benchmark_runs"}
    made = {node.name for node in whole.nodes if "benchmark_truth" in node.outputs}
    assert made == {"draw_benchmark_splits"}
    reached = consumers(whole, "benchmark_truth")
    assert "train_benchmark_oracle" in reached
    assert "train_benchmark_arms" not in reached
    training = {"train_benchmark_arms", "train_benchmark_oracle", "remove_benchmark_intruders"}
    assert not consumers(whole, "benchmark_images") & training
    assert consumers(whole, "benchmark_labels") == {
        "judge_benchmark_runs",
        "compare_benchmark",
        "draw_benchmark",
    }


@pytest.mark.parametrize("pipeline", ["", "benchmark_"])
def test_training_files_hold_no_test_or_held_out_image_and_no_truth(outputs, benchmark, pipeline):
    import numpy as np

    folder = benchmark if pipeline else outputs
    sets = f"{pipeline}sets" if pipeline else "training_sets"
    images = f"{pipeline or 'evaluation_'}images"
    paths = sorted((folder / "05_model_input" / sets).glob("*.npz"))
    assert len(paths) == 2
    for path in paths:
        with np.load(path) as training:
            assert set(training.files) == {"labelled_images", "labels", "unlabelled_images"}
            seen = {
                image.tobytes()
                for name in ("labelled_images", "unlabelled_images")
                for image in training[name]
            }
        with np.load(folder / "05_model_input" / images / path.name) as unseen:
            for name in ("test_images", "heldout_images"):
                assert not any(image.tobytes() in seen for image in unseen[name])


def test_every_edge_is_a_file_of_the_catalog(graph):
    bootstrap_project(ROOT)
    with KedroSession.create(ROOT, env="test") as session:
        catalog = session.load_context().catalog
        for name in graph.datasets() | pipelines["benchmark"].datasets():
            if not name.startswith("params:"):
                assert type(catalog.get(name)).__name__ != "MemoryDataset", name


# --- DVC -------------------------------------------------------------------------------------


def test_dvc_stages_are_the_pipelines_and_their_files(graph):
    import yaml

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    bootstrap_project(ROOT)
    with KedroSession.create(ROOT) as session:
        catalog = session.load_context().catalog
        whole = sum(pipelines.values(), graph)
        folder = {name: path_of(catalog, name) for name in whole.datasets() if ":" not in name}
    covered = set()
    for stage in stages.values():
        name = stage["cmd"].removeprefix("kedro run --env base --pipelines ")
        covered.add(name)
        pipeline = pipelines[name]
        inputs = {folder[d] for d in pipeline.inputs() if ":" not in d}
        assert inputs == {d for d in stage["deps"] if d.startswith("data/")}, name
        outs = {*stage["outs"], *stage.get("metrics", []), *stage.get("plots", [])}
        assert outs == {folder[d] for d in pipeline.all_outputs()}, name
        for dep in stage["deps"]:
            assert dep.startswith("data/") or (ROOT / dep).exists(), dep
    assert covered == set(pipelines) - {"__default__"}


def test_dvc_experiments_can_change_every_parameter_file(tmp_path):
    """DVC resolves the whole file that it changes: none may need Kedro's own resolvers."""
    import yaml
    from dvc.utils.hydra import apply_overrides

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    used = {file for stage in stages for group in stage.get("params", []) for file in group}
    assert len(used) == 5
    for file in used:
        copy = tmp_path / Path(file).name
        shutil.copy(ROOT / file, copy)
        group = next(iter(yaml.safe_load(copy.read_text())))
        apply_overrides(copy, [f"+{group}.added=1"])
        assert yaml.safe_load(copy.read_text())[group]["added"] == 1


def path_of(catalog, name):
    description = catalog.get(name)._describe()
    path = Path(str(description.get("filepath", description.get("path"))))
    return str(path.relative_to(ROOT)) if path.is_absolute() else str(path)


# --- architecture ----------------------------------------------------------------------------

FLOORS = {
    "checks": set(),
    "implicit": set(),
    "semisup": {"implicit", "checks"},
    "data": {"checks"},
    "studies": {"implicit", "semisup", "data", "checks"},
    "evaluation": {"data", "checks"},
    "io": set(),
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("floor", sorted(FLOORS))
def test_imports_point_down_only(floor):
    place = SOURCE / floor
    files = [SOURCE / f"{floor}.py"] if not place.is_dir() else sorted(place.rglob("*.py"))
    for path in files:
        for module in imported(path):
            parts = module.split(".")
            if parts[0] == "weighmatch" and len(parts) > 1:
                assert parts[1] in FLOORS[floor] | {floor}, (path.name, module)
            if floor != "io":
                assert parts[0] not in ("kedro", "kedro_datasets"), (path.name, module)
            if floor in ("data", "evaluation", "checks"):
                assert parts[0] != "torch", (path.name, module)


@pytest.mark.parametrize("floor", ["implicit", "semisup", "data", "studies", "evaluation"])
def test_floors_work_without_kedro(floor):
    code = f"import sys; sys.modules['kedro'] = None; import weighmatch.{floor}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_registry_parameters_and_catalog_are_read_without_torch():
    code = (
        "import sys\n"
        "from kedro.framework.project import pipelines\n"
        "from kedro.framework.session import KedroSession\n"
        "from kedro.framework.startup import bootstrap_project\n"
        f"bootstrap_project({str(ROOT)!r})\n"
        f"with KedroSession.create({str(ROOT)!r}) as session:\n"
        "    context = session.load_context()\n"
        "    for name in pipelines['__default__'].datasets():\n"
        "        context.catalog.get(name)\n"
        "assert not {'torch', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- commands and bad input ------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    bootstrap_project(ROOT)
    from weighmatch.cli import run

    def call(params, *more):
        folder = "" if "data_folder" in params else f",data_folder={tmp_path}"
        arguments = ["--env", "test", "--params", params + folder, *more]
        return CliRunner().invoke(run, arguments)

    return call


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("data.ratio=1.5", "data.ratio must be a number at least 0 and below 1, got 1.5"),
        ("data.labels_per_class=400", "only 177 images; lower it"),
        ("data.ood_source=moon", "data.ood_source 'moon' is unknown; choose from mix, unseen"),
        ("data.seeds=abc", "data.seeds must be a list of different whole numbers"),
        ("data.seeds=10", "got 10; Kedro's --params carries no lists: set it in a file in conf"),
        ("data.rato=0.5", "data has no parameter 'rato'"),
        ("runs.arms=fixmatch+foo", "runs.arms 'foo' is unknown; choose from supervised"),
        ("training.threshold=1.2", "training.threshold must be a number above 0 and below 1"),
        ("training.threshold=0", "training.threshold"),
        ("training.device=tpu", "training.device 'tpu' is unknown; choose from auto, cpu, cuda"),
        ("training.weighing.solver=magic", "training.weighing.solver 'magic' is unknown"),
        ("training.weighing.spede=1", "training.weighing has no parameter spede"),
        ("training.augmentation.cutout=2", "training.augmentation.cutout must be a number"),
        ("ihvp_analysis.steps=0", "ihvp_analysis.steps must be an integer of at least 1"),
        ("training.weighing.proximity=abc", "training.weighing.proximity must be a number"),
        ("data=3", "data is a group of parameters"),
        ("rns.arms=learned", "there is no parameter rns"),
        ("training.device=cuda", "set it to auto or cpu"),
        (
            "training.weighing.outer_labels=held_out,data.labels_per_class=1",
            "needs data.labels_per_class of at least 2",
        ),
        ("training.steps=3", "runs.stages 4 are more rounds than there are steps (3); lower them"),
        ("run_folder=/dev/null/x", "cannot be written"),
        ("data_folder=/dev/null/x", "choose another with --params data_folder="),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(command, tmp_path, params, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = command(params)
    assert result.exit_code == 1
    assert message in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1
    assert "Traceback" not in result.output
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("benchmark.source=moon", "benchmark.source 'moon' is unknown; choose from digits, glyphs"),
        ("benchmark.settings=near", "Kedro's --params carries no lists: set it in a file in conf"),
        ("benchmark.arms=learned+foo", "benchmark.arms 'foo' is unknown; choose from supervised"),
        ("benchmark.ratio=0.5", "benchmark has no parameter 'ratio'"),
        (
            "data.ratio=0.2",
            "data.ratio has no effect in the benchmark; set benchmark.ratios instead",
        ),
        ("benchmark.steps=0", "benchmark.steps (or null) must be an integer of at least 1, got 0"),
        (
            "benchmark.labels_per_class=400,benchmark.source=digits",
            "benchmark.known_settings.near+far with benchmark.source digits at ratio 0.5: "
            "data.labels_per_class is 400",
        ),
        ("benchmark.glyphs.training.threshold=2", "benchmark.glyphs: training.threshold must be"),
        ("benchmark.glyphs.data.sie=3", "benchmark.source glyphs at ratio 0.5: data has no"),
        ("training.device=cuda", "set it to auto or cpu"),
        (
            "training.weighing.outer_labels=held_out,benchmark.labels_per_class=1",
            "needs data.labels_per_class of at least 2",
        ),
    ],
)
def test_a_benchmark_that_cannot_be_is_refused_in_a_sentence(
    command, tmp_path, params, message, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = command(params, "--pipelines", "benchmark")
    assert result.exit_code == 1
    assert message in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1
    assert not list(tmp_path.rglob("*.npz"))


def test_a_pipeline_can_be_run_by_itself(command, tmp_path):
    result = command("data.ratio=0.25", "--pipelines", "data_preparation")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "05_model_input" / "manifest.json").read_text())
    assert [seed["pool"] for seed in manifest["seeds"]] == [
        {"id": 60, "ood": 20, "by_source": {"id": 60, "unseen": 20, "patches": 0, "noise": 0}}
    ] * 2
