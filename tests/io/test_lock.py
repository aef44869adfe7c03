"""Locks: one holder at a time, and none that is gone."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest

from weighmatch.io import lock as module
from weighmatch.io.lock import HeldError, Holder, Lock, Locks

HOLD = """
import sys, time
from pathlib import Path
from weighmatch.io.lock import Lock
Lock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(300)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds `a.lock`."""
    path = tmp_path / "a.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_told_who_holds_the_lock(other, tmp_path):
    with pytest.raises(HeldError, match=rf"process {other.pid} on .*, since 20.*: -c "):
        Lock(tmp_path / "a.lock").take()


def test_the_lock_of_a_killed_process_is_taken_over(other, tmp_path, caplog):
    other.kill()
    other.wait()
    lock = Lock(tmp_path / "a.lock")
    lock.take()
    assert "was left by a run that is gone (process" in caplog.text
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_process_that_has_the_number_of_a_dead_one_holds_nothing(tmp_path):
    # A computer that was started again gives the same numbers to others.
    holder = replace(Holder.here(), born="another start 1")
    path = tmp_path / "a.lock"
    path.write_text(json.dumps(asdict(holder)))
    Lock(path).take()
    assert json.loads(path.read_text())["born"] == Holder.here().born


@pytest.mark.parametrize(("age", "free"), [(60, False), (module.STALE_AFTER + 60, True)])
def test_the_heartbeat_tells_whether_a_run_on_another_computer_is_alive(age, free, tmp_path):
    path = tmp_path / "a.lock"
    path.write_text(json.dumps(asdict(replace(Holder.here(), host="elsewhere"))))
    time = path.stat().st_mtime - age
    os.utime(path, (time, time))
    if free:
        Lock(path).take()
    else:
        with pytest.raises(HeldError, match="on elsewhere"):
            Lock(path).take()


def test_a_lock_that_says_nothing_is_taken_over(tmp_path):
    path = tmp_path / "a.lock"
    path.write_text("")
    Lock(path).take()
    assert json.loads(path.read_text())["host"] == Holder.here().host


def test_the_heartbeat_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_EVERY", 0.05)
    path = tmp_path / "a.lock"
    locks = Locks()
    locks.take([path])
    os.utime(path, (0, 0))
    threading.Event().wait(0.5)
    assert path.stat().st_mtime > 0
    locks.release()


def test_two_threads_cannot_hold_a_lock_but_a_run_that_ended_badly_blocks_none(tmp_path):
    path = tmp_path / "a.lock"
    done, held = threading.Event(), threading.Event()

    def hold():
        Lock(path).take()
        held.set()
        done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    with pytest.raises(HeldError):
        Lock(path).take()
    done.set()
    thread.join()
    Lock(path).take()
    Lock(path).take()  # the same thread, interrupted before


def test_all_locks_are_taken_or_none_and_no_empty_folder_stays(other, tmp_path):
    locks = Locks()
    with pytest.raises(HeldError):
        locks.take([tmp_path / "0" / "x.lock", tmp_path / "a.lock"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
    assert locks.paths == []


@pytest.mark.integration
def test_of_many_processes_one_gets_the_lock(tmp_path):
    code = HOLD.replace(
        "Lock(Path(sys.argv[1])).take()",
        """
try:
    Lock(Path(sys.argv[1])).take()
except RuntimeError:
    sys.exit(3)
""",
    ).replace("time.sleep(300)", "time.sleep(8)")
    (tmp_path / "a.lock").write_text("left by a killed run")
    commands = [[sys.executable, "-c", code, tmp_path / "a.lock"]] * 4
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    assert sorted(process.wait() for process in processes) == [0, 3, 3, 3]
