"""The project as a whole: its graph, run at tiny size, and what may not leak in it."""

import json
import logging
import re
from itertools import pairwise

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import yaml
from kedro.framework.project import configure_project, pipelines
from kedro.framework.session import KedroSession
from kedro.pipeline import Pipeline

from tests.project import ROOT, load_context, run_project
from weighmatch.semisup.training.loop import Run
from weighmatch.settings import ExperimentLoader

pytestmark = pytest.mark.integration

UP_TO_METRICS = ["data_preparation", "feature_extraction", "training", "scoring", "evaluation"]
ARMS = {"supervised", "fixmatch", "fixmatch_matched", "pu", "learned", "oracle"}
TRUTH = {"draw_samples", "find_useful", "judge_runs", "trace_weights", "draw_gallery"}


@pytest.fixture(scope="module")
def graph():
    configure_project("weighmatch")  # a run by names before it knows these alone
    return pipelines["__default__"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The folder of one whole run of the main job at tiny size."""
    folder = tmp_path_factory.mktemp("data")
    run_project(folder)
    return folder


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The folder of one run of the benchmark at tiny size."""
    folder = tmp_path_factory.mktemp("benchmark")
    run_benchmark(folder)
    return folder


def run_benchmark(folder):
    """The environment of the benchmark, as small as that of the tests."""
    tiny = ExperimentLoader(str(ROOT / "conf"), env="test", base_env="base")["parameters"]
    training = {name: value for name, value in tiny["training"].items() if name != "weighting"}
    glyphs = {"seeds": [0, 1], "labels_per_class": 2, "pool_size": 80, "heldout_size": 24}
    run_project(
        folder,
        env="experiments/benchmark",
        names=UP_TO_METRICS,
        params={
            "data": {**glyphs, "test_size": 36},
            "grid": {"ratios": [0.5]},
            "training": training,
            "runs": {"workers": 1},
        },
    )


def watch_training(monkeypatch):
    """A list that fills with (arm, steps) of what is trained in this process from now on."""
    trained = []
    train_steps = Run.train_steps

    def train(self, limit=None):
        done = train_steps(self, limit)
        trained.append((self.config.arm, done))
        return done

    monkeypatch.setattr(Run, "train_steps", train)
    return trained


def table(folder, name, job="test", layer="08_reporting"):
    return pd.read_parquet(folder / layer / job / f"{name}.parquet")


def metrics_of(folder):
    return json.loads((folder / "08_reporting" / "test" / "summary.json").read_text())


# --- the whole graph -------------------------------------------------------------------------


def test_the_whole_graph_runs_and_reports(outputs):
    metrics = metrics_of(outputs)
    assert set(metrics["arms"]) == ARMS
    assert all(arm["seeds"] == 2 for arm in metrics["arms"].values())
    assert metrics["setting"]["ratio"] == 0.75
    page = (outputs / "08_reporting" / "test" / "report.html").read_text()
    assert metrics["verdict"] in page
    assert metrics["sure"] == "Not yet. Two seeds cannot show it; six can."
    manifest = json.loads((outputs / "05_model_input" / "test" / "manifest.json").read_text())
    assert manifest["primary"] == {"arm": "learned", "against": "fixmatch_matched"}
    declared = metrics["learned_minus"]["fixmatch_matched"]
    assert (declared["seeds"], declared["p_holm"]) == (2, None)
    assert "<code>training.<wbr>steps</code></th><td>40</td>" in page
    assert page.count("data:image/png;base64,") >= 8
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.slow
def test_the_longest_study_runs_by_name_and_only_so(outputs, graph, tmp_path):
    assert not any("meta_learning" in node.name for node in graph.nodes)
    assert not list(outputs.rglob("meta_learning*"))
    run_project(tmp_path, names=["meta_learning_analysis"])
    runs = table(tmp_path, "meta_learning_runs")
    assert set(runs["problem"]) == {
        "example_weights",
        "weight_decay",
        "weighing_network",
        "distillation",
        "contaminated_pool",
    }
    figures = tmp_path / "08_reporting" / "test" / "meta_learning_figures"
    for name in ("generalisation", "forgetting", "influence", "instability", "efficiency"):
        assert (figures / f"{name}.png").stat().st_size > 10_000


def test_every_output_is_where_the_catalog_says(outputs):
    made = {str(p.relative_to(outputs)) for p in outputs.rglob("*") if p.is_file()}
    figures = ["accuracy", "differences", "weights", "auroc", "calibration", "gallery", "samples"]
    for name in [*figures, "compute", "gap", "ihvp_figures/cost", "ihvp_figures/memory"]:
        assert f"08_reporting/test/{name}.png" in made
    assert "05_model_input/test/manifest.json" in made
    key = "unseen-r0.75-seed_0000"
    assert f"06_models/test/checkpoints/learned-rounds-{key}.pt" in made
    assert f"06_models/test/oracle_checkpoints/oracle-online-{key}.pt" in made
    contaminated = [name for name in made if name.startswith("06_models/test/checkpoints")]
    assert not any("oracle" in name for name in contaminated)
    # Each job has a folder of its own in every layer.
    assert {name.split("/")[1] for name in made} == {"test"}


def test_predictions_cover_every_run_and_image(outputs):
    runs = table(outputs, "runs", layer="07_model_output")
    assert len(runs) == len(ARMS) * 2
    assert (runs["cost"] > 0).all()
    for run, arm in zip(runs["run"], runs["arm"], strict=True):
        path = outputs / "07_model_output" / "test" / "predictions" / f"{run}.npz"
        with np.load(path) as found:
            for name in ("test_probabilities", "heldout_probabilities"):
                # 60 test images; 30 in-distribution and 30 OOD images held out
                assert found[name].shape == (60, 6)
                np.testing.assert_allclose(found[name].sum(axis=1), 1, atol=1e-3)
            assert found["heldout_scores"].shape == (60,)
            assert ("pool_weights" in found) == (arm not in ("supervised", "oracle"))


def test_the_learned_arm_leaves_mean_and_variance_of_every_influence(outputs):
    influences = table(outputs, "influences")
    assert set(influences["arm"]) == {"learned"}
    assert set(influences["seed"]) == {0, 1}
    assert not influences.duplicated(["seed", "index"]).any()
    assert influences["index"].between(0, 79).all()
    assert influences["evidence"].between(0, 1, inclusive="right").all()
    assert (influences["variance"] >= 0).all()
    assert influences["mean"].std() > 0


def test_the_log_has_lines_of_every_run(outputs):
    runs = table(outputs, "runs", layer="07_model_output")
    log = table(outputs, "training_log")
    assert set(log["run"]) == set(runs["run"])
    assert log["loss"].notna().any()


@pytest.mark.slow
def test_glyphs_go_through_the_whole_graph(tmp_path):
    parameters = {
        "data": {"source": "glyphs", "ood_source": "unseen+patches"},
        "runs": {"arms": "fixmatch+learned"},
    }
    run_project(tmp_path, names=UP_TO_METRICS, params=parameters)
    assert set(metrics_of(tmp_path)["arms"]) == {"fixmatch", "learned"}
    key = "unseen+patches-r0.75-seed_0000"
    truth = np.load(tmp_path / "05_model_input" / "test" / "ood_truth" / f"{key}.npz")
    assert np.bincount(truth["pool_sources"]).tolist() == [20, 30, 30]


def test_one_arm_and_another_ratio(tmp_path):
    params = {"runs": {"arms": "learned"}, "data": {"ratio": 0.5, "seeds": [5]}}
    run_project(tmp_path, names=UP_TO_METRICS, params=params)
    metrics = metrics_of(tmp_path)
    assert set(metrics["arms"]) == {"learned"}
    assert metrics["setting"]["ratio"] == 0.5
    assert "no verdict" in metrics["verdict"]


def test_the_end_of_a_run_tells_the_report_and_the_verdict(outputs, caplog):
    caplog.set_level("INFO")
    logger = logging.getLogger("weighmatch.terminal")
    logger.addHandler(caplog.handler)  # the project's logging hands nothing on
    run_project(outputs, names=["reporting"])
    logger.removeHandler(caplog.handler)
    said = dict.fromkeys(record.getMessage() for record in caplog.records)
    steps = [text for text in said if text.startswith("[")]
    assert steps[-1].startswith(f"[{len(steps)}/{len(steps)}] reporting: write_report, ")
    report = outputs / "08_reporting" / "test" / "report.html"
    assert list(said)[-2:] == [f"report: {report}", metrics_of(outputs)["verdict"]]
    assert not [text for text in said if "Replacing" in text]


def test_dvc_compares_at_most_twenty_numbers(outputs):
    metrics = json.loads((outputs / "08_reporting" / "test" / "metrics.json").read_text())
    numbers = [number for group in metrics.values() for number in group.values()]
    assert 10 <= len(numbers) <= 20
    assert all(isinstance(number, float) for number in numbers)
    arms = metrics_of(outputs)["arms"]
    told = metrics["accuracy_percent"]
    assert told == {arm: arms[arm]["accuracy"] for arm in told}
    assert {"learned", "fixmatch", "supervised"} < set(told)
    defined = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    for plot in (plot for row in defined for plot in row.values()):
        for path, column in [*plot["x"].items(), *plot["y"].items()]:
            assert column in pd.read_csv(outputs / "08_reporting" / "test" / path.split("/")[-1])
    # What goes through a file of text is read as it was written.
    catalog = load_context("test").catalog
    for name in ("arm_table", "calibration", "weight_trace"):
        dataset = catalog.get(name)
        dataset._filepath = outputs / "08_reporting" / "test" / f"{name}.csv"
        first = dataset.load()
        dataset._filepath = outputs / f"{name}.csv"
        dataset.save(first)
        pd.testing.assert_frame_equal(dataset.load(), first, rtol=1e-12)


def test_a_second_run_trains_nothing_and_says_the_same(outputs, monkeypatch):
    trained = watch_training(monkeypatch)
    before = (outputs / "08_reporting" / "test" / "summary.json").read_bytes()
    for name in ("training", "scoring", "evaluation", "reporting"):
        run_project(outputs, names=[name])
    assert not trained
    assert (outputs / "08_reporting" / "test" / "summary.json").read_bytes() == before


# --- the benchmark is the same graph over a grid ---------------------------------------------


def test_the_benchmark_has_a_row_a_run(benchmark):
    scores = table(benchmark, "run_scores", "benchmark")
    cell = {"source", "setting", "regime", "ratio", "labels_per_class"}
    run = {"arm", "schedule", "steps", "seed", "seconds", "cost", "mask_rate"}
    measured = {"accuracy", "heldout_accuracy", "auroc_weight", "auroc_near", "auroc_far", "ece"}
    assert set(scores.columns) >= {*cell, *run, *measured, "pool_weight_ood", "worst_class_kept"}
    fixmatch = {"fixmatch", "fixmatch_matched", "fixmatch_converged", "fixmatch_rounds"}
    assert set(scores["arm"]) == {*fixmatch, "supervised", "pu", "learned", "oracle"}
    assert (scores.groupby("arm")["seed"].agg(set) == {0, 1}).all()
    assert set(scores["source"]) == {"glyphs"}
    assert set(scores["setting"]) == {"near+far"}
    assert scores["accuracy"].between(0, 100).all()
    by_arm = scores[scores["seed"] == 0].set_index("arm")
    matched, converged = (by_arm.loc[f"fixmatch_{name}"] for name in ("matched", "converged"))
    assert converged["steps"] == 2 * matched["steps"]
    assert matched["cost"] == pytest.approx(by_arm.loc["learned", "cost"], abs=1)
    assert by_arm.loc["supervised", "cost"] < by_arm.loc["fixmatch", "cost"] == 40


def test_the_benchmark_compares_what_it_must(benchmark):
    comparison = table(benchmark, "comparison", "benchmark")
    pairs = {tuple(pair) for pair in comparison[["arm", "against"]].to_numpy()}
    assert pairs >= {
        ("learned", "fixmatch_matched"),
        ("learned", "fixmatch_converged"),
        ("learned", "pu"),
        ("fixmatch_converged", "fixmatch_matched"),
        ("oracle", "fixmatch"),
    }
    assert (comparison["seeds"] == 2).all()


def test_the_benchmark_resumes_run_by_run_to_the_same_rows(benchmark, monkeypatch):
    before = table(benchmark, "run_scores", "benchmark")
    folder = benchmark / "06_models" / "benchmark" / "runs"
    (run,) = folder.glob("learned-*seed_0001-*")
    for state in ("run.pt", "round_5/checkpoint.pt"):
        (run / state).unlink()
    trained = watch_training(monkeypatch)
    run_benchmark(benchmark)
    # A round is FixMatch on what the one before has chosen.
    assert trained == [("fixmatch", 7)]
    times = ["seconds", "update_seconds"]
    pd.testing.assert_frame_equal(
        table(benchmark, "run_scores", "benchmark").drop(columns=times),
        before.drop(columns=times),
    )


# --- leakage ---------------------------------------------------------------------------------


def names_of(nodes):
    return {node.name.rpartition(".")[2] for node in nodes}


def reached(graph, dataset):
    """Names of the nodes that `dataset` reaches, directly or through what is made of it."""
    return names_of(graph.from_inputs(dataset).nodes)


def test_only_the_oracle_and_the_evaluation_start_from_the_truth(graph):
    assert names_of(node for node in graph.nodes if "ood_truth" in node.inputs) == TRUTH
    assert names_of(node for node in graph.nodes if "ood_truth" in node.outputs) == {"draw_splits"}
    found = reached(graph, "ood_truth")
    assert "train_oracle" in found
    assert not found & {"train_arms", "compare_ihvps"}


def test_no_test_image_or_label_reaches_training(graph):
    # A frozen backbone gives features of all images, one by one; training reads those of its sets.
    extraction = [node for node in graph.nodes if node.name.endswith(".extract_features")]
    for dataset, known in (
        ("evaluation_images", graph - Pipeline(extraction)),
        ("test_labels", graph),
    ):
        found = reached(known, dataset)
        assert not found & {"train_arms", "train_oracle", "find_useful", "compare_ihvps"}
    (training,) = (set(node.inputs) for node in graph.nodes if node.name.endswith(".train_arms"))
    params = {"params:training", "params:runs", "params:run_folder"}
    assert training == {"training_sets", "features"} | params


@pytest.mark.parametrize("job", ["test", "benchmark"])
def test_training_files_hold_no_test_or_held_out_image_and_no_truth(outputs, benchmark, job):
    folder = (benchmark if job == "benchmark" else outputs) / "05_model_input" / job
    paths = sorted((folder / "training_sets").glob("*.npz"))
    assert len(paths) == 2
    for path in paths:
        with np.load(path) as training:
            images = {"labelled_images", "unlabelled_images"}
            assert set(training.files) - {"class_names"} == {*images, "labels"}
            seen = {image.tobytes() for name in images for image in training[name]}
        with np.load(folder / "evaluation_images" / path.name) as unseen:
            for name in ("test_images", "heldout_images"):
                assert not any(image.tobytes() in seen for image in unseen[name])


def test_every_edge_is_a_file_of_the_catalog(graph):
    catalog = load_context("test").catalog
    for name in graph.datasets() | pipelines["meta_learning_analysis"].datasets():
        if not name.startswith("params:"):
            assert type(catalog.get(name)).__name__ != "MemoryDataset", name


def test_layers_have_no_cycle_so_that_kedro_viz_shows_them(graph):
    catalog = load_context("test").catalog
    every = graph + pipelines["rank"] + pipelines["meta_learning_analysis"]

    def layers(names):
        kept = (catalog.get(name) for name in names if not name.startswith("params:"))
        return {dataset.metadata["kedro-viz"]["layer"] for dataset in kept}

    edges = {
        (first, last)
        for node in every.nodes
        for first in layers(node.inputs)
        for last in layers(node.outputs)
        if first != last
    }
    assert nx.is_directed_acyclic_graph(nx.DiGraph(edges))


def test_figures_tables_and_metrics_have_a_preview(outputs, graph, monkeypatch):
    # The paths of the catalog are those of the job in `outputs`.
    with KedroSession.create(
        ROOT, env="test", runtime_params={"data_folder": str(outputs)}
    ) as session:
        catalog = session.load_context().catalog
    missing = pipelines["rank"].all_outputs() | pipelines["meta_learning_analysis"].all_outputs()
    for name in graph.datasets() | missing:
        dataset = catalog.get(name)
        if not hasattr(dataset, "preview") or name in ("report", "gallery_page"):
            continue
        given = dataset.metadata["kedro-viz"]
        if given.get("preview", True):
            found = dataset.preview(**given.get("preview_args", {}))
            assert (found is None) == (name in missing), name


def test_the_graph_opens_on_the_steps_that_the_first_page_names(graph):
    """Each outer namespace is a box of kedro-viz before anything is unfolded."""
    (line,) = re.findall(r"^images ─► (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    steps = line.split(" ─► ")
    assert {node.namespace for node in graph.nodes} == {*steps, "ihvp_analysis"}
    for before, after in pairwise(steps):
        first, last = (graph.only_nodes_with_namespaces([name]) for name in (before, after))
        assert first.all_outputs() & last.inputs()
