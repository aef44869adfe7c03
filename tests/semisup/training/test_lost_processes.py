"""What is told when a process of a training is lost or fails, and by which process."""

import importlib
import logging
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from tests.project import ROOT
from weighmatch.checks import ToldError
from weighmatch.semisup.parts.group import GroupError
from weighmatch.semisup.training.dividing import LAUNCHED
from weighmatch.semisup.training.jobs import Job, _fit, kept_steps
from weighmatch.semisup.training.place import GLOO, NCCL, Place, choose_backend, own_gpu
from weighmatch.semisup.training.processes import Team, launched, together

HERE = "tests.semisup.training.test_lost_processes"


def exchange(times, group):
    for _ in range(times):
        group.sum(torch.ones(10))
        time.sleep(0.01)


def call(function, *arguments, processes=2):
    with together(processes, "cpu") as team:
        team.also(function, *arguments)
        function(*arguments, team.group)


def exchange_and_die(victim, group):
    exchange(5, group)
    if group.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    exchange(100, group)


@pytest.mark.integration
@pytest.mark.parametrize("victim", [1, 2])
def test_of_three_processes_the_one_that_was_killed_is_told(victim):
    with pytest.raises(GroupError, match=r"one of the 3 processes .* was ended by SIGKILL"):
        call(exchange_and_die, victim, processes=3)


class Unreadable:
    """An argument whose file another process does not see."""

    def __reduce__(self):
        return open, ("/nowhere/pool.npy",)


ERRORS = [ToldError("w.pt is missing; copy it"), ValueError("odd\nand long"), RuntimeError("torch")]


def fail(error, group):
    exchange(2, group)
    if group.rank == 1:
        raise pickle.loads(error)
    exchange(500, group)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ERRORS[0], r"^w\.pt is missing; copy it \(told by process 2 of the 2 .*\)\nThere:"),
        (ERRORS[1], r"^process 2 of the 2 .* has failed: ValueError: odd; start the same command"),
        (ERRORS[2], r"^process 2 of the 2 .* has failed: RuntimeError: torch; start"),
    ],
)
def test_what_another_process_fails_of_is_told(error, told, capfd):
    with pytest.raises(GroupError, match=told) as caught:
        call(fail, pickle.dumps(error))
    assert "in fail\n" in caught.value.__notes__[0]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.integration
def test_arguments_that_another_process_cannot_read_are_told():
    told = r"process 2 of the 2 .* FileNotFoundError: .*/nowhere/pool\.npy"
    with pytest.raises(GroupError, match=told):
        call(exchange_or_read, 100, Unreadable())


def exchange_or_read(times, _, group):
    exchange(times, group)


def warn(group):
    logging.getLogger("weighmatch").warning("said by process %d", group.rank)
    warnings.warn(f"warned by process {group.rank}", stacklevel=1)
    print(f"process {group.rank} was here", file=sys.stderr)


@pytest.mark.integration
def test_the_first_process_alone_warns(capfd):
    with pytest.warns(UserWarning, match="warned by process 0"):
        call(warn)
    written = capfd.readouterr().err
    assert "process 1 was here" in written
    assert "by process 1" not in written


def kill_children():
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)


def lose_a_child_at_the_start():
    join = Team.join

    def kill_and_join(self, device):
        kill_children()
        join(self, device)

    Team.join = kill_and_join
    call(exchange, 1)


def lose_a_child_by_nccl():
    """The operation in which this process waits does not end when the other one is lost."""
    with together(2, "cpu") as team:
        team.also(exchange, 1)
        exchange(1, team.group)
        dist.get_backend_config = lambda: "cuda:nccl"
        kill_children()
        time.sleep(100)


