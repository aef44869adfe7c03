"""CPU time until a pipeline's work begins: imports, configuration, catalog."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.tables import markdown

PROJECT = Path(__file__).parents[1]


def table(rounds: int) -> list[str]:
    """A row a command: what nobody can do without, and this project's."""
    with tempfile.TemporaryDirectory() as folder:
        prepare = ["--pipelines", "data_preparation"]
        one_step = f"runs.arms=supervised,training.steps=1,data_folder={folder}"
        kinds = {
            "without torch, to its first node": (prepare, f"data_folder={folder}", "Running node"),
            "with torch, to its first run": (
                ["--pipelines", "training"],
                one_step,
                "training 2 runs, ",
            ),
        }
        _cpu_seconds(_run_of([*prepare, "--params", f"data_folder={folder}"]), None)
        bare = {
            "kedro --version": [sys.executable, "-m", "kedro", "--version"],
            'python -c "import torch"': [sys.executable, "-c", "import torch"],
        }
        rows = []
        for name, command in bare.items():
            found = [_cpu_seconds(command, None) for _ in range(rounds)]
            rows.append([name, f"{statistics.median(found):.1f}"])
        for name, (pipelines, params, until) in kinds.items():
            command = _run_of([*pipelines, "--params", params])
            found = [_cpu_seconds(command, until) for _ in range(rounds)]
            rows.append([f"kedro run of a pipeline {name}", f"{statistics.median(found):.1f}"])
    return markdown(["command", "CPU seconds"], rows)


def _run_of(options: list[str]) -> list[str]:
    return [sys.executable, "-m", "kedro", "run", "--env", "test", *options]


def _cpu_seconds(command: list[str], until: str | None) -> float:
    """Of a command, to the line that holds `until` or to the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines, used = [], 0.0
        for line in process.stdout:
            lines.append(line)
            if until is not None and until in line:
                used = _spent(process.pid)
                lines += process.stdout
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(lines)}")
    return used or usage.ru_utime + usage.ru_stime


def _spent(pid: int) -> float:
    """CPU seconds of a process that runs (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
