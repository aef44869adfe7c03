"""The runner of worker processes: order, progress, failures, kills, and no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from weighmatch import workers
from weighmatch.workers import default_workers, one_thread, run_all, run_in_order

pytestmark = pytest.mark.integration


def square(number, progress):
    progress(number)
    return number**2, os.getpid(), torch.get_num_threads()


def fail_or_wait(folder, fails, progress):
    (folder / str(os.getpid())).touch()
    if fails:
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.05)
        raise FloatingPointError("the loss of seed 3 is not finite")
    time.sleep(300)


class UnsendableError(Exception):
    def __init__(self, number, more):
        super().__init__(f"{number} of {more}")


def raise_unsendable(progress):
    raise UnsendableError(1, 2)


def fill_memory(kind, progress):
    if kind == "python":
        raise MemoryError
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def die_at_first(folder, number, deaths, progress):
    """Ends as if killed for want of memory, `deaths` times."""
    progress(1)
    for death in range(deaths):
        mark = folder / f"{number}-{death}"
        if not mark.exists():
            mark.touch()
            time.sleep(2 * workers.REPORT_INTERVAL)
            progress(1)  # is sent, and taken back when the job begins again
            os.kill(os.getpid(), signal.SIGKILL)
    progress(2)
    return number


def wait_for(condition, seconds=60):
    for _ in range(10 * seconds):
        if condition():
            return True
        time.sleep(0.1)
    return False


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("count", [1, 2])
def test_answers_come_in_the_order_of_the_jobs_and_progress_adds_up(count, capsys):
    jobs = [(number,) for number in (5, 3, 4, 1)]
    answers = run_in_order(square, jobs, count, title="squares", total=20, done=7)
    assert [answer[0] for answer in answers] == [25, 9, 16, 1]
    assert {answer[2] for answer in answers} == {1}
    assert (os.getpid() in {answer[1] for answer in answers}) == (count == 1)
    assert "squares: 100 % " in capsys.readouterr().err


def test_every_answer_has_the_position_of_its_job():
    found = list(run_all(square, [(3,), (2,)], 2, title="squares", total=5))
    assert sorted((position, answer[0]) for position, answer in found) == [(0, 9), (1, 4)]


def test_no_jobs_have_no_answers():
    assert run_in_order(square, [], title="nothing", total=0) == []


def test_workers_are_kept_for_the_next_call():
    jobs = [(1,), (2,)] * 3
    first, second = (
        {a[1] for a in run_in_order(square, jobs, 2, title="squares", total=9)} for _ in range(2)
    )
    kept = {worker.process.pid for worker in workers._idle}
    assert first | second <= kept
    assert len(kept) == 2


def test_a_job_that_fails_ends_the_others_and_is_heard_of(tmp_path):
    with pytest.raises(FloatingPointError) as caught:
        run_in_order(fail_or_wait, [(tmp_path, False), (tmp_path, True)], 2, title="runs", total=2)
    assert str(caught.value) == "the loss of seed 3 is not finite"
    assert "in fail_or_wait" in caught.value.__notes__[0]
    assert not any(is_alive(int(path.name)) for path in tmp_path.iterdir())
    # The next call has new workers.
    assert len(run_in_order(square, [(1,), (2,)], 2, title="squares", total=3)) == 2


def test_an_exception_that_cannot_be_sent_keeps_its_words():
    with pytest.raises(RuntimeError, match="UnsendableError: 1 of 2"):
        run_in_order(raise_unsendable, [(), ()], 2, title="runs", total=2)


def test_a_caller_that_stops_listening_ends_the_workers():
    answers = run_all(square, [(1,), (2,), (3,)], 2, title="squares", total=6)
    _, (_, pid, _) = next(answers)
    answers.close()
    assert not is_alive(pid)


def test_a_killed_worker_is_started_again_and_nothing_is_missing(tmp_path, caplog, capsys):
    jobs = [(tmp_path, 0, 2), (tmp_path, 1, 0), (tmp_path, 2, 1)]
    found = run_in_order(die_at_first, jobs, 2, title="runs", total=9)
    assert found == [0, 1, 2]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 3
    assert warned[0] == (
        "runs: a worker process was ended by SIGKILL, most likely because memory ran out; "
        "it is started again (1 of 2 times)"
    )
    assert "100 % " in capsys.readouterr().err


def test_a_worker_that_is_killed_again_and_again_is_one_clear_sentence(tmp_path):
    jobs = [(tmp_path, 0, 3), (tmp_path, 1, 0)]
    with pytest.raises(RuntimeError) as caught:
        run_in_order(die_at_first, jobs, 2, title="runs", total=6)
    assert str(caught.value) == (
        "runs: a worker process was ended by SIGKILL, most likely because memory ran out, 3 times "
        "at the same job; free memory or set fewer workers (there were 2) and start again, what "
        "is finished is kept"
    )


@pytest.mark.parametrize("kind", ["python", "torch"])
def test_a_worker_without_memory_is_one_clear_sentence(kind):
    with pytest.raises(workers.WorkerError) as caught:
        run_in_order(fill_memory, [(kind,), (kind,)], 2, title="runs", total=2)
    assert str(caught.value) == (
        "runs: memory ran out; free memory or set fewer workers (there were 2) and start again, "
        "what is finished is kept"
    )


def test_a_worker_killed_between_two_calls_is_replaced():
    run_in_order(square, [(1,), (2,)], 2, title="squares", total=3)
    pid = workers._idle[0].process.pid
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not is_alive(pid))
    assert [a[0] for a in run_in_order(square, [(1,), (2,)], 2, title="s", total=3)] == [1, 4]


PARENT = """
import signal, sys, time
from pathlib import Path
from weighmatch.workers import run_in_order

# A shell that puts tests into the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def wait(folder, progress):
    import os
    (folder / str(os.getpid())).touch()
    time.sleep(300)

if __name__ == "__main__":
    run_in_order(wait, [(Path(sys.argv[1]),)] * 2, 2, title="runs", total=2)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(ending, tmp_path):
    script, folder = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(PARENT)
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, script, folder], stderr=subprocess.PIPE, text=True
    ) as parent:
        assert wait_for(lambda: len(list(folder.iterdir())) == 2)
        parent.send_signal(ending)
        assert parent.wait(60)
        pids = [int(path.name) for path in folder.iterdir()]
        assert wait_for(lambda: not any(is_alive(pid) for pid in pids))
        if ending == signal.SIGINT:
            assert parent.stderr.read().count("KeyboardInterrupt") == 1


def test_one_thread_is_undone():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_gpu_has_one_worker_and_a_cpu_one_a_core():
    assert default_workers("cuda") == 1
    assert default_workers() >= 1


def test_importing_the_runner_imports_no_torch():
    code = "import sys, weighmatch.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
