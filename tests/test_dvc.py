"""dvc.yaml: a stage a box of the graph and job, with all the code and files that it needs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides
from kedro.framework.project import configure_project, pipelines

from tests.project import ROOT, as_paths, code_behind, load_context, path_of
from weighmatch.pipeline_registry import register_pipelines

pytestmark = pytest.mark.integration

ENVIRONMENTS = {
    "main": "base",
    "benchmark": "experiments/benchmark",
    "own_images": "experiments/own_images",
}
DEFINED = yaml.safe_load((ROOT / "dvc.yaml").read_text())
# Folders of images that the stages for own images read.
OWN = {"photos", "later_photos"}


@pytest.fixture(scope="module")
def stages():
    """The resolved stages, by (job, pipeline)."""
    configure_project("weighmatch")  # a run by names before it knows these alone
    found = {}
    for stage in Repo(str(ROOT)).index.stages:
        _, _, _, environment, _, pipeline = stage.cmd.split()
        job = next(job for job, env in ENVIRONMENTS.items() if env == environment)
        assert (job, pipeline) not in found
        found[job, pipeline] = stage
    return found


@pytest.fixture(scope="module")
def catalogs():
    return {job: load_context(env).catalog for job, env in ENVIRONMENTS.items()}


def paths_in(stage, kind):
    return {Path(str(item)).as_posix() for item in getattr(stage, kind)}


def files(catalog, names):
    return {path_of(catalog, name) for name in names if not name.startswith("params:")}


def test_every_box_of_each_job_has_a_stage_and_no_output_has_two(stages):
    boxes = set(pipelines) - {"__default__"}
    study, later = {"meta_learning_analysis"}, {"rank"}
    expected = {
        "main": boxes - later,
        "benchmark": boxes - study - later,
        "own_images": boxes - study - {"ihvp_analysis"},
    }
    assert set(stages) == {(job, box) for job, there in expected.items() for box in there}
    outputs = [path for stage in stages.values() for path in paths_in(stage, "outs")]
    assert len(outputs) == len(set(outputs))


def test_stages_name_all_files_and_code_that_they_depend_on(stages, catalogs):
    configure_project("weighmatch")
    registered = {study: register_pipelines(study) for study in (True, False)}
    for (job, name), stage in stages.items():
        pipeline, catalog = registered[job != "own_images"][name], catalogs[job]
        made = {*files(catalog, pipeline.all_outputs()), f"data/09_records/{job}/{name}"}
        assert made == paths_in(stage, "outs"), (job, name)
        deps = {path for path in paths_in(stage, "deps") if (ROOT / path).suffix != ".yml"} - OWN
        conf = {path for path in deps if path.startswith("conf/")}
        data = {path for path in deps if path.startswith("data/")}
        assert files(catalog, pipeline.inputs()) == data, (job, name)
        kinds = [catalog.get(n) for n in pipeline.datasets() if not n.startswith("params:")]
        modules = {type(dataset).__module__ for dataset in kinds}
        modules |= {dataset._kind.__module__ for dataset in kinds if hasattr(dataset, "_kind")}
        code = code_behind(f"weighmatch.pipelines.{name}", *modules)
        assert as_paths(code) == deps - data - conf, (job, name)


def test_stages_depend_on_their_environment_and_on_the_groups_that_they_read(stages):
    for (job, name), stage in stages.items():
        conf = {path for path in paths_in(stage, "deps") if path.startswith("conf/")}
        groups = set()
        for dep in stage.deps:
            if dep.def_path.startswith("conf/base/parameters"):
                groups |= set(dep.params)
                conf.discard(dep.def_path)
        environment = ENVIRONMENTS[job]
        assert conf == {"conf/base/globals.yml" if job == "main" else f"conf/{environment}"}
        read = {n.removeprefix("params:") for n in pipelines[name].inputs() if ":" in n}
        assert groups == read - {"run_folder", "cache_folder"}, (job, name)


def test_dvc_experiments_can_change_every_parameter_file(tmp_path, stages):
    """DVC resolves the whole file that it changes: none may need Kedro's own resolvers."""
    deps = [dep for stage in stages.values() for dep in stage.deps]
    used = {dep.def_path for dep in deps if dep.def_path.startswith("conf/base/parameters")}
    assert len(used) == 5
    for file in used:
        copy = tmp_path / Path(file).name
        shutil.copy(ROOT / file, copy)
        group = next(iter(yaml.safe_load(copy.read_text())))
        apply_overrides(copy, [f"+{group}.added=1"])
        assert yaml.safe_load(copy.read_text())[group]["added"] == 1


