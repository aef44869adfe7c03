"""What a large pool takes beyond its memory map."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, threading
from pathlib import Path
import numpy as np
import torch
from weighmatch.semisup import RunConfig, TrainingConfig, TrainingSet, make_schedule
from weighmatch.semisup.config import RankingConfig

COUNT, FOLDER = 50_000, Path(sys.argv[1])


def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024


def watch():
    while not over.wait(0.02):
        peak[0] = max(peak[0], held())


torch.set_num_threads(1)
pool = np.lib.format.open_memmap(FOLDER / "pool.npy", "w+", np.uint8, (COUNT, 3, 32, 32))
rng = np.random.default_rng(0)
for start in range(0, COUNT, 5000):
    # Half of the pool is dark, so that the second round trains on a part of it.
    top = 256 if start % 10_000 == 0 else 32
    pool[start : start + 5000] = rng.integers(0, top, (5000, 3, 32, 32), dtype=np.uint8)
pool.flush()
pool = np.load(FOLDER / "pool.npy", mmap_mode="r")
labelled, labels = pool[:24].copy(), np.arange(24) % 6
training = TrainingConfig(
    width=8, device="cpu", unlabelled_ratio=2, ranking=RankingConfig(contamination_level=1.0)
)
config = RunConfig("learned", 0, 20, 6, training, "rounds", 2)
# What torch and the allocator take once and keep is not the pool's.
make_schedule(config).fit(TrainingSet(labelled, labels, pool[:2000].copy()), FOLDER / "small")
before, peak, over = held(), [0], threading.Event()
threading.Thread(target=watch, daemon=True).start()
run = make_schedule(config).fit(TrainingSet(labelled, labels, pool), FOLDER / "run")
over.set()
assert 0 < (run.history.weights[-1] > 0).sum() < COUNT
print((peak[0] - before) / COUNT)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the memory")
def test_a_pool_takes_at_most_six_kilobytes_an_image_beyond_its_map(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) <= 6000
