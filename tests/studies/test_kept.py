"""Studies keep finished jobs: what was done is read back, and nothing else is taken for it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from weighmatch.data.sources.digits import load_digits
from weighmatch.studies import ihvp, kept, meta_learning
from weighmatch.studies.config import StudyConfig
from weighmatch.studies.ihvp import compare_all
from weighmatch.studies.kept import finish_jobs
from weighmatch.studies.meta_config import MetaLearningConfig
from weighmatch.studies.meta_learning import run_all

CALLS = []


def double(array, number):
    CALLS.append(number)
    return pd.DataFrame({"x": array * number})


def make(numbers, array=(1.0, 2.0)):
    return [(double, (np.array(array), number)) for number in numbers]


def finish(numbers, folder, array=(1.0, 2.0)):
    CALLS.clear()
    found = finish_jobs(make(numbers, array), 1, folder, "doubles")
    return [list(table["x"]) for table in found], list(CALLS)


def test_finished_jobs_are_read_back_in_the_order_of_the_jobs(tmp_path, caplog):
    assert finish([3, 1], tmp_path) == ([[3, 6], [1, 2]], [3, 1])
    caplog.set_level("INFO")
    assert finish([1, 2, 3], tmp_path) == ([[1, 2], [2, 4], [3, 6]], [2])
    assert "doubles: 2 of 3 were finished before" in caplog.text


def test_other_arguments_and_other_code_are_computed(tmp_path, monkeypatch):
    finish([3], tmp_path)
    assert finish([3], tmp_path, array=(1.0, 4.0)) == ([[3, 12]], [3])
    assert finish([3], tmp_path)[1] == []
    monkeypatch.setattr(kept, "code_digest", lambda module: "another")
    assert finish([3], tmp_path)[1] == [3]


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert finish([3], None)[1] == [3]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"?" + b[41:]]
)
def test_a_damaged_file_is_named_and_made_again(damage, tmp_path, caplog):
    finish([3, 1], tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(damage(path.read_bytes()))
    found, calls = finish([3, 1], tmp_path)
    assert found == [[3, 6], [1, 2]]
    assert len(calls) == 1
    assert f"{path} is damaged" in caplog.text
    assert finish([3, 1], tmp_path)[1] == []


@pytest.mark.integration
def test_a_study_goes_on_with_other_seeds_networks_and_workers(tmp_path, monkeypatch):
    config = StudyConfig(
        networks=("softmax",),
        seeds=(0, 1),
        inner=30,
        outer=30,
        steps=3,
        stages=(1.0,),
        indefinite=False,
        budgets=(5,),
        batches=0,
        batch_size=20,
        workers=1,
    )
    first = compare_all(*load_digits(), config, tmp_path)
    done = []
    original = ihvp.compare_methods
    wrapped = lambda *a: done.append(a[3:]) or original(*a)  # noqa: E731
    wrapped.__module__, wrapped.__qualname__ = original.__module__, original.__qualname__
    monkeypatch.setattr(ihvp, "compare_methods", wrapped)
    again = compare_all(*load_digits(), replace(config, workers=2), tmp_path)
    assert not done
    for one, other in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    more = replace(config, networks=("mlp-3", "softmax"), seeds=(0, 1))
    compare_all(*load_digits(), more, tmp_path)
    assert done == [("mlp-3", 0), ("mlp-3", 1)]


class StoppedError(BaseException):
    pass


def test_the_study_of_meta_learning_gives_every_run_to_the_folder(tmp_path, monkeypatch):
    seen = []

    def stop(*arguments):
        seen.extend(arguments)
        raise StoppedError

    monkeypatch.setattr(meta_learning, "finish_jobs", stop)
    one = dict.fromkeys(("forgetting_seeds", "instability_seeds", "efficiency_seeds"), 1)
    with pytest.raises(StoppedError):
        run_all(*load_digits(), MetaLearningConfig(seeds=(0,), **one), tmp_path)
    jobs, _, folder, _ = seen
    assert folder == tmp_path
    # A job of a snapshot's seed is known by that seed alone.
    assert [arguments[2].seeds for _, arguments in jobs[:2]] == [(0,), (1,)]


SCRIPT = """
import sys, time
import pandas as pd
from weighmatch.studies.kept import finish_jobs

def slow(number):
    if number > 1:
        time.sleep(300)
    return pd.DataFrame({"x": [number]})

if __name__ == "__main__":
    finish_jobs([(slow, (number,)) for number in range(4)], 2, sys.argv[1], "slow")
"""


@pytest.mark.integration
def test_a_killed_study_has_kept_what_was_finished(tmp_path):
    script, folder = tmp_path / "study.py", tmp_path / "kept"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, script, folder]) as study:
        for _ in range(600):
            if folder.exists() and len(list(folder.glob("*.pickle"))) == 2:
                break
            time.sleep(0.1)
        os.kill(study.pid, signal.SIGKILL)
    assert len(list(folder.glob("*.pickle"))) == 2
    assert not list(folder.glob("*.partial"))
