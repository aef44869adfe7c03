"""What a run costs before its work begins."""

import os
import subprocess
import sys

import pytest

from tests.project import ROOT

pytestmark = pytest.mark.integration

# Prints the CPU seconds of this process, and which modules it imported, before the first node.
MEASURED = """
import sys, time
from kedro.framework.hooks import hook_impl
from kedro.framework.startup import bootstrap_project
from kedro.framework.project import settings
class Ready(Exception): pass
class Stop:
    @hook_impl
    def before_node_run(self):
        raise Ready
    @hook_impl(trylast=True)
    def before_pipeline_run(self):
        raise Ready
metadata = bootstrap_project({root!r})
from kedro.framework.session import KedroSession
from weighmatch.keeping import KeepsFilesWhole
# There are no files.
KeepsFilesWhole._require_made = KeepsFilesWhole._require_whole = lambda *given: None
parameters = {{"data_folder": {folder!r}}}
with KedroSession.create({root!r}, env="test", runtime_params=parameters) as session:
    session._hook_manager.register(Stop())
    try:
        session.run(pipeline_names=[{name!r}])
    except Ready:
        heavy = {{"torch", "torchvision"}} & set(sys.modules)
        print("ready", time.process_time(), *heavy)
"""


@pytest.mark.parametrize("name", ["data_preparation", "evaluation", "reporting"])
def test_a_pipeline_without_torch_starts_in_three_seconds_of_work(name, tmp_path):
    code = MEASURED.format(root=str(ROOT), folder=str(tmp_path), name=name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    _, seconds, *heavy = done.stdout.splitlines()[-1].split()
    assert not heavy
    assert float(seconds) < 3


def test_every_catalog_is_read_without_torch():
    code = (
        "import sys\n"
        "from kedro.io import DataCatalog\n"
        "from weighmatch.settings import CONFIG_LOADER_ARGS, ExperimentLoader\n"
        "for env in ('base', 'experiments/one_kind'):\n"
        f"    loader = ExperimentLoader({str(ROOT / 'conf')!r}, env=env, **CONFIG_LOADER_ARGS)\n"
        "    assert loader['parameters']\n"
        "    catalog = DataCatalog.from_config(loader['catalog'])\n"
        "    assert len([catalog.get(name) for name in catalog.keys()]) > 20\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
