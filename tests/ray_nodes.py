"""A cluster of two nodes on this machine, and what dies in it."""

import os
import signal
import threading
import time

import pytest

from tests.test_workers import wait_for
from weighmatch import ray_cluster

STORE = 100 * 2**20


class Nodes:
    """A head with one CPU, to which the driver is connected, and another node with one CPU."""

    def __init__(self):
        os.environ.update(ray_cluster.ENVIRONMENT)
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        self.other = self.cluster.add_node(**node)

    def remove_other(self):
        self.cluster.remove_node(self.other, allow_graceful=False)


def start_nodes():
    nodes = Nodes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", nodes.cluster.address)
        yield nodes
    import ray

    ray.shutdown()
    nodes.cluster.shutdown()


def have_both(started):
    """Two nodes; the one that an earlier test removed is there again."""
    if started.other is None:
        started.other = started.cluster.add_node(num_cpus=1, object_store_memory=STORE)
        assert wait_for(lambda: ray_cluster.count_workers() == 2)
    return started


def die_now_and_then(marks):
    """On the head: end this process once. On the other node: then wait until the node is gone."""
    import ray

    runtime = ray.get_runtime_context()
    if runtime.get_node_id() == (marks / "head").read_text():
        if not (marks / "killed").exists():
            (marks / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif not (marks / "removed").exists():
        assert wait_for((marks / "killed").exists, 300)
        (marks / "waits").touch()
        time.sleep(600)


class Reaper(threading.Thread):
    """Removes the other node as soon as something on it waits for that."""

    def __init__(self, nodes, marks):
        super().__init__(daemon=True)
        self.nodes, self.marks = nodes, marks
        marks.mkdir()
        (marks / "head").write_text(nodes.cluster.head_node.node_id)
        self.start()

    def run(self):
        if wait_for((self.marks / "waits").exists, 300):
            self.nodes.remove_other()
            self.nodes.other = None
            (self.marks / "removed").touch()

    def assert_both_died(self):
        self.join(60)
        assert {path.name for path in self.marks.iterdir()} >= {"killed", "waits", "removed"}
