"""Mistakes in a command that are told before the project is even read: names, and folders.

A name that does not exist is refused with the nearest one that does.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from kedro.framework.project import settings
from kedro.pipeline import Pipeline
from kedro.utils import find_kedro_project

from weighmatch import pipelines
from weighmatch.checks import find_nearest
from weighmatch.hooks import RefusedError
from weighmatch.pipeline_registry import BY_NAME_ONLY, DEFAULT

Options = Mapping[str, Any]
# How many names an error lists where none is near.
LISTED = 20
# Runtime parameters that Kedro puts into paths of the catalog.
FOLDERS = ("data_folder", "run_folder", "cache_folder")
# What a run of a part of the graph is chosen by: the option, what it names, and all such names.
PARTS: dict[str, tuple[str, str, Callable[[Pipeline], Iterable[str]]]] = {
    "tags": ("--tags", "tag", lambda graph: (tag for node in graph.nodes for tag in node.tags)),
    "node_names": ("--nodes", "node", lambda graph: (node.name for node in graph.nodes)),
    "from_nodes": ("--from-nodes", "node", lambda graph: (node.name for node in graph.nodes)),
    "to_nodes": ("--to-nodes", "node", lambda graph: (node.name for node in graph.nodes)),
    "namespaces": ("--namespaces", "namespace", lambda graph: _namespaces(graph)),
    "from_inputs": ("--from-inputs", "dataset", lambda graph: graph.datasets()),
    "to_outputs": ("--to-outputs", "dataset", lambda graph: graph.all_outputs()),
}


def require_project() -> Path:
    """The folder of the project that the current folder is within.

    Raises:
        RefusedError: if there is none.
    """
    project = find_kedro_project(Path.cwd())
    if project is None:
        raise RefusedError(
            f"{Path.cwd()} is not within a project; go to the folder that holds pyproject.toml "
            "and conf"
        )
    return Path(project)


def require_known(options: Options, project: Path) -> None:
    """Refuse options of `kedro run` that name what does not exist, or folders that cannot be.

    Raises:
        RefusedError: with the nearest name that exists.
    """
    if options.get("env"):
        source = Path(options.get("conf_source") or project / settings.CONF_SOURCE)
        if source.is_dir():  # else an archive, which Kedro unpacks
            _require("--env: there is no environment", options["env"], _environments(source))
    names = [*options.get("pipelines", ()), *filter(None, [options.get("pipeline")])]
    packages = [module.name for module in iter_modules(pipelines.__path__)]
    for name in names:
        _require("--pipelines: there is no pipeline", name, [*packages, DEFAULT])
    if options.get("runner") not in (None, "SequentialRunner"):
        raise RefusedError(
            f"--runner {options['runner']} keeps no records of files; leave it out: "
            "runs.workers says how many runs are trained at a time"
        )
    if any(options.get(part) for part in PARTS):
        _require_parts(options, _graph_of(names or [DEFAULT], packages))
    _require_folders({"data_folder": "data", **(options.get("params") or {})}, project)


def nearest(name: str, known: Collection[str]) -> str:
    """The end of an error about an unknown name: what was most likely meant, or what there is."""
    found = find_nearest(name, known)
    if found is not None:
        return f"did you mean {found}?"
    if len(known) > LISTED:
        return "kedro registry describe lists the nodes, kedro catalog describe-datasets the rest"
    return f"choose from {', '.join(sorted(known))}"


def _require(lack: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise RefusedError(f"{lack} {name!r}; {nearest(name, known)}")


def _require_parts(options: Options, graph: Pipeline) -> None:
    for part, (option, kind, names_of) in PARTS.items():
        known = set(names_of(graph))
        if options.get(part) and not known:
            raise RefusedError(
                f"{option}: the nodes of this project have no {kind}s; choose by --nodes or "
                "--pipelines"
            )
        for name in options.get(part) or ():
            _require(f"{option}: the pipelines of this run have no {kind}", name, known)
    arguments = {part: options.get(part) or None for part in PARTS}
    arguments["node_namespaces"] = arguments.pop("namespaces")
    try:
        graph.filter(**arguments)
    except ValueError as error:
        given = ", ".join(option for part, (option, *_) in PARTS.items() if options.get(part))
        raise RefusedError(
            f"no node is chosen by {given} together; leave one of them out"
        ) from error


def _require_folders(given: Options, project: Path) -> None:
    for name in FOLDERS:
        if name not in given:
            continue
        place = given[name]
        if place is None or not str(place).strip():
            raise RefusedError(
                f"{name} is empty; name a folder, such as {name}=results, or leave it out"
            )
        path = str(project / str(place))
        if isinstance(place, dict | list) or any(brace in path for brace in "{}"):
            raise RefusedError(
                f"{name} must be the path of a folder without braces, which stand for names in "
                f"Kedro's catalog, got {path}; choose another with --params {name}=…"
            )


def _environments(source: Path) -> list[str]:
    files = [*source.rglob("*.yml"), *source.rglob("*.yaml")]
    found = {path.parent.relative_to(source).as_posix() for path in files} - {"."}
    return sorted(found | {"local"})


def _graph_of(names: Iterable[str], packages: Iterable[str]) -> Pipeline:
    chosen = set(names)
    if DEFAULT in chosen:
        chosen |= set(packages) - set(BY_NAME_ONLY)
    modules = [import_module(f"{pipelines.__name__}.{name}") for name in chosen - {DEFAULT}]
    return sum((module.create_pipeline() for module in modules), Pipeline([]))


def _namespaces(graph: Pipeline) -> set[str]:
    found = set()
    for node in graph.nodes:
        parts = (node.namespace or "").split(".")
        found |= {".".join(parts[: end + 1]) for end in range(len(parts))}
    return found - {""}
