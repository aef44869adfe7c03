"""What takes one class, function or row to add: each is added here and run through the graph."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from torch import nn

from tests.project import ROOT, run_project
from weighmatch import arms
from weighmatch.data import source as sources
from weighmatch.data.splits import Splits, Unlabelled
from weighmatch.implicit import Method
from weighmatch.semisup.parts import networks
from weighmatch.semisup.weightings import Weighting

pytestmark = pytest.mark.integration

METHOD = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from weighmatch.implicit.method import Iterate, Method


@dataclass(frozen=True, kw_only=True)
class SteepestDescent(Method):
    approximate: ClassVar[bool] = True

    def _iterate(self, op, unit, state):
        value, residual = torch.zeros_like(unit), unit
        for _ in range(10):
            product = op @ residual + self.damping * residual
            length, bend = float(residual @ residual), float(residual @ product)
            if length < 1e-20:
                break
            if not bend > 0:
                return Iterate(value, status="negative_curvature")
            value, residual = value + length / bend * residual, residual - length / bend * product
        return Iterate(value)
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of the study of IHVPs with a method that is added: one class."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "own.py").write_text(METHOD)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        importlib.import_module("own")
        try:
            run_project(folder, names=["ihvp_analysis"])
        finally:
            Method.registry.pop("SteepestDescent")
    return folder


@pytest.fixture
def brightness():
    """An arm: one class and one row."""

    class Brightness(Weighting):
        name = "brightness"

        def criterion(self, images, features, pseudo):
            return images.mean(dim=(1, 2, 3))

    arms.register(arms.Arm("brightness", "weights = brightness", "#123456", weighting="brightness"))
    yield
    arms.unregister("brightness")
    Weighting.registry.pop("brightness")


@pytest.fixture
def two_layers():
    """A network: one function."""

    @networks.network("two_layers")
    def two_layers(channels, classes, width):
        coarse = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        body = nn.Sequential(coarse, nn.Linear(16 * channels, width), nn.ReLU())
        return networks.Classifier(body, width, classes)

    yield
    networks._NETWORKS.pop("two_layers")


@pytest.fixture
def stripes():
    """A source that knows neither which of its images are OOD nor any test image."""

    @sources.register
    class Stripes(sources.Source):
        name = "stripes"
        parameters = sources.NoParameters
        contaminates = False

        def class_names(self, config):
            return ("rows", "columns")

        def load(self, config):
            rows = np.zeros((1, 8, 8), np.uint8)
            rows[:, ::2] = 200
            return {"rows": rows, "columns": rows.transpose(0, 2, 1)}

        def draw(self, raw, config, seed):
            rng = np.random.default_rng(seed)
            both = np.stack([raw["rows"], raw["columns"]])

            def images(labels):
                return both[labels] + rng.integers(0, 50, (len(labels), 1, 8, 8), np.uint8)

            labels = np.arange(2 * config.labels_per_class) % 2
            pool = Unlabelled(images(rng.integers(0, 2, 60)))
            return Splits(images(labels), labels, ("rows", "columns"), pool)

    yield
    sources.unregister("stripes")


def run_graph(folder, study, parameters):
    """The whole graph, with the study of IHVPs that the report needs already there."""
    shutil.copytree(study, folder, dirs_exist_ok=True)
    names = [
        "data_preparation",
        "feature_extraction",
        "training",
        "scoring",
        "evaluation",
        "reporting",
    ]
    run_project(folder, names=names, params=parameters)


def read(folder, layer, name):
    return pd.read_parquet(folder / layer / "test" / f"{name}.parquet")


def test_an_arm_and_a_network_go_through_the_whole_graph(tmp_path, study, brightness, two_layers):
    parameters = {
        "runs": {"arms": "fixmatch+brightness"},
        "training": {"network": "two_layers"},
    }
    run_graph(tmp_path, study, parameters)
    metrics = json.loads((tmp_path / "08_reporting/test/summary.json").read_text())
    assert set(metrics["arms"]) == {"fixmatch", "brightness"}
    assert metrics["arms"]["brightness"]["accuracy"] > 100 / 6
    scores = read(tmp_path, "08_reporting", "run_scores")
    assert scores.loc[scores["arm"] == "brightness", "auroc_weight"].notna().all()
    assert "weights = brightness" in (tmp_path / "08_reporting/test/report.html").read_text()


def test_a_source_without_truth_and_test_set_goes_through_the_whole_graph(tmp_path, study, stripes):
    parameters = {
        "data": {"source": "stripes", "seeds": [0]},
        "runs": {"arms": "fixmatch+learned+oracle"},
    }
    run_graph(tmp_path, study, parameters)
    runs = read(tmp_path, "07_model_output", "runs")
    # Nobody can clean the pool for the oracle.
    assert set(runs["arm"]) == {"fixmatch", "learned"}
    assert set(runs["source"]) == {"stripes"}
    assert read(tmp_path, "08_reporting", "run_scores")["accuracy"].isna().all()
    with np.load(next(tmp_path.rglob("predictions/learned-*.npz"))) as found:
        assert found["pool_weights"].shape == found["pool_labels"].shape == (60,)
    assert "no accuracy" in (tmp_path / "08_reporting/test/report.html").read_text()


def test_an_ihvp_method_meets_the_properties_of_the_library_and_is_in_the_study(study):
    # The library's own tests, with the method imported before they are collected.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(study), *sys.path])}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "own",
        "-k",
        "SteepestDescent",
    ]
    done = subprocess.run(
        [*command, "tests/implicit/test_methods.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 5
    rows = read(study, "07_model_output", "ihvp_comparison")
    mine = rows[rows["method"] == "steepest_descent"]
    assert len(mine) > 0
    assert mine["status"].notna().all()
