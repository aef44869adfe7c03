"""Runs and rankings on a cluster of two nodes on this machine; workers and a node are killed."""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.ray_nodes import Reaper, die_now_and_then, have_both, start_nodes
from tests.semisup.helpers import arrays_of, same
from tests.test_workers import (
    die_at_first,
    fail_or_wait,
    fill_memory,
    is_alive,
    raise_unsendable,
    square,
    wait_for,
)
from weighmatch import extras, ray_cluster, ray_engine
from weighmatch.data.rank_config import RankConfig
from weighmatch.engine_config import EngineConfig
from weighmatch.semisup.config import RunsConfig
from weighmatch.semisup.training import jobs as training_jobs
from weighmatch.semisup.training.jobs import finish_jobs, kept_steps, plan_jobs, read_job
from weighmatch.semisup.training.loop import Run
from weighmatch.workers import WorkerError

pytestmark = pytest.mark.integration

started = pytest.fixture(scope="module")(start_nodes)
nodes = pytest.fixture(have_both)

RAY = EngineConfig(engine="ray")


# --- many runs -----------------------------------------------------------------------------------


def train_and_die(job, folder, kept, ends, mark, team, progress):
    marks = folder.parent / "marks"
    with (marks / job.name).open("a") as file:
        file.write(f"{kept_steps(job, folder)}\n")
    done = []

    def report(units):
        done.append(units)
        if sum(done) > job.cost / 2:
            die_now_and_then(marks)
        progress(units)

    return TRAIN(job, folder, kept, ends, mark, team, report)


TRAIN = training_jobs._train


@pytest.fixture
def planned(training_set, run_config):
    """Six runs: two arms on three seeds."""
    sets = {f"seed_000{seed}": arrays_of(training_set) for seed in range(3)}
    runs = RunsConfig(schedule="online")
    return plan_jobs(("fixmatch", "learned"), sets, run_config().training, runs)


def test_runs_are_those_of_one_machine_though_a_worker_and_a_node_die(
    nodes, planned, tmp_path, monkeypatch, caplog
):
    reaper = Reaper(nodes, tmp_path / "marks")
    monkeypatch.setattr(training_jobs, "_train", train_and_die)
    monkeypatch.setattr(ray_engine, "LARGE", 1)
    assert len(finish_jobs(planned, tmp_path / "ray", engine=RAY)) == 6
    reaper.assert_both_died()
    told = [record.getMessage() for record in caplog.records]
    assert any("a worker process was ended" in line and "(1 of 2 times)" in line for line in told)
    assert "training: a machine is lost; its job goes on elsewhere" in told
    # Both runs that died went on from a checkpoint.
    begun = [list(map(int, path.read_text().split())) for path in (tmp_path / "marks").glob("*-*")]
    assert sorted(map(len, begun)) == [1, 1, 1, 1, 2, 2]
    assert all(steps[0] == 0 and steps[-1] >= 10 for steps in begun if len(steps) == 2)
    monkeypatch.setattr(training_jobs, "_train", TRAIN)
    finish_jobs(planned, tmp_path / "local", 1)
    monkeypatch.setattr(Run, "train_steps", lambda *_: pytest.fail("trained again"))
    for job in planned:
        assert same(read_job(job, tmp_path / "ray"), read_job(job, tmp_path / "local"))
    assert not list((tmp_path / "ray").glob(".seen-*"))


def train_elsewhere(job, folder, kept, ends, mark, team, progress):
    place, unseen = folder.parent / "elsewhere", mark.parent / "none"
    return TRAIN(job, place, kept, ends, unseen, team, progress)


