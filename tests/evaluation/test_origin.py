"""How a page says that it was made."""

import subprocess
import sys

from weighmatch.evaluation import origin


def test_command_commit_date_and_versions_are_found(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/kedro/__main__.py", "run", "--env", "a b"])
    found = origin.find_origin()
    assert found.command == "kedro run --env 'a b'"
    monkeypatch.setattr(sys, "argv", ["python -m kedro", "run"])
    assert origin.find_origin().command == "python -m kedro run"
    folder = origin.__file__.rpartition("/")[0]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert found.commit == head.stdout.strip()
    assert found.date.endswith(" UTC")
    assert found.versions["python"] == sys.version.split()[0]
    assert found.versions["weighmatch"]


def test_a_package_outside_of_a_repository_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kedro"])
    for folder in (tmp_path, tmp_path / "not_tracked"):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(origin, "__file__", str(folder / "origin.py"))
        assert origin.find_origin().commit == ""
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert origin.find_origin().command == "kedro"


def test_without_git_the_commit_is_not_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = origin.find_origin()
    assert (found.commit, found.changed) == ("", False)
