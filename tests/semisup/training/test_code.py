"""What the digest of the training code sees: every module that training imports, and no remark."""

import functools
import shutil
import subprocess
import sys

import pytest

from weighmatch import code
from weighmatch.semisup.training.code import ENTRY, training_code
from weighmatch.semisup.weightings import Weighting

# Rooms of the package of which training uses nothing.
FOREIGN = ("pipelines", "studies", "evaluation", "io", "data")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package that the digest reads in the place of the real one."""
    copy = tmp_path / "weighmatch"
    shutil.copytree(code.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", copy)
    # Many digests are taken of almost the same files.
    monkeypatch.setattr(code, "syntax", functools.lru_cache(code.syntax))
    yield copy
    code.code_digest.cache_clear()


def digest():
    code.code_digest.cache_clear()
    return training_code()


def trained_by(package):
    return sorted(code.import_closure(ENTRY))


@pytest.mark.integration
def test_the_digest_is_that_of_the_code_and_not_of_its_place(package, monkeypatch):
    of_copy = digest()
    monkeypatch.undo()
    assert digest() == of_copy
    assert len(of_copy) == 16


@pytest.mark.integration
def test_remarks_and_docstrings_change_nothing(package):
    before = digest()
    files = trained_by(package)
    for path in files:
        text = path.read_text()
        assert text.startswith('"""'), path
        # The docstring of the module, and a comment and empty lines at its end.
        path.write_text(text.replace('"""', '"""Another word. ', 1) + "\n\n# A remark.\n")
    streams = package / "semisup" / "parts" / "streams.py"
    text = streams.read_text()
    # Docstrings of a function, a class and a method.
    for words in ("A 63-bit seed for", "CPU generators by", "Where each stream"):
        assert words in text
        text = text.replace(words, "Other words")
    streams.write_text(text)
    assert digest() == before


@pytest.mark.integration
def test_a_change_of_code_in_any_module_that_training_imports_is_seen(package):
    files = trained_by(package)
    seen = {digest()}
    # All imports are the same: it is enough to look for them once.
    found = code.import_closure(ENTRY)
    closure = code.import_closure
    code.import_closure = lambda entry: found
    try:
        for path in files:
            path.write_text(path.read_text() + "\nADDED = 1\n")
            seen.add(digest())
    finally:
        code.import_closure = closure
    assert len(seen) == len(files) + 1


@pytest.mark.integration
def test_numbers_defaults_and_strings_are_code(package):
    path = package / "semisup" / "config.py"
    before, seen = path.read_text(), {digest()}
    for old, new in (
        ("first_share: float = 0.5", "first_share: float = 0.6"),
        ("MAX_ROUNDS = 100", "MAX_ROUNDS = 99"),
    ):
        assert old in before
        path.write_text(before.replace(old, new))
        seen.add(digest())
    streams = package / "semisup" / "training" / "batches.py"
    streams.write_text(streams.read_text().replace('"unlabelled batches"', '"other batches"'))
    seen.add(digest())
    assert len(seen) == 4


def test_the_modules_of_training_are_found(package):
    found = {str(path.relative_to(package)) for path in trained_by(package)}
    parts = {f"semisup/parts/{path.name}" for path in (package / "semisup/parts").glob("[!_]*.py")}
    assert parts <= found
    weightings = (package / "semisup" / "weightings").glob("[!_]*.py")
    assert {f"semisup/weightings/{path.name}" for path in weightings} <= found
    training = {path.stem for path in (package / "semisup/training").glob("[!_]*.py")}
    # What many runs cost and how they are shared out changes none of them.
    others = {"jobs", "compute", "time_limit", "deadline"}
    others |= {"dividing", "place", "processes", "ray_train"}
    for name in training - others:
        assert f"semisup/training/{name}.py" in found
    used = ("conjugate_gradient", "neumann", "identity", "curvature", "second_order", "spectrum")
    assert {f"implicit/{name}.py" for name in used} <= found
    assert {"arms.py", "checks.py", "semisup/config.py", "semisup/checkpoint.py"} <= found
    assert not [name for name in found if name.split("/")[0] in FOREIGN]


def test_every_weightings_module_is_found(package):
    own = {kind.__module__ for kind in Weighting.registry.values()}
    files = {code._file_of(module) for module in own if module.startswith("weighmatch.")}
    assert len(files) >= 9
    assert files <= code.import_closure(ENTRY)


@pytest.mark.integration
def test_a_new_weightings_module_is_found(package):
    before = digest()
    new = package / "semisup" / "weightings" / "new.py"
    new.write_text('"""A new one."""\nfrom weighmatch.semisup.parts.fresh import x\n')
    fresh = package / "semisup" / "parts" / "fresh.py"
    fresh.write_text("x = 1\n")
    after = digest()
    fresh.write_text("x = 2\n")
    assert len({before, after, digest()}) == 3


@pytest.mark.integration
def test_what_training_never_imports_is_not_seen(package):
    before = digest()
    for room in FOREIGN:
        for path in (package / room).rglob("*.py"):
            path.write_text("raise SystemExit\n")
    for name in ("settings.py", "hooks.py", "cli.py", "implicit/chebyshev.py", "implicit/exact.py"):
        (package / name).write_text("raise SystemExit\n")
    for name in ("jobs", "compute"):
        (package / "semisup" / "training" / f"{name}.py").write_text("raise SystemExit\n")
    assert digest() == before


@pytest.mark.integration
def test_nothing_that_python_imports_for_training_is_missed():
    """Of what is really loaded, only modules that a package's `__init__` brings along are left."""
    script = (
        "import sys, weighmatch.semisup.training.schedules\n"
        "print(*(m for m in sys.modules if m.startswith('weighmatch.semisup.')))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    files = {code._file_of(module) for module in run.stdout.split()}
    modules = {path for path in files if path.name != "__init__.py"}
    assert len(modules) > 25
    assert modules <= code.import_closure(ENTRY)


@pytest.mark.integration
def test_imports_for_types_alone_do_not_count(package):
    before = len(code.import_closure(ENTRY))
    path = package / "semisup" / "parts" / "losses.py"
    text = path.read_text()
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import weighmatch.cli\n"
    path.write_text(text + guarded)
    assert len(code.import_closure(ENTRY)) == before
    path.write_text(text + "def later():\n    import weighmatch.cli\n")
    assert package / "cli.py" in code.import_closure(ENTRY)
