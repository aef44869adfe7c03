"""What a cluster does with many tasks: a discrete-event simulation (simpy)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import simpy


@dataclass(frozen=True)
class Cluster:
    """A cluster and what goes wrong in it; times are in seconds.

    Attributes:
        nodes: number of nodes.
        slots: tasks that a node does at a time.
        start: from the start to a worker's first task.
        dispatch: what the one scheduler needs to hand out a task.
        detect: from a node's death until its tasks are handed out again.
        spread: standard deviation of the logarithm of a task's slowness; stragglers are its tail.
        checkpoint: work between two checkpoints; what came after the last one is lost with a node.
        lifetime: mean time until a node fails; infinite: none does.
        repair: from a node's death until another one takes its place.
    """

    nodes: int
    slots: int
    start: float = 0.0
    dispatch: float = 0.0
    detect: float = 0.0
    spread: float = 0.0
    checkpoint: float = np.inf
    lifetime: float = np.inf
    repair: float = np.inf


@dataclass
class Outcome:
    """What a simulation came to.

    Attributes:
        seconds: until the last task was done.
        lost: seconds of work that were done twice.
        busy: the share of the slots' time that was spent on work which counted.
        deaths: how many nodes died.
    """

    seconds: float = 0.0
    lost: float = 0.0
    busy: float = 0.0
    deaths: int = 0


class _Simulation:
    """One simulation; `simulate` says what it is given."""

    def __init__(
        self,
        work: Sequence[float],
        cluster: Cluster,
        seed: int,
        deaths: Mapping[int, float],
    ) -> None:
        self.cluster, self.rng = cluster, np.random.default_rng(seed)
        self.env = simpy.Environment()
        self.scheduler = simpy.Resource(self.env)
        self.tasks = simpy.Store(self.env)
        for seconds in work:
            self.tasks.put(seconds * float(np.exp(cluster.spread * self.rng.standard_normal())))
        self.open, self.done = len(work), self.env.event()
        self.found = Outcome()
        self.worked = 0.0
        for node in range(cluster.nodes):
            self.env.process(self._node(deaths.get(node)))

    def _node(self, death: float | None) -> simpy.events.ProcessGenerator:
        while True:
            workers = [self.env.process(self._worker()) for _ in range(self.cluster.slots)]
            if death is None:
                if np.isinf(self.cluster.lifetime):
                    return
                death = float(self.rng.exponential(self.cluster.lifetime))
            yield self.env.timeout(death)
            self.found.deaths += 1
            for worker in workers:
                worker.interrupt()
            if np.isinf(self.cluster.repair):
                return
            yield self.env.timeout(self.cluster.repair)
            death = None

    def _worker(self) -> simpy.events.ProcessGenerator:
        left, began, request = None, None, None
        try:
            yield self.env.timeout(self.cluster.start)
            while True:
                request = self.tasks.get()
                left = yield request
                request = None
                with self.scheduler.request() as turn:
                    yield turn
                    yield self.env.timeout(self.cluster.dispatch)
                began = self.env.now
                yield self.env.timeout(left)
                self.worked += left
                left, began = None, None
                self.open -= 1
                if self.open == 0:
                    self.done.succeed()
        except simpy.Interrupt:
            if request is not None:
                request.cancel()
            if left is not None:
                self.env.process(self._return(left, began))

    def _return(self, left: float, began: float | None) -> simpy.events.ProcessGenerator:
        """Hand a dead node's task out again, once somebody has seen that it is dead."""
        spent = 0.0 if began is None else self.env.now - began
        saved = (
            0.0 if np.isinf(self.cluster.checkpoint) else spent - spent % self.cluster.checkpoint
        )
        self.found.lost += spent - saved
        self.worked += saved
        yield self.env.timeout(self.cluster.detect)
        yield self.tasks.put(left - saved)

    def run(self) -> Outcome:
        self.env.run(until=self.done)
        self.found.seconds = self.env.now
        slots = self.cluster.nodes * self.cluster.slots
        self.found.busy = self.worked / (slots * self.env.now)
        return self.found


def simulate(
    work: Sequence[float],
    cluster: Cluster,
    seed: int = 0,
    deaths: Mapping[int, float] | None = None,
) -> Outcome:
    """How long a cluster needs for tasks that are handed out one by one.

    Args:
        work: seconds of each task on a slot of usual speed, in the order of handing out.
        cluster: the cluster.
        seed: of stragglers and failures.
        deaths: nodes that die, with the second of their death, beside those of `lifetime`.

    Returns:
        What it came to. Where all nodes die and none is repaired, simpy raises a RuntimeError.
    """
    return _Simulation(work, cluster, seed, deaths or {}).run()
