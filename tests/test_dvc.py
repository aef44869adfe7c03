"""dvc.yaml: a stage a box of the graph and job, with all the code and files that it needs."""

import shutil
from pathlib import Path

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


def test_own_images_are_read_by_the_stages_that_need_them(stages):
    read = {(job, name): paths_in(stage, "deps") & OWN for (job, name), stage in stages.items()}
    expected = {
        ("own_images", "data_preparation"): {"photos"},
        ("own_images", "rank"): {"later_photos"},
    }
    assert {place: folders for place, folders in read.items() if folders} == expected
