"""`python -m benchmarks.gpu` rehearsed on a CPU: every part, a cut, a failure, and its table."""

import copy
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import device, images, parts, training
from benchmarks.gpu.records import PARTS, Document, Learned, problems
from benchmarks.gpu.session import Bench, Budget, OutOfTimeError, Row, run_parts
from benchmarks.gpu.table import ENTRIES, NOT_MEASURED, lines

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
# As on a machine without these, and without a network.
BARE_MACHINE = """
import socket, sys
for name in ("kedro", "kedro_datasets", "kedro_viz", "dvc", "pandas", "sklearn", "matplotlib"):
    sys.modules[name] = None
def refuse(*arguments):
    raise OSError("this machine has no network")
socket.socket.connect = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """What the command printed, wrote and took, without Kedro, DVC and the network."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(BARE_MACHINE)
    paths = os.pathsep.join(str(path) for path in (folder, ROOT / "src", ROOT))
    out = folder / "made" / "here"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout.splitlines(), out / "gpu.json", seconds


@pytest.fixture
def document(rehearsal):
    return json.loads(rehearsal[1].read_text())


@pytest.fixture
def bench(tmp_path):
    return Bench(torch.device("cpu"), images.generated(200, 60, 8), True, tmp_path)


def blank(minutes):
    return Document("a CPU", "2026-11-27", {}, "unknown", "none", True, minutes)


def test_a_rehearsal_does_every_part_without_kedro_dvc_and_the_network(rehearsal, document):
    printed, _, _ = rehearsal
    assert [line.split(":")[0] for line in printed[1:]] == list(PARTS)
    assert all(line.endswith(" s, done") for line in printed[1:])
    assert list(document["parts"]) == list(PARTS)
    for part in document["parts"].values():
        assert (part["cut"], part["error"], part["not_done"]) == (False, None, [])
    assert document["rehearsal"]
    assert document["images"] == "generated images, not CIFAR-10"


def test_a_rehearsal_takes_less_than_a_minute(rehearsal):
    # Of processor time: other tests that run beside it do not make it longer.
    assert rehearsal[2] < 60


def test_a_rehearsal_leaves_out_only_what_a_cpu_has_not(document):
    results = {name: part["result"] for name, part in document["parts"].items()}
    assert [arm["equal"] for arm in results["agreement"]["arms"]] == [True, True]
    assert "skipped" in results["agreement"]["tests"] or "passed" in results["agreement"]["tests"]
    assert [variant["name"] for variant in results["training"]["variants"]] == list(training.WAYS)
    for variant in results["training"]["variants"]:
        assert variant["error"] is None
        assert variant["images_a_second"] > 0
        assert variant["peak_memory"] is variant["synchronisations"] is None
    assert len(results["training"]["operations"]) == 10
    assert all(value is not None for value in results["learned"].values())
    ihvps = results["ihvps"]
    assert len(ihvps["solves"]) == ihvps["planned"]
    assert {reference["curvature"] for reference in ihvps["references"]} == {
        "Hessian",
        "Gauss-Newton",
    }
    assert {"KFAC", "EKFAC"} < {solve["method"] for solve in ihvps["solves"]}
    assert [arm["steps"] for arm in results["openset"]["arms"]] == [8, 8]
    assert results["openset"]["foreign"] == 80


def test_the_file_fits_its_schema_and_a_damaged_one_does_not(document):
    assert problems(document) == []
    damaged = copy.deepcopy(document)
    del damaged["commit"]
    damaged["minutes"] = "six"
    damaged["parts"]["learned"]["result"]["interval"] = 1.5
    damaged["parts"]["training"]["result"]["variants"][0]["name"] = None
    damaged["parts"]["ihvps"]["extra"] = 1
    damaged["parts"]["dance"] = damaged["parts"]["augmentation"]
    assert sorted(problems(damaged)) == [
        "parts has dance, which is no part",
        "parts.learned.result.interval must be int | None, got 1.5",
        "parts.training.result.variants[0].name must be str, got None",
        "the file lacks commit",
        "the file.minutes must be float, got 'six'",
        "the file.parts.ihvps has extra, which is not in the schema",
    ]
    assert problems([]) == ["the file must be an object, got []"]


