"""Parameters: each default stands once, and every environment can be read."""

from dataclasses import is_dataclass
from pathlib import Path

import pytest

from tests.project import ROOT
from weighmatch.data.grid import make_cells
from weighmatch.hooks import GROUPS
from weighmatch.settings import CONFIG_LOADER_ARGS, ExperimentLoader

ENVIRONMENTS = sorted(
    str(path.parent.relative_to(ROOT / "conf")) for path in ROOT.glob("conf/**/globals.yml")
)


def read(env, key="parameters"):
    return ExperimentLoader(str(ROOT / "conf"), env=env, **CONFIG_LOADER_ARGS)[key]


def repeated(given, group):
    """The parameters that are given as the dataclass `group` has them anyway."""
    for name, value in given.items():
        default = getattr(group, name)
        if is_dataclass(default):
            yield from (f"{name}.{inner}" for inner in repeated(value, default))
        elif (list(default) if isinstance(default, tuple) else default) == value:
            yield name


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_base_repeats_no_default(name):
    given = read("base")[name]
    required = {"seeds": [0]} if name == "data" else {}
    open_ones = {key: value for key, value in given.items() if key not in required}
    assert not list(repeated(open_ones, GROUPS[name](**required)))


def test_base_has_every_group():
    assert set(read("base")) == {*GROUPS, "run_folder", "cache_folder", "record_folder"}


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_environments_are_complete_and_have_jobs_of_their_own(env):
    parameters = read(env)
    groups = {name: kind(**parameters[name]) for name, kind in GROUPS.items()}
    assert make_cells(groups["grid"], groups["data"])
    assert {path.name for path in (ROOT / "conf").iterdir() if any(path.rglob("*"))} == {
        *("base", "local", "test", "gpu", "experiments")
    }
    jobs = [read(other, "globals")["job"] for other in ENVIRONMENTS]
    assert len(jobs) == len(set(jobs)) == len(ENVIRONMENTS)
    assert read(env, "globals")["job"] == (Path(env).name if env != "base" else "main")


def test_an_experiment_changes_the_environment_that_it_extends():
    benchmark, one_kind = read("experiments/benchmark"), read("experiments/one_kind")
    assert one_kind["training"] == benchmark["training"]
    assert one_kind["data"]["pool_size"] == benchmark["data"]["pool_size"] == 4000
    assert list(benchmark["grid"]["settings"]) == ["near+far"]
    assert list(one_kind["grid"]["settings"]) == ["one kind"]
    assert one_kind["data"]["seeds"] == list(range(200, 232))
    few = read("experiments/few_labels")
    assert few["training"] == {**benchmark["training"], "steps": 2000, "unlabelled_ratio": 4}
    assert list(few["grid"]["settings"]) == ["near+far"]


def test_an_experiment_writes_into_folders_of_its_own():
    loader = ExperimentLoader(
        str(ROOT / "conf"), env="experiments/few_labels", **CONFIG_LOADER_ARGS
    )
    assert loader["parameters"]["data"]["source"] == "glyphs"
    assert loader["catalog"]["raw_images"]["filepath"] == "data/01_raw/few_labels/raw_images.npz"


def test_parameters_of_a_run_win_over_those_of_its_experiment():
    arguments = {**CONFIG_LOADER_ARGS, "runtime_params": {"training": {"steps": 7}}}
    for env in ("base", "experiments/benchmark", "experiments/few_labels"):
        loader = ExperimentLoader(str(ROOT / "conf"), env=env, **arguments)
        assert loader["parameters"]["training"]["steps"] == 7