def test_a_machine_with_a_folder_of_its_own_sends_the_run_back(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(training_jobs, "_train", train_elsewhere)
    finish_jobs(planned[:1], tmp_path / "runs", 1)
    monkeypatch.setattr(Run, "train_steps", lambda *_: pytest.fail("trained again"))
    there, here = (read_job(planned[0], tmp_path / name) for name in ("elsewhere", "runs"))
    assert same(there, here)


def sum_of(images, number, progress):
    progress(1)
    return int(images.sum()) + number


def test_an_array_of_many_jobs_is_sent_once(nodes, monkeypatch):
    ray = ray_cluster.connect()
    put, sent = ray.put, []
    monkeypatch.setattr(ray, "put", lambda value: sent.append(value) or put(value))
    images = np.ones((300, 1, 16, 16), np.uint8)
    calls = [(images[:], number) for number in range(5)]
    answers = dict(ray_engine.run_all(sum_of, calls, title="sums", total=5))
    assert answers == {number: images.size + number for number in range(5)}
    assert len(sent) == 1


def test_answers_progress_and_errors_are_those_of_processes(nodes, tmp_path, capsys):
    jobs = [(number,) for number in (5, 3, 4, 1)]
    answers = dict(ray_engine.run_all(square, jobs, title="squares", total=20, done=7))
    assert {place: answer[0] for place, answer in answers.items()} == {0: 25, 1: 9, 2: 16, 3: 1}
    assert {answer[2] for answer in answers.values()} == {1}
    assert "squares: 100 % " in capsys.readouterr().err
    with pytest.raises(FloatingPointError, match="the loss of seed 3 is not finite") as caught:
        list(
            ray_engine.run_all(
                fail_or_wait, [(tmp_path, False), (tmp_path, True)], title="runs", total=2
            )
        )
    assert "in fail_or_wait" in caught.value.__notes__[0]
    # The worker that said so waits for more, and that of the other job is gone.
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert wait_for(lambda: sum(map(is_alive, pids)) == 1)
    with pytest.raises(RuntimeError, match="UnsendableError: 1 of 2"):
        list(ray_engine.run_all(raise_unsendable, [()], title="runs", total=1))
    with pytest.raises(WorkerError, match=r"^runs: memory ran out; free memory or set fewer"):
        list(ray_engine.run_all(fill_memory, [("torch",)], title="runs", total=1))


def test_a_job_that_ends_its_worker_again_and_again_is_one_sentence(nodes, tmp_path):
    with pytest.raises(WorkerError, match=r"^runs: a worker process was ended .*, 3 times at the"):
        list(ray_engine.run_all(die_at_first, [(tmp_path, 0, 3)], title="runs", total=3))


def test_more_than_any_machine_has_is_one_sentence(nodes):
    with pytest.raises(WorkerError, match=r"no machine of the cluster has 1 CPUs and 0.5 GPUs"):
        list(ray_engine.run_all(square, [(1,)], title="squares", total=1, num_gpus=0.5))
    assert ray_cluster.count_workers(0.5) == 4


def test_skipped_jobs_are_not_begun(nodes):
    found = ray_engine.run_all(
        square, [(1,), (2,), (3,)], title="squares", total=4, skips=lambda place: place == 1
    )
    assert {place for place, _ in found} == {0, 2}


RUNNERS = pytest.mark.parametrize("runner", ["run_all", "run_in_pool"])


@RUNNERS
def test_a_machine_with_other_versions_is_told_of(runner, nodes, monkeypatch):
    monkeypatch.setattr(ray_cluster, "versions", lambda: {"WeighMatch": "9.9", "torch": "9.9"})
    with pytest.raises(WorkerError, match=r"has WeighMatch .*, and that of the command has 9.9; "):
        list(getattr(ray_engine, runner)(square, [(1,)], title="squares", total=1))


def cannot_begin(*_):
    raise ImportError("No module named 'weighmatch'")


def test_a_machine_that_cannot_begin_is_one_sentence(nodes, monkeypatch):
    monkeypatch.setattr(ray_engine, "_work", cannot_begin)
    with pytest.raises(
        WorkerError, match=r"cannot run WeighMatch \(.*No module named 'weighmatch'"
    ):
        list(ray_engine.run_all(square, [(1,)], title="squares", total=1))


def warn_and_double(number, progress):
    warnings.warn("the number is odd; take another", stacklevel=1)
    logging.getLogger("weighmatch").warning("%d is doubled", number)
    logging.getLogger("weighmatch").info("which nobody asks about")
    return 2 * number


@RUNNERS
def test_warnings_of_jobs_are_told_once(runner, nodes, caplog):
    jobs = [(3,), (5,), (3,)]
    found = getattr(ray_engine, runner)(warn_and_double, jobs, title="doubles", total=3)
    assert sorted(found) == [(0, 6), (1, 10), (2, 6)]
    told = [record.getMessage() for record in caplog.records]
    assert sorted(told) == ["3 is doubled", "5 is doubled", "the number is odd; take another"]


def report_and_wait(mark, progress):
    progress(1)
    time.sleep(1.1)
    progress(1)
    return wait_for(mark.exists, 60)


@RUNNERS
def test_the_bar_moves_while_a_job_is_under_way(runner, nodes, tmp_path, monkeypatch):
    move, mark = ray_engine._Progress._move, tmp_path / "mark"

    def see(progress, position, units):
        mark.touch()
        move(progress, position, units)

    monkeypatch.setattr(ray_engine._Progress, "_move", see)
    found = getattr(ray_engine, runner)(report_and_wait, [(mark,)], title="waits", total=2)
    assert dict(found) == {0: True}


def test_progress_that_cannot_be_noted_ends_no_job(nodes, monkeypatch):
    def fail():
        raise ConnectionError("the store is gone")

    monkeypatch.setattr(ray_engine, "_notes", fail)
    monkeypatch.setattr(ray_engine, "REPORT_INTERVAL", -1)
    monkeypatch.setattr(ray_engine, "LOOK_INTERVAL", 0.01)
    ray_engine._Report("a job").add(1)
    answers = dict(ray_engine.run_all(square, [(3,)], title="squares", total=3))
    assert answers[0][0] == 9


@pytest.mark.slow
def test_a_pool_is_given_its_jobs_in_waves(nodes, monkeypatch):
    monkeypatch.setattr(ray_engine, "WAVE", 2)
    jobs = [(number,) for number in range(3)]
    found = ray_engine.run_in_pool(square, jobs, title="squares", total=3)
    assert {place: answer[0] for place, answer in found} == {0: 0, 1: 1, 2: 4}


@pytest.mark.slow
def test_a_job_that_ends_its_actor_again_and_again_is_one_sentence(nodes, tmp_path):
    with pytest.raises(WorkerError, match=r"^an actor was ended 3 times at the same job"):
        list(ray_engine.run_in_pool(die_at_first, [(tmp_path, 0, 9)], title="scores", total=3))


def test_errors_in_an_actor_are_those_of_processes(nodes):
    with pytest.raises(RuntimeError, match="UnsendableError: 1 of 2"):
        list(ray_engine.run_in_pool(raise_unsendable, [()], title="scores", total=1))


# --- without a cluster ---------------------------------------------------------------------------


def test_ray_is_asked_for_by_name_and_told_of_where_it_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"runs.engine 'dask' is unknown; choose from local, ray"):
        RunsConfig(engine="dask")
    with pytest.raises(ValueError, match=r"runs.num_cpus must be a number above 0"):
        RunsConfig(num_cpus=0)
    assert RunsConfig(engine="ray", num_gpus=0.25).num_gpus == 0.25
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for group, config in (("runs", RunsConfig), ("rank", RankConfig)):
        with pytest.raises(ValueError, match=f"{group}.engine 'ray' needs .* the extra ray"):
            config(engine="ray")


