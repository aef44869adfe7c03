"""The floors of the project: imports point down only, and all but the top work without Kedro."""

import subprocess
import sys

import pytest

from tests.project import SOURCE, imported

# What each floor may import of the project, itself aside. Those that are missing here stand on
# top: they may import everything, and nothing may import them.
FLOORS = {
    "checks": set(),
    "extras": {"checks"},
    "code": set(),
    "workers": {"checks"},
    "engine_config": {"checks", "extras"},
    "ray_cluster": {"workers"},
    "ray_engine": {"engine_config", "ray_cluster", "workers"},
    "arms": {"checks"},
    "implicit": {"checks"},
    "data": {"checks", "engine_config", "extras", "workers"},
    "semisup": {
        *("checks", "extras", "arms", "code", "workers", "implicit"),
        *("engine_config", "ray_cluster", "ray_engine"),
    },
    "studies": {"checks", "arms", "code", "workers", "implicit", "data", "semisup"},
    # Of the studies evaluation reads the rows of their methods, which import no torch.
    "evaluation": {"checks", "arms", "data", "studies"},
    "export": {"semisup"},
    "shards": {"checks", "code", "data", "export", "semisup"},
    "streaming": {
        *("checks", "data", "engine_config", "evaluation", "ray_engine", "semisup", "shards"),
    },
    "own_images": {"arms", "data", "evaluation", "export", "semisup", "streaming"},
    "io": {"checks", "semisup"},
}
READ_BY_EVALUATION = ("weighmatch.studies.methods",)
WITHOUT_TORCH = ("checks", "extras", "engine_config", "ray_engine", "arms", "data", "evaluation")
ROOMS = {
    # Within semisup: parts know no weighting, weightings no training.
    "semisup.parts": {"semisup.config", "semisup.parts"},
    "semisup.weightings": {"semisup.config", "semisup.parts", "semisup.weightings"},
}


def files_of(floor):
    place = SOURCE.joinpath(*floor.split("."))
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


@pytest.mark.parametrize("floor", sorted(FLOORS))
def test_imports_point_down_only(floor):
    for path in files_of(floor):
        for module in imported(path):
            top, _, rest = module.partition(".")
            if top == "weighmatch" and rest:
                assert rest.split(".")[0] in FLOORS[floor] | {floor}, (path.name, module)
            if floor == "evaluation" and module.startswith("weighmatch.studies"):
                assert module.startswith(READ_BY_EVALUATION), (path.name, module)
            if floor != "io":
                assert top not in ("kedro", "kedro_datasets"), (path.name, module)
            if floor in WITHOUT_TORCH:
                assert top != "torch", (path.name, module)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_of_semisup_know_only_those_below(room):
    for path in files_of(room):
        for module in imported(path):
            if module.startswith("weighmatch.semisup."):
                known = [f"weighmatch.{other}" for other in ROOMS[room]]
                assert module.startswith(tuple(known)), (path.name, module)


def test_every_floor_has_its_place():
    there = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    top = {
        "__init__",
        "__main__",
        "cli",
        "graph",
        "hooks",
        "keeping",
        "mistakes",
        "settings",
        "terminal",
        "pipeline_registry",
        "pipelines",
    }
    assert there == top | set(FLOORS)


@pytest.mark.integration
def test_floors_work_without_kedro():
    floors = ("implicit", "data", "semisup", "studies", "evaluation")
    names = [
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        for floor in floors
        for path in files_of(floor)
    ]
    assert len(names) > 50
    code = (
        "import importlib, sys\n"
        "sys.modules['kedro'] = sys.modules['kedro_datasets'] = None\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
