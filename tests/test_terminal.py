"""What the terminal shows of a run: a line a step, where results lie, and how to go on."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline
from kedro_datasets.text import TextDataset

from tests.project import ROOT
from weighmatch.terminal import TellsProgress, in_words

pytestmark = pytest.mark.integration

TRAINING = [
    *("--pipelines", "data_preparation,feature_extraction,training", "--params"),
    "training.steps=3000,training.checkpoint_every=50,runs.workers=2,"
    "runs.arms=fixmatch,runs.schedule=online,data_folder={}",
]


# A shell that puts tests into the background has them ignore Ctrl-C.
KEDRO = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from kedro.framework.cli import main; main()"
)


def start(*arguments):
    """A run of the project as a command in a terminal of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [sys.executable, "-c", KEDRO, "run", "--env", "test", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def processes_of(group):
    """Numbers of the processes of a group that have not ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, of, *_ = file.read().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(of) == group and state != "Z":
            found.append(int(name))
    return found


def test_a_run_is_a_line_a_step_with_its_time(tmp_path):
    process = start("--pipelines", "data_preparation", "--params", f"data_folder={tmp_path}")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    # "12:00:00 [1/3] data_preparation: load_images, 0.3 s"
    lines = [line.partition(" ")[2] for line in output.splitlines()]
    assert [line.rpartition(",")[0] for line in lines[:-1]] == [
        "[1/3] data_preparation: load_images",
        "[2/3] data_preparation: draw_splits",
        "[3/3] data_preparation: draw_samples",
    ]
    assert lines[-1].startswith("done in ")
    assert all(line.endswith(" s") for line in lines)


@pytest.mark.parametrize("limit", [None, "Within runs.time_limit 15m 3 of 6 seeds were trained."])
def test_the_end_of_a_run_tells_what_a_time_limit_left_out(tmp_path, caplog, monkeypatch, limit):
    caplog.set_level("INFO")
    monkeypatch.setattr(logging.getLogger("weighmatch.terminal"), "propagate", True)
    summary = {"verdict": "The pile helped.", "time_limit": limit}
    page = TextDataset(filepath=str(tmp_path / "report.html"))
    catalog = DataCatalog({"report": page, "summary": MemoryDataset(summary)})
    graph = Pipeline([Node(lambda: "", None, "report", name="write_report")])
    TellsProgress().after_pipeline_run(graph, catalog)
    said = dict.fromkeys(record.getMessage() for record in caplog.records)
    assert list(said)[1:] == [
        f"report: {tmp_path / 'report.html'}",
        *filter(None, summary.values()),
    ]


def interrupt(folder, kept):
    """Start training, wait until a checkpoint is written after `kept`, and press Ctrl-C."""
    process = start(TRAINING[0], TRAINING[1], TRAINING[2], TRAINING[3].format(folder))
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        times = [path.stat().st_mtime for path in folder.rglob("checkpoint.pt")]
        if len(times) == 2 and min(times) > kept:
            break
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    return process, output


def test_ctrl_c_says_how_to_go_on_and_the_next_run_goes_on_there(tmp_path):
    process, output = interrupt(tmp_path, 0)
    assert process.returncode == 130
    said = "Interrupted; start the same command again, and it goes on from what is finished. Of 2"
    assert said in output
    assert output.count("goes on from step") == 2
    assert "Traceback" not in output
    end = time.monotonic() + 10
    while processes_of(process.pid) and time.monotonic() < end:
        time.sleep(0.2)
    assert not processes_of(process.pid)
    assert not list(tmp_path.rglob("*.lock"))
    _, again = interrupt(tmp_path, time.time())
    (line,) = (line for line in again.splitlines() if " training 2 runs, 2 at a time: " in line)
    assert line.count("goes on from step") == 2
    assert "is taken over" not in again


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_times_are_told_in_words(seconds, text):
    assert in_words(seconds) == text
