"""One run that workers of Ray Train train together, on a cluster of two CPUs of this machine."""

import logging
import os
import signal
from dataclasses import replace
from functools import partial

import pytest

from tests.semisup.helpers import arrays_of, same
from tests.semisup.training.test_processes import assert_close
from weighmatch import ray_cluster, ray_engine
from weighmatch.checks import ToldError
from weighmatch.engine_config import EngineConfig
from weighmatch.semisup.config import RunsConfig
from weighmatch.semisup.parts.group import GroupError
from weighmatch.semisup.parts.state_file import read_state
from weighmatch.semisup.training import jobs as training_jobs
from weighmatch.semisup.training.deadline import Deadline
from weighmatch.semisup.training.jobs import _train, finish_jobs, kept_steps, plan_jobs
from weighmatch.semisup.training.loop import CHECKPOINT
from weighmatch.workers import WorkerError

pytestmark = pytest.mark.integration

RAY = EngineConfig(engine="ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ.update(ray_cluster.ENVIRONMENT)
    import ray

    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def plan(config, data):
    """One run of the arm "learned" in double precision."""
    training = replace(config.training, precision="float64")
    runs = RunsConfig(arms=("learned",), schedule=("online",))
    return plan_jobs(("learned",), {"seed_0": arrays_of(data)}, training, runs)


def states_of(job, folder):
    return [read_state(job.folder(folder) / name) for name in ("run.pt", CHECKPOINT)]


@pytest.mark.slow
def test_two_workers_train_what_one_process_does(training_set, run_config, tmp_path, capsys):
    planned = plan(run_config(steps=50), training_set)
    finish_jobs(planned, tmp_path / "ray", engine=RAY, processes=2)
    assert "training: 100 %" in capsys.readouterr().err
    finish_jobs(planned, tmp_path / "one", 1)
    one, ray = (states_of(*planned, tmp_path / place) for place in ("one", "ray"))
    assert_close(one, ray)


def train_others(name, job, *arguments):
    assert job.name != name
    return _train(job, *arguments)


@pytest.mark.slow
def test_workers_of_a_cluster_train_what_processes_of_a_machine_do(
    training_set, run_config, tmp_path, monkeypatch
):
    import ray

    training = run_config(steps=50).training
    runs = RunsConfig(arms=("learned",), rounds=2)
    arrays = arrays_of(training_set)
    planned = plan_jobs(("learned",), {f"seed_{n}": arrays for n in range(3)}, training, runs)
    finish_jobs(planned[:1], tmp_path / "ray", engine=RAY, processes=2)
    # A run that is finished is not sent to the cluster, and the data of the others goes there once.
    put, sent = ray.put, []
    monkeypatch.setattr(ray, "put", lambda value: sent.append(value.nbytes) or put(value))
    monkeypatch.setattr(ray_engine, "LARGE", training_set.unlabelled_images.nbytes)
    monkeypatch.setattr(training_jobs, "_train", partial(train_others, planned[0].name))
    finish_jobs(planned, tmp_path / "ray", engine=RAY, processes=2)
    assert sent == [ray_engine.LARGE]
    monkeypatch.undo()
    finish_jobs(planned, tmp_path / "local", processes=2)
    for job in planned:
        assert same(*(states_of(job, tmp_path / place) for place in ("ray", "local")))


def train_and_die(rank, job, folder, kept, ends, mark, team, progress):
    """What a worker does, until the one of this rank is killed at its first report."""

    def tell(units):
        progress(units)
        if units and team.group.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    return _train(job, folder, kept, ends, mark, team, tell)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_all_and_one_process_goes_on(
    rank, training_set, run_config, tmp_path, monkeypatch
):
    planned = plan(run_config(steps=110), training_set)
    with monkeypatch.context() as patch:
        patch.setattr(training_jobs, "_train", partial(train_and_die, rank))
        told = r"one of the 2 processes .* start the same command again, .* its last checkpoint$"
        with pytest.raises(GroupError, match=told):
            finish_jobs(planned, tmp_path, engine=RAY, processes=2)
    assert kept_steps(*planned, tmp_path) == 100
    finish_jobs(planned, tmp_path, 1)
    assert kept_steps(*planned, tmp_path) == 110


def warn_and_train(job, folder, kept, ends, mark, team, progress):
    logging.getLogger("weighmatch").warning("%s is about to be trained", job.config.arm)
    return _train(job, folder, kept, ends, mark, team, progress)


@pytest.mark.slow
def test_the_first_worker_warns(training_set, run_config, tmp_path, monkeypatch, caplog):
    planned = plan(run_config(steps=10), training_set)
    monkeypatch.setattr(training_jobs, "_train", warn_and_train)
    finish_jobs(planned, tmp_path, engine=RAY, processes=2)
    told = [record.getMessage() for record in caplog.records]
    assert told.count("learned is about to be trained") == 1


def fail_in_second(job, folder, kept, ends, mark, team, progress):
    team.group.require_same(lambda: 1)
    if team.group.rank:
        raise MemoryError("out of memory")
    team.group.require_same(lambda: 1)


@pytest.mark.slow
def test_an_error_of_another_worker_than_the_first_is_told(
    training_set, run_config, tmp_path, monkeypatch
):
    planned = plan(run_config(steps=10), training_set)
    monkeypatch.setattr(training_jobs, "_train", fail_in_second)
    with pytest.raises(WorkerError, match="memory ran out"):
        finish_jobs(planned, tmp_path, engine=RAY, processes=2)


def test_what_cannot_be_done_together_is_one_sentence(training_set, run_config, tmp_path):
    planned = plan(run_config(), training_set)
    with pytest.raises(WorkerError, match=r"room for 2 of the 3 processes .* runs.processes to 2"):
        finish_jobs(planned, tmp_path, engine=RAY, processes=3)
    with pytest.raises(ToldError, match=r"leave out runs\.time_limit, or start one process"):
        finish_jobs(planned, tmp_path, engine=RAY, processes=2, deadline=Deadline(1.0, 1.0))
