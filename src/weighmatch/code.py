"""Digests of code: what was computed by other code is not taken for what this code computes."""

import ast
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parent


@lru_cache
def code_digest(module: str) -> str:
    """Identify the code of a module, of all that it imports of this package, and torch's version.

    Comments, docstrings and layout do not count. A package that looks for its modules with
    `pkgutil` counts with all of them.

    Args:
        module: its full name, such as "weighmatch.studies.ihvp".

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(version("torch").encode())
    for path in sorted(import_closure(module)):
        digest.update(str(path.relative_to(PACKAGE)).encode())
        digest.update(ast.dump(_without_docstrings(ast.parse(path.read_text()))).encode())
    return digest.hexdigest()[:16]


def import_closure(module: str) -> set[Path]:
    """The files of this package that are read when `module` is imported, its own included."""
    found: set[Path] = set()
    waiting = list(_files(module))
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        names = set(_imported(ast.parse(path.read_text())))
        for name in names:
            waiting += _files(name)
        if "pkgutil" in names:
            waiting += path.parent.glob("*.py")
    return found


def _files(module: str) -> Iterator[Path]:
    """The file of a module of this package, and those of the packages that it lies in."""
    first, *parts = module.split(".")
    if first != PACKAGE.name:
        return
    for depth in range(len(parts) + 1):
        place = PACKAGE.joinpath(*parts[:depth])
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                yield path


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names of modules that the code imports, and of what it imports from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree
