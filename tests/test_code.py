"""What a digest of code depends on."""

from pathlib import Path

import pytest

from weighmatch import code
from weighmatch.code import code_digest, import_closure


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a package and gives the digest of its module `main`."""
    root = tmp_path / "weighmatch"
    monkeypatch.setattr(code, "PACKAGE", root)

    def digest(modules):
        for name, text in modules.items():
            path = root / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        code_digest.cache_clear()
        return code_digest("weighmatch.main")

    yield digest
    code_digest.cache_clear()


def test_it_follows_imports_into_folders_and_nothing_else(package):
    main = "from weighmatch.room.part import x\n"
    first = package({"main": main, "room/part": "x = 1\n", "aside": "y = 1\n"})
    assert package({"aside": "y = 2\n"}) == first
    assert package({"room/part": "x = 2\n"}) != first


def test_comments_docstrings_and_layout_do_not_count(package):
    first = package({"main": "def f(x):\n    return x + 1\n"})
    text = '"""Says it."""\n# why\ndef f( x ):\n    """Adds."""\n    return x+1\n'
    assert package({"main": text}) == first
    assert package({"main": "def f(x):\n    return x + 2\n"}) != first


def test_a_package_that_looks_for_its_modules_counts_with_all_of_them(package):
    main = "import weighmatch.room\n"
    first = package({"main": main, "room/__init__": "import pkgutil\n", "room/one": "a = 1\n"})
    assert package({"room/one": "a = 2\n"}) != first


def test_the_closure_of_a_study_has_what_it_computes_with():
    files = {
        path.relative_to(code.PACKAGE)
        for path in import_closure("weighmatch.studies.meta_learning")
    }
    assert {
        Path("studies/iml/hypergradients.py"),
        Path("studies/problems/distillation.py"),
        Path("implicit/kfac.py"),
        Path("semisup/parts/losses.py"),
    } <= files
    assert not any(path.parts[0] in ("pipelines", "evaluation", "io") for path in files)