def test_ray_is_not_imported_where_it_is_not_used():
    code = (
        "import sys\n"
        "from weighmatch import ray_engine\n"
        "from weighmatch.engine_config import EngineConfig\n"
        "assert ray_engine.make_engine(EngineConfig()).count() >= 1\n"
        "sys.exit('ray' in sys.modules or 'torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def what_is_told_of(address):
    """The sentence that a process ends with that connects to a cluster at this address."""
    code = (
        "from weighmatch import ray_cluster\n"
        "ray_cluster.JOIN_WAIT = 10\n"
        "try:\n"
        "    ray_cluster.connect()\n"
        "except ray_cluster.WorkerError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(Path("src"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_an_address_without_a_cluster_is_one_sentence():
    told = what_is_told_of("127.0.0.1:1").stdout
    assert told.startswith("no cluster of Ray answers at RAY_ADDRESS 127.0.0.1:1; start")
    told = what_is_told_of("garbage").stdout
    assert told.startswith("Ray does not connect to the cluster garbage (Invalid address format")


@pytest.mark.slow
def test_an_address_of_something_else_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as other:  # which never says a word
        told = what_is_told_of(f"127.0.0.1:{other.getsockname()[1]}").stdout
    assert "could be joined or started within 10 seconds; see whether RAY_ADDRESS" in told


GUARDED = """
import sys
from weighmatch.ray_cluster import ENVIRONMENT
import os; os.environ.update(ENVIRONMENT)
from ray.cluster_utils import Cluster
head = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""

FOUND = """
from tests.test_workers import square
from weighmatch import ray_engine
print(dict(ray_engine.run_all(square, [(3,)], title="squares", total=3))[0][0])
"""


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_gets_it(tmp_path):
    place = tmp_path / ".ray" / "auth_token"
    place.parent.mkdir()
    place.write_text("0" * 64)
    # The paths of sockets must not be long.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as folder:
        home = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": "src:.", "RAY_TMPDIR": folder}
        home.pop("RAY_ADDRESS", None)
        guarded, command = {**home, "RAY_AUTH_MODE": "token"}, [sys.executable, "-c", GUARDED]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=guarded, **pipes) as cluster:
            address = next(line for line in cluster.stdout if ":" in line).strip()
            Path(folder, ray_cluster.LATEST).write_text(address)
            command = [sys.executable, "-c", FOUND]
            done = subprocess.run(command, env=home, capture_output=True)
            cluster.stdin.close()
    assert done.stdout.strip() == b"9", done.stderr.decode()


OWN = """
import time
from weighmatch import ray_cluster
ray_cluster.begin_to_connect()
before = ray_cluster.connect().nodes()[0]["NodeID"]
time.sleep(2)
"""


def test_a_cluster_that_is_started_here_lives_until_the_command_ends(tmp_path):
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as folder:
        home = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": "src:.", "RAY_TMPDIR": folder}
        home.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", OWN + FOUND]
        done = subprocess.run(command, env=home, capture_output=True, text=True, timeout=100)
        assert done.stdout.strip() == "9", done.stderr
        (place,) = Path(folder, "ray").glob("session_2*")
        assert wait_for(lambda: not [p for p in map(words_of, running()) if str(place) in p])


def running():
    """The numbers of all processes, on Linux."""
    return [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]


def words_of(pid):
    """The command of a process; "" where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def test_a_cluster_that_cannot_be_joined_is_one_sentence(monkeypatch):
    import ray

    def refuse(*_, **__):
        raise ConnectionError("Could not find any running Ray instance.\nStart one.")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(WorkerError, match=r"cluster auto \(Could not find any .* instance.\); set"):
        ray_cluster.connect()


INTERRUPTED = """
import signal, sys
from pathlib import Path
from tests.test_ray_engine import wait_long
from weighmatch import ray_engine

signal.signal(signal.SIGINT, signal.default_int_handler)
list(ray_engine.run_all(wait_long, [(Path(sys.argv[1]),)], title="runs", total=1))
"""


def wait_long(folder, progress):
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def test_ctrl_c_cancels_the_tasks(nodes, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, tmp_path], stderr=subprocess.PIPE, text=True
    ) as driver:
        assert wait_for(lambda: list(tmp_path.iterdir()))
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60)
        assert driver.stderr.read().count("KeyboardInterrupt") == 1
    pid = int(next(tmp_path.iterdir()).name)
    assert wait_for(lambda: not is_alive(pid))
