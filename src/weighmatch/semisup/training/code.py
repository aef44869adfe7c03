"""What code trains a run: the modules that training imports, without comments and docstrings."""

import ast
import functools
import hashlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

PACKAGE = "weighmatch"
ROOT = Path(__file__).parents[2]
# Training starts from this module; weightings and networks are found by their registries.
ENTRY = f"{PACKAGE}.semisup.training.schedules"


def code_digest() -> str:
    """Identifies the code that trains and the version of torch; 16 hexadecimal digits.

    It hashes syntax trees without docstrings, so that a comment invalidates no checkpoint, of the
    modules that training really imports.
    """
    digest = hashlib.sha256(torch.__version__.encode() + _own_code().encode())
    for source in _foreign_sources():
        digest.update(_syntax(source).encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def _own_code() -> str:
    """The syntax of this package's modules; as it was when first asked for."""
    return "".join(
        f"{path.relative_to(ROOT)} {_syntax(path.read_text('utf-8'))}"
        for path in sorted(imported_files(ENTRY))
    )


def _foreign_sources() -> Iterator[str]:
    """Modules outside of the package that define a weighting, as far as Python knows them."""
    base = sys.modules.get(f"{PACKAGE}.semisup.weightings.base")
    if base is None:
        return
    modules = {kind.__module__ for kind in base.Weighting.registry.values()}
    for name in sorted(name for name in modules if name.partition(".")[0] != PACKAGE):
        try:
            yield inspect.getsource(sys.modules[name])
        except (KeyError, OSError, TypeError):
            continue


def _syntax(source: str) -> str:
    """The syntax tree of a module as text, without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def imported_files(module: str) -> set[Path]:
    """The files of this package that a module imports, itself included, at any depth.

    A name that a package's `__init__` takes from one of its modules leads to that module alone. A
    package that imports all of its modules by `pkgutil` leads to all of them.
    """
    found: set[Path] = set()
    waiting = [(module, "")]
    seen = set()
    while waiting:
        entry = waiting.pop()
        if entry in seen:
            continue
        seen.add(entry)
        path = _file_of(entry[0])
        if path is None:
            continue
        tree = ast.parse(path.read_text("utf-8"))
        home = _home_of(tree, entry[1]) if path.name == "__init__.py" and entry[1] else None
        if home is not None:
            waiting.append(home)
            continue
        found.add(path)
        waiting += _imports(tree)
        if path.name == "__init__.py" and "pkgutil" in ast.dump(tree):
            waiting += [(f"{entry[0]}.{file.stem}", "") for file in path.parent.glob("[!_]*.py")]
    return found


def _file_of(module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return None
    place = ROOT.joinpath(*parts[1:])
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.exists()), None)


def _imports(tree: ast.Module) -> list[tuple[str, str]]:
    """Modules and the names that are taken from them; imports for types alone do not count."""
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner, "") if _file_of(inner) else (node.module, alias.name))
    return found


def _home_of(tree: ast.Module, name: str) -> tuple[str, str] | None:
    """Where a package's `__init__` takes a name from, or None."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if name in (alias.asname, alias.name):
                    return node.module, alias.name
    return None
