"""What a run imports before its work begins, which is what its start costs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kedro.io import MemoryDataset, memory_dataset

from weighmatch.hooks import LeanStart

PROJECT = Path(__file__).parents[1]


def test_a_pipeline_without_torch_imports_neither_torch_nor_pandas_to_start(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "kedro", "run", "--env", "test"]
    command += ["--pipelines", "data_preparation", "--params", f"data_folder={tmp_path}"]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    before, found, _ = done.stdout.partition("Running node")
    assert found
    imported = {line.rpartition("|")[2].strip() for line in before.splitlines() if "|" in line}
    assert {"kedro.framework.cli", "weighmatch.hooks"} <= imported
    heavy = {"torch", "pandas", "scipy", "sklearn", "matplotlib", "torchvision"}
    assert not heavy & imported


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        (1, "deepcopy"),
        ({"a": [1]}, "deepcopy"),
        (Path("a"), "deepcopy"),
        (np.ones(2), "copy"),
        (pd.DataFrame({"a": [1]}), "copy"),
    ],
)
def test_values_are_copied_as_kedro_would(value, mode, monkeypatch):
    original = memory_dataset._infer_copy_mode
    monkeypatch.setattr(memory_dataset, "_infer_copy_mode", original)
    LeanStart().after_context_created(context=None)
    LeanStart().after_context_created(context=None)  # a second run in one process
    assert memory_dataset._infer_copy_mode(value) == mode == original(value)
    kept = MemoryDataset(data=value).load()
    assert kept is not value or isinstance(value, int | Path)