def command(function, *launcher, arguments=""):
    """A process that calls a function of this module."""
    source = f"from {HERE} import {function}; {function}({arguments})"
    return subprocess.Popen(
        [sys.executable, *launcher, "-c", source],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.integration
@pytest.mark.parametrize("function", ["lose_a_child_at_the_start", "lose_a_child_by_nccl"])
def test_a_process_that_would_wait_for_a_lost_one_ends(function):
    process = command(function)
    _, written = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in written
    assert written.startswith("Error: one of the 2 processes of this training was ended by SIGKILL")


def work_under_torchrun(calls):
    """A stand-in for the command: each attempt makes a call of its own in all processes, twice."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    name, *arguments = calls[attempt]
    try:
        with launched() as leads:
            if leads:
                call(globals()[name], *arguments)
                # The other one looks for the next order, and must find none of an attempt before.
                time.sleep(1)
                call(globals()[name], *arguments)
                print("done in attempt", attempt)
    except GroupError as error:
        sys.exit(f"Error: {error}")


def torchrun(tmp_path, calls, *options):
    """Start two processes of `torchrun`."""
    script = tmp_path / "script.py"
    script.write_text(f"from {HERE} import work_under_torchrun\nwork_under_torchrun({calls})\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    return subprocess.run(
        [*command, str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.integration
@pytest.mark.parametrize(
    ("made", "told"),
    [
        (("exchange_and_die", 0), "one of the 2 processes|torchrun has ended the 2 processes"),
        (("exchange_and_die", 1), "one of the 2 processes|torchrun has ended the 2 processes"),
        (("fail", pickle.dumps(ERRORS[0])), "w.pt is missing; copy it"),
    ],
)
def test_under_torchrun_one_process_tells(made, told, tmp_path):
    done = torchrun(tmp_path, [made], "--standalone")
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert re.match(f"Error: ({told})", sentence)


@pytest.mark.slow
def test_a_restart_by_torchrun_knows_nothing_of_the_attempt_before(tmp_path):
    options = ["--max-restarts", "1", "--rdzv-backend", "static", "--nnodes", "1"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    done = torchrun(tmp_path, [("exchange_and_die", 1), ("exchange", 5)], *options)
    assert done.returncode == 0, done.stderr
    assert "done in attempt 1" in done.stdout


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_processes_talk_by_nccl_where_each_has_a_gpu():
    # On Slurm a process often sees its own GPU alone, as number 0.
    assert choose_backend(["a GPU-1", "a GPU-2", "b GPU-1"]) == NCCL
    assert choose_backend(["a GPU-1", "a GPU-1", "b GPU-1"]) == GLOO
    assert choose_backend(["a GPU-1", "b"]).startswith("process 2 of the 2 of this training, on b,")


def test_a_process_without_a_gpu_is_told_by_all(monkeypatch):
    store = HashStore()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    store.set("gpu 1", "b GPU-1")
    for rank in range(2):
        with pytest.raises(ToldError, match=r"process 1 of the 2 .* sees no GPU, and others"):
            Place(store, rank, 2).join("cuda")


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def fit_and_die(job, folder, module, name, group):
    """Fit, and be killed in the second process where it calls a function."""
    if group.rank:
        where = importlib.import_module(f"weighmatch.semisup.{module}")
        owner, _, attribute = name.rpartition(".")
        setattr(getattr(where, owner) if owner else where, attribute, die)
    _fit(job, folder, group)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("training.loop", "fit_to_data"),
        ("training.ranking", "fit_head"),
        ("weightings.meter", "InfluenceMeter.measure_at"),
    ],
)
def test_a_run_goes_on_wherever_a_process_was_killed(
    module, name, training_set, run_config, tmp_path
):
    config = run_config(steps=20, schedule="rounds", rounds=2)
    job = Job("killed", "seed_0", config, training_set, 1.0)
    with pytest.raises(GroupError, match="SIGKILL"):
        call(fit_and_die, job, tmp_path, module, name)
    assert kept_steps(job, tmp_path) == (0 if name == "fit_to_data" else 10)
    call(_fit, job, tmp_path)
    assert kept_steps(job, tmp_path) == 20


def test_a_process_takes_the_gpu_of_its_place(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="u"))
    assert own_gpu(3).endswith(" u")
    # Elsewhere than under torchrun the variable is somebody else's.
    monkeypatch.setenv("LOCAL_RANK", "0")
    own_gpu(1)
    monkeypatch.setenv(LAUNCHED, "x")
    own_gpu(1)
    assert taken == [1, 1, 0]
