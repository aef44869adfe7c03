"""Does the simulation of a cluster predict a real one?

python -m benchmarks.two_nodes [--runs 12]

Starts a cluster of Ray with two nodes of one CPU each on this machine, and trains short runs of
FixMatch on digits as its tasks. Constants of the simulation are measured first, with other tasks.
Naps tell how long a worker needs to start, how long a task needs to be handed out, and how long it
takes until a dead node is noticed. Runs of a half and of a quarter of the steps tell how long a run
takes. Then the runs are trained, without and with the death of a node. Prints what was predicted
and measured.
"""

import argparse
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.simulation import Cluster, simulate
from benchmarks.tables import conditions, markdown
from weighmatch.data.config import DataConfig
from weighmatch.data.source import get_source
from weighmatch.ray_cluster import ENVIRONMENT, connect
from weighmatch.ray_engine import run_all
from weighmatch.semisup.config import TrainingConfig
from weighmatch.semisup.training.config import RunConfig, TrainingSet
from weighmatch.semisup.training.schedules import make_schedule

STEPS = 800
# Seconds after which a node dies, and seconds of the naps that its death is noticed by.
DEATH, NAP = 12.0, 6.0
# Naps whose handing out is timed, and their seconds.
SHORT_NAPS, SHORT_NAP = 40, 0.1
# Runs of each kind that are timed.
TRIED = 8
SIMULATIONS = 20


@dataclass(frozen=True)
class Done:
    """A task that is done.

    Attributes:
        began: when, in seconds.
        ended: when, in seconds.
        worker: the process that did it.
    """

    began: float
    ended: float
    worker: int = field(default_factory=os.getpid)


def nap(seconds: float, progress: Callable[[float], None]) -> Done:
    """A task that only waits."""
    began = time.time()
    time.sleep(seconds)
    progress(1)
    return Done(began, time.time())


def train(seed: int, steps: int, data: TrainingSet, progress: Callable[[float], None]) -> Done:
    """A task that trains a run from its start."""
    began = time.time()
    training = TrainingConfig(device="cpu", snapshots=1)
    config = RunConfig("fixmatch", seed, steps, data.classes, training)
    with TemporaryDirectory() as folder:
        make_schedule(config).fit(data, Path(folder))
    progress(1)
    return Done(began, time.time())


def measured(
    function: Callable[..., Done],
    jobs: Sequence[tuple[Any, ...]],
    death: float | None = None,
) -> tuple[float, list[Done]]:
    """Seconds until all tasks are done on two nodes, and the tasks by the time of their beginning.

    Args:
        function: the task.
        jobs: its arguments.
        death: the second at which the second node dies, from the moment when tasks are handed out.
    """
    os.environ.update(ENVIRONMENT)  # before Ray is imported
    import ray
    from ray.cluster_utils import Cluster as RayCluster

    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    connect()
    began, timer = time.time(), None
    if death is not None:
        timer = threading.Timer(death, cluster.remove_node, (other,))
        timer.start()
    answers = run_all(function, jobs, title="tasks", total=len(jobs))
    tasks = [Done(one.began - began, one.ended - began, one.worker) for _, one in answers]
    seconds = time.time() - began
    if timer is not None:
        timer.join()
    ray.shutdown()
    cluster.shutdown()
    return seconds, sorted(tasks, key=lambda one: one.began)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=12)
    runs = parser.parse_args().runs
    from benchmarks.two_nodes import nap, train  # a worker cannot find what is in `__main__`

    source, config = get_source("digits"), DataConfig((0,))
    splits = source.draw(source.load(config), config, 0)
    assert splits.pool is not None
    data = TrainingSet(splits.labelled_images, splits.labels, splits.pool.images)
    naps, tasks = measured(nap, [(NAP,)] * 2)
    start = float(np.median([one.began for one in tasks]))
    dead, _ = measured(nap, [(NAP,)] * 2, death=start + NAP / 2)
    # Both nodes began their naps at `start`; the lost one was begun again on the other node, which
    # was free after its own nap.
    noticed = dead - max(start + NAP / 2, naps) - NAP
    _, tasks = measured(nap, [(SHORT_NAP,)] * SHORT_NAPS)
    last = max(one.ended for one in tasks) - tasks[0].began
    dispatch = last * 2 / SHORT_NAPS - SHORT_NAP
    seconds, slowness, cold = {}, [], []
    for steps in (STEPS // 4, STEPS // 2):
        _, tasks = measured(train, [(seed, steps, data) for seed in range(TRIED)])
        # The first run of a worker waits until all is imported.
        first = {one.worker: one for one in reversed(tasks)}.values()
        lengths = np.log([one.ended - one.began for one in tasks if one not in first])
        seconds[steps] = float(np.exp(lengths.mean()))
        slowness += (lengths - lengths.mean()).tolist()
        cold += [one.ended - one.began - seconds[steps] for one in first]
    start += float(np.mean(cold))
    # A run needs some time to begin with, and then each step takes as long as another.
    predicted = seconds[STEPS // 4] + 3 * (seconds[STEPS // 2] - seconds[STEPS // 4])
    cluster = Cluster(
        2,
        1,
        start=start,
        dispatch=max(dispatch, 0.0),
        detect=max(noticed, 0.0),
        spread=float(np.sqrt(np.square(slowness).sum() / (len(slowness) - 2))),
    )
    work = [predicted] * runs
    jobs = [(runs + seed, STEPS, data) for seed in range(runs)]
    rows = []
    for name, death in (("no node dies", None), (f"a node dies after {DEATH:g} s", DEATH)):
        deaths = {} if death is None else {1: death}
        found = [simulate(work, cluster, seed, deaths).seconds for seed in range(SIMULATIONS)]
        whole, _ = measured(train, jobs, death)
        told = f"{np.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})"
        rows.append([name, told, f"{whole:.1f}", f"{whole / np.mean(found):.2f}"])
    header = ["what", "predicted, s", "measured, s", "ratio"]
    print("\n".join(markdown(header, rows)), end="\n\n")
    print(
        f"{runs} runs of {STEPS} steps, {predicted:.1f} s each by runs of {STEPS // 4} and "
        f"{STEPS // 2} steps, which vary by a factor of {np.exp(cluster.spread):.2f}. A worker "
        f"starts and imports in {cluster.start:.1f} s, a task is handed out in "
        f"{cluster.dispatch:.3f} s, and a death is noticed after {cluster.detect:.1f} s."
    )
    print(conditions(["torch", "ray", "simpy"]))


if __name__ == "__main__":
    main()