def test_every_part_says_so_when_the_time_cuts_it(monkeypatch, tmp_path, capsys):
    call = ["gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path), "--minutes", "1e-6"]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert problems(found) == []
    assert list(found["parts"]) == list(PARTS)
    assert all(part["cut"] and part["not_done"] for part in found["parts"].values())
    assert capsys.readouterr().out.count("cut by the time, not done: all of it") == len(PARTS)


@pytest.mark.parametrize("row", command.ROWS, ids=lambda row: row.name)
def test_a_part_whose_time_ends_as_it_begins_tells_what_it_left_out(row, bench):
    class Spent(Budget):
        def left(self):
            return -1.0

    budget, record = Spent(0.0), PARTS[row.name]()
    row.measure(record, bench, budget)
    assert budget.not_done


def test_a_part_that_goes_on_is_stopped_and_keeps_what_it_has(bench, tmp_path):
    def endless(record, bench, budget):
        record.interval = 7
        while True:
            time.sleep(0.01)

    document = blank(minutes=0.01)
    rows = [Row("learned", 1.0, endless)]
    started = time.monotonic()
    assert run_parts(rows, bench, document, tmp_path / "gpu.json", started + 0.6)
    assert time.monotonic() - started < 5
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["learned"]
    assert part["cut"]
    assert part["result"]["interval"] == 7
    assert part["not_done"] == ["what was going on when its time was over"]


def test_a_module_is_imported_to_its_end_before_a_part_is_stopped(bench, tmp_path, monkeypatch):
    slow = "import time; began = time.monotonic()\nwhile time.monotonic() < began + 1: pass\n"
    (tmp_path / "slow_to_import.py").write_text(slow)
    monkeypatch.syspath_prepend(tmp_path)

    def importing(record, bench, budget):
        import slow_to_import  # noqa: F401

        record.interval = 7
        while True:
            time.sleep(0.01)

    document = blank(minutes=0.01)
    rows = [Row("learned", 1.0, importing)]
    assert run_parts(rows, bench, document, tmp_path / "gpu.json", time.monotonic() + 0.3)
    assert document.parts["learned"].cut
    assert document.parts["learned"].result.interval == 7


def test_a_part_that_fails_is_recorded_and_the_next_is_measured(bench, tmp_path):
    def broken(record, bench, budget):
        record.ranking = float("nan")
        raise ValueError("the kernel is missing\nand more")

    def fine(record, bench, budget):
        record.pool = 3
        on_disk = json.loads((tmp_path / "gpu.json").read_text())
        assert on_disk["parts"]["learned"]["error"] == "ValueError: the kernel is missing"
        assert on_disk["parts"]["learned"]["result"]["ranking"] is None

    document = blank(minutes=1)
    rows = [Row("learned", 0.5, broken), Row("openset", 0.5, fine)]
    assert not run_parts(rows, bench, document, tmp_path / "gpu.json", time.monotonic() + 60)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert problems(found) == []
    assert found["parts"]["openset"]["result"]["pool"] == 3
    assert found["parts"]["openset"]["error"] is None
    assert [file.name for file in tmp_path.glob("gpu.*")] == ["gpu.json"]


def test_a_training_that_differs_fails_its_part(bench, monkeypatch):
    outcomes = iter([1.0, 1.0, 1.0, 1.1])

    def run(arm, device, folder):
        return training.Outcome(torch.ones(3), torch.full((4,), next(outcomes)))

    monkeypatch.setattr(training, "short_run", run)
    monkeypatch.setattr(parts, "_run_tests", lambda record, budget: None)
    record = PARTS["agreement"]()
    budget = Budget(time.monotonic() + 60)
    with pytest.raises(RuntimeError, match="CPU and cpu disagree: learned"):
        parts.agreement(record, bench, budget)
    assert [arm.equal for arm in record.arms] == [True, False]
    assert record.arms[1].parameters == pytest.approx(0.1)


def test_an_arm_that_the_time_cuts_is_reported_without_an_accuracy(bench, monkeypatch):
    def cut(arm, data, config, folder, progress):
        progress(3)
        raise OutOfTimeError

    monkeypatch.setattr(training, "trained", cut)
    record, budget = PARTS["openset"](), Budget(time.monotonic() + 60)
    parts.openset(record, bench, budget)
    assert [(arm.steps, arm.planned, arm.accuracy) for arm in record.arms] == [(3, 8, None)] * 2
    assert budget.not_done == [
        "the end of fixmatch on the open set",
        "the end of learned on the open set",
    ]


def test_lines_that_wait_for_the_device_are_told(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits():
        warnings.warn("Synchronization debug mode is a prototype", stacklevel=1)
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    found = device.synchronising_lines(waits, torch.device("cuda"))
    assert len(found) == 2
    assert len(set(found)) == 1
    assert found[0].startswith("test_gpu.py:")
    assert modes == ["warn", 0]


def test_cifar_is_read_from_a_folder_in_an_order_that_mixes_classes(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(images.CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((32, 32, 3), 20 * label, np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.jpg")
    found = images.from_folder(tmp_path)
    assert found.images.shape == (30, 3, 32, 32)
    assert found.test_images.shape == (10, 3, 32, 32)
    assert (abs(found.images.mean(axis=(1, 2, 3)) - 20 * found.labels) < 2).all()
    assert (found.labels[:10] != np.arange(10)).any()
    assert images.from_folder(tmp_path, 2, every=4).images.shape == (20, 3, 8, 8)
    (tmp_path / "test" / "ship" / "0.jpg").unlink()
    with pytest.raises(ValueError, match=r"no JPEG file in .*test/ship"):
        images.from_folder(tmp_path)


def test_the_open_set_has_six_classes_and_all_others_in_the_pool():
    found = training.open_set(images.generated(100, 50, 8), labels_per_class=5)
    assert np.bincount(found.training.labels).tolist() == [5] * 6
    assert len(found.training.unlabelled_images) == 70
    assert found.foreign == 40
    assert len(found.test_images) == 30
    assert np.bincount(found.test_labels).tolist() == [5] * 6


def test_a_table_without_a_file_measures_nothing_and_that_of_a_rehearsal_says_it_is_one(document):
    empty = lines({})
    assert sum(NOT_MEASURED in line for line in empty) == len(ENTRIES) + 1
    filled = "\n".join(lines(document))
    assert "A rehearsal at tiny sizes: no figure means anything." in filled
    assert document["commit"] in filled
    assert "fixmatch equal" in filled
    assert "EKFAC, with the factors of the call before" in filled
    document["parts"]["ihvps"].update(cut=True, not_done=["3 of 56 solves"])
    document["parts"]["learned"].update(error="ValueError: no", result=vars(Learned()))
    told = "\n".join(lines(document))
    assert "`ihvps` was cut by the time; not done: 3 of 56 solves." in told
    assert "`learned` failed: ValueError: no." in told


def test_the_results_page_holds_the_table_of_what_was_measured():
    page = (ROOT / "docs" / "results" / "speed.md").read_text()
    goals = [line for line in lines({}) if line.startswith("|") and "|  |" not in line]
    assert len(goals) > 5
    assert all(line in page for line in goals)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tiny", "--device", "cpu"], "--out DIR is missing"),
        (["--out", "x", "--device", "cpu"], "--device cpu is for a rehearsal; add --tiny"),
        (["--out", "x", "--minutes", "0"], "--minutes must be above 0"),
        (["--out", "x", "--only", "dance"], "--only dance is unknown; choose from agreement"),
        (["--out", "x"], "torch sees no GPU; rehearse with --tiny --device cpu"),
    ],
)
def test_a_wrong_call_is_refused_in_a_sentence(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert sentence in capsys.readouterr().err