def test_experiments_of_the_documentation_change_what_they_say(tmp_path):
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    given = re.findall(r"-S '([^:']+):([^']+)'", "".join(page.read_text() for page in pages))
    assert given
    for file, change in given:
        copy = tmp_path / Path(file).name
        shutil.copy(ROOT / file, copy)
        apply_overrides(copy, [change])
        group, name, value = re.split("[.=]", change.lstrip("+"), maxsplit=2)
        assert str(yaml.safe_load(copy.read_text())[group][name]) == value


def test_plots_are_drawn_from_tables_that_git_keeps(stages):
    kept = {
        str(out)
        for (job, _), stage in stages.items()
        for out in stage.outs
        if job in ("main", "benchmark") and not out.use_cache
    }
    plots = {name: plot for row in DEFINED["plots"] for name, plot in row.items()}
    drawn = {path for plot in plots.values() for axis in "xy" for path in plot[axis]}
    assert drawn < kept
    assert {path for path in kept if path.endswith(".csv") and "/main/" in path} == drawn
    ignored = subprocess.run(["git", "check-ignore", *kept], cwd=ROOT, capture_output=True)
    assert not ignored.stdout


@pytest.mark.integration
def test_two_states_are_compared_without_a_remote(tmp_path):
    """What `dvc metrics diff` and `dvc plots diff` do in a clone that has Git's files alone."""

    def call(*command):
        names = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
        start = ["git", *names] if command[0] == "git" else [sys.executable, "-m", "dvc"]
        done = subprocess.run(
            [*start, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout

    call("git", "init", "-q")
    for part in ("config", "plots"):
        source, target = ROOT / ".dvc" / part, tmp_path / ".dvc" / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, _in_made(target))
    plots = {name: plot for row in DEFINED["plots"] for name, plot in row.items()}
    metrics = "data/08_reporting/main/metrics.json"
    text = yaml.safe_dump({"plots": DEFINED["plots"], "metrics": [metrics]})
    (tmp_path / "dvc.yaml").write_text(text)
    for number in (1, 2):
        for plot in plots.values():
            (path,), columns = plot["x"], [*plot["x"].values(), *plot["y"].values()]
            rows = [{"arm": "learned", "kind": "id", **dict.fromkeys(columns, number)}]
            pd.DataFrame(rows).to_csv(_in_made(tmp_path / path), index=False)
        _in_made(tmp_path / metrics).write_text(json.dumps({"accuracy_percent": {"pu": number}}))
        if number == 1:
            call("git", "add", "-A")
            call("git", "commit", "-qm", "first")
    (change,) = json.loads(call("dvc", "metrics", "diff", "--json"))[metrics].values()
    assert change == {"old": 1, "new": 2, "diff": 1}
    found = json.loads(call("dvc", "plots", "diff", "--json"))
    assert not found.get("errors")
    assert {name: drawn["revisions"] for name, (drawn,) in found["data"].items()} == {
        name: ["workspace", "HEAD"] for name in plots
    }


def _in_made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_own_images_are_read_by_the_stages_that_need_them(stages):
    read = {(job, name): paths_in(stage, "deps") & OWN for (job, name), stage in stages.items()}
    expected = {
        ("own_images", "data_preparation"): {"photos"},
        ("own_images", "rank"): {"later_photos"},
    }
    assert {place: folders for place, folders in read.items() if folders} == expected
