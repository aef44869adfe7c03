"""The command of the project, where several processes train each run together."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.project import ROOT
from tests.semisup.training.test_processes import assert_close
from weighmatch.semisup.parts.state_file import read_state
from weighmatch.semisup.training.loop import CHECKPOINT


def start(tmp_path, *command, **params):
    """Start a short training of the whole project in double precision, `command` before it."""
    settings = {
        "data_folder": tmp_path,
        "training.precision": "float64",
        "runs.arms": "[fixmatch,learned]",
        "data.seeds": "[0]",
        **params,
    }
    given = ",".join(f"{name}={value}" for name, value in settings.items())
    options = ["--env", "test", "--params", given]
    options += ["--pipelines", "data_preparation,feature_extraction,training"]
    return subprocess.Popen(
        [sys.executable, *command, "-m", "weighmatch", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_torchrun_ends_where_one_process_does(tmp_path):
    for name, command in (("one", []), ("two", TORCHRUN)):
        process = start(tmp_path / name, *command)
        _, written = process.communicate()
        assert process.returncode == 0, written
    found = sorted((tmp_path / "one").rglob("run.pt"))
    assert len(found) == 2
    for path in found:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert_close(read_state(path), read_state(other), path.parent.name)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], TORCHRUN])
def test_a_command_ends_with_one_sentence_when_a_process_is_killed(launcher, tmp_path):
    count = {} if launcher else {"runs.processes": 2}
    process = start(tmp_path, *launcher, **{**count, "training.steps": 20_000})
    while not list(tmp_path.rglob(CHECKPOINT)):
        assert process.poll() is None
        time.sleep(0.2)
    sign = "RANK=1" if launcher else "spawn_main"
    (child,) = [pid for pid in children_of(process.pid) if sign in words_of(pid)]
    os.kill(child, signal.SIGKILL)
    _, written = process.communicate(timeout=60)
    assert process.returncode == 1
    told = [line for line in written.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1, written
    assert "goes on from its last checkpoint" in told[0]
    if not launcher:  # torchrun adds a report of its own
        assert "Traceback" not in written
        assert "one of the 2 processes of this training was ended by SIGKILL" in told[0]


def children_of(pid):
    """The processes that a process has started, on Linux."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def words_of(pid):
    """The command and the environment of a process, on Linux."""
    both = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
    return [word for part in both for word in re.split(r"[\0 (]", part.decode())]
