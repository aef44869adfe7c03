"""Digests of code: what was computed by other code is not taken for what this code computes."""

import ast
import hashlib
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parent


@lru_cache
def code_digest(module: str) -> str:
    """Identify the code of a module, of all that it imports of this package, and torch's version.

    Comments, docstrings and layout do not count: syntax trees are hashed. The code counts as it is
    when it is first asked for.

    Args:
        module: its full name, such as "weighmatch.studies.ihvp".

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(version("torch").encode())
    for path in sorted(import_closure(module)):
        digest.update(f"{path.relative_to(PACKAGE)} {syntax(path.read_text('utf-8'))}".encode())
    return digest.hexdigest()[:16]


def syntax(source: str) -> str:
    """The syntax tree of a module as text, without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def import_closure(module: str) -> set[Path]:
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
        if path.name == "__init__.py":
            if "pkgutil" in ast.dump(tree):
                files = path.parent.glob("[!_]*.py")
                waiting += [(f"{entry[0]}.{file.stem}", "") for file in files]
            home = _home_of(tree, entry[1]) if entry[1] else None
            if home is not None:
                waiting.append(home)
                continue
        found.add(path)
        waiting += _imports(tree)
    return found


def _file_of(module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    place = PACKAGE.joinpath(*parts[1:])
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
