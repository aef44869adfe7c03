"""What tests of the whole project share: runs of it, and which code depends on which."""

import ast
from functools import cache
from pathlib import Path

from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "weighmatch"


def run_project(folder, *, env="test", names=None, params=None):
    """Run pipelines by name, or the default ones, with their files in `folder`."""
    bootstrap_project(ROOT)
    runtime_params = {"data_folder": str(folder), **(params or {})}
    with KedroSession.create(ROOT, env=env, runtime_params=runtime_params) as session:
        return session.run(pipeline_names=names or ["__default__"])


def load_context(env=None):
    """The project's context, with its catalog and parameters."""
    bootstrap_project(ROOT)
    with KedroSession.create(ROOT, env=env) as session:
        return session.load_context()


def path_of(catalog, name):
    """Where a dataset lies, from the project's folder, or "" if it is no file."""
    description = catalog.get(name)._describe()
    path = Path(str(description.get("filepath", description.get("path", ""))))
    return str(path.relative_to(ROOT)) if path.is_absolute() else str(path)


# --- which code depends on which -------------------------------------------------------------


def file_of(module):
    """The file of a module of this project, or None."""
    place = ROOT / "src" / Path(*module.split("."))
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@cache
def imported(path):
    """The modules that a file imports, also within functions, by their names or for types alone."""
    return list(_imported(path))


def _imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (part.value for part in node.args if isinstance(part, ast.Constant))


def code_behind(*modules):
    """The files of this project that modules depend on, directly or not.

    A package that looks for its modules when it is imported depends on all of them, and a module
    on a template that it names.
    """
    found, waiting = set(), list(modules)
    while waiting:
        module = waiting.pop()
        file = file_of(module)
        if file is None or file in found or file == SOURCE / "__init__.py":
            continue
        found.add(file)
        waiting += imported(file)
        text = file.read_text()
        if "iter_modules(__path__)" in text:
            waiting += [f"{module}.{other.stem}" for other in file.parent.glob("*.py")]
        found |= {other for other in file.parent.glob("*.j2") if other.name in text}
    return found


def as_paths(files):
    """Files as few paths: folders for whole pipelines and for floors that are used as a whole."""
    floors = ("data", "implicit", "io", "semisup", "studies")
    paths = set()
    for file in files:
        floor, *rest = file.relative_to(SOURCE).parts
        if floor in floors:
            paths.add(SOURCE / floor)
        else:
            paths.add(SOURCE / floor / rest[0] if floor == "pipelines" else file)
    return {str(path.relative_to(ROOT)) for path in paths}
