"""What many machines would do: a cost model of the parts, and a simulation of the whole.

python -m benchmarks.scale

Prints the tables of `docs/scale.md`: times of a pile of images on one GPU, eight, and a hundred
machines; and how long many runs take where nodes fail, by a discrete-event simulation (simpy).
Constants of this machine are measured; those of GPUs are published ones, as none was at hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import simpy

from benchmarks.tables import markdown

# Per core of the CPU that everything here was measured on: 100,000 JPEG files of 200 to 500 pixels
# in 190 s on two cores, the search for copies included; two views of each in 527 s.
FILES_PER_CORE, VIEWS_PER_CORE = 263.0, 190.0
# Published: tf_efficientnet_lite0 at 224 pixels, mixed precision, on an RTX PRO 6000 (timm's table
# of inference, PyTorch 2.9.1). At 96 pixels it has (224 / 96)² times fewer pixels to go through.
VIEWS_PER_GPU = 11_600.0 * (224 / 96) ** 2
# Bytes of the features of an image and a view, and of a row of a ranking.
FEATURE_BYTES, ROW_BYTES = 2 * 1280, 120
# Bytes a second of one disk or network file system, into which everything is gathered.
GATHERED_PER_SECOND = 1e9


@dataclass(frozen=True)
class Machine:
    """One of the machines that share a pile.

    Attributes:
        cores: its CPU cores, which decode.
        gpus: its GPUs, which compute features; 0: the cores do.
    """

    cores: int
    gpus: int = 0


@dataclass(frozen=True)
class Pile:
    """What is done with each image of a pile.

    Attributes:
        images: how many images there are.
        views: views whose features are computed.
        stored: whether features are stored, as training needs them; else a row of scores is.
    """

    images: float
    views: int = 1
    stored: bool = False


def pile_seconds(pile: Pile, machine: Machine, count: int) -> dict[str, float]:
    """Seconds of each part of the work on a pile, by `count` equal machines.

    Decoding and features go on side by side where GPUs do the latter, and gathering beside both:
    the longest part is the time of the whole. Without a GPU the cores do both in turn.
    """
    decoding = pile.images / (FILES_PER_CORE * machine.cores * count)
    speed = VIEWS_PER_GPU * machine.gpus if machine.gpus else VIEWS_PER_CORE * machine.cores
    features = pile.images * pile.views / (speed * count)
    size = pile.views * FEATURE_BYTES if pile.stored else ROW_BYTES
    return {
        "decoding": decoding,
        "features": features,
        "gathering": pile.images * size / GATHERED_PER_SECOND,
    }


def whole_seconds(parts: Mapping[str, float], machine: Machine) -> float:
    """The time of the whole work, from that of its parts."""
    if machine.gpus:
        return max(parts.values())
    return max(parts["decoding"] + parts["features"], parts["gathering"])


@dataclass(frozen=True)
class Training:
    """A run in rounds; the defaults are FixMatch's published run on CIFAR-10.

    Attributes:
        steps: its steps.
        batch: labelled images in a batch.
        ratio: µ, unlabelled images for each labelled one.
        rounds: its rounds.
        measurements: measurements of influences in a round.
        outer: images of the outer loss.
        curvature: images of the curvature, labelled and unlabelled ones together.
        products: curvature products of a measurement, those of the Lanczos run included.
        measured: images whose influence is measured.
    """

    steps: int = 2**20
    batch: int = 64
    ratio: int = 7
    rounds: int = 4
    measurements: int = 6
    outer: int = 256
    curvature: int = 128
    products: int = 16
    measured: int = 256

    def costs(self, pool: float) -> dict[str, float]:
        """What each part of the run costs, in gradients of the loss of one image.

        A gradient is three forward passes. Strong views need one, weak views and ranked images a
        forward pass. A product with the Gauss-Newton matrix costs 1.2 gradients of its batch, and
        influences by forward mode a gradient each. The arbiter does not depend on the pool.
        """
        step = self.batch * (1 + self.ratio + self.ratio / 3)
        arbiter = self.outer + 1.2 * self.products * self.curvature + self.measured
        return {
            "training": self.steps * step,
            "ranking": self.rounds * pool / 3,
            "arbiter": self.rounds * self.measurements * arbiter,
        }


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


MACHINES = {
    "two cores": (Machine(2), 1),
    "one GPU, 16 cores": (Machine(16, 1), 1),
    "one machine of 8 GPUs, 128 cores": (Machine(128, 8), 1),
    "100 such machines": (Machine(128, 8), 100),
}


def say(seconds: float) -> str:
    """A time as people say it."""
    for size, name in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s"


def piles() -> list[list[str]]:
    """Rows of how long a pile takes, and which part of it takes longest."""
    rows = []
    for kind, stored, views in (("rank", False, 1), ("store features", True, 2)):
        for images in (1e6, 1e8, 1e9):
            row = [kind, f"{images:,.0f}"]
            for machine, count in MACHINES.values():
                parts = pile_seconds(Pile(images, views, stored), machine, count)
                longest = max(parts, key=parts.__getitem__)
                row.append(f"{say(whole_seconds(parts, machine))}, {longest}")
            rows.append(row)
    return rows


def costs() -> list[list[str]]:
    """Rows of what the parts of a run cost, over its training, by the size of the pool."""
    rows = []
    digits = Training(1000, 16, 4, outer=64, curvature=48, products=9, measured=128)
    for name, training, pools in (
        ("digits", digits, (600, 1e5)),
        ("published FixMatch", Training(), (5e4, 1e6, 1e8, 1e9)),
    ):
        for pool in pools:
            parts = training.costs(pool)
            rows.append(
                [name, f"{pool:,.0f}"]
                + [f"{parts[part] / parts['training']:.2g}" for part in ("ranking", "arbiter")]
            )
    return rows


def failures() -> list[list[str]]:
    """Rows of how long 1,000 runs of an hour take on clusters whose nodes fail."""
    rows = []
    work = [3600.0] * 1000
    base = Cluster(8, 8, 10, 0.005, 60, 0.1, 60, repair=600)
    for nodes in (8, 100):
        for lifetime in (np.inf, 86_400.0, 3600.0):
            for checkpoint in (60.0, np.inf):
                cluster = replace(base, nodes=nodes, lifetime=lifetime, checkpoint=checkpoint)
                found = [simulate(work, cluster, seed) for seed in range(5)]
                seconds = float(np.mean([one.seconds for one in found]))
                rows.append(
                    [
                        f"{nodes} × 8",
                        "never" if np.isinf(lifetime) else say(lifetime),
                        "none" if np.isinf(checkpoint) else say(checkpoint),
                        say(seconds),
                        f"{100 * np.mean([one.busy for one in found]):.0f} %",
                        say(float(np.mean([one.lost for one in found]))),
                    ]
                )
    return rows


def main() -> None:
    """Print the tables."""
    header = ["run", "pool", "rankings / training", "arbiter / training"]
    print("\n".join(markdown(header, costs())), end="\n\n")
    header = ["what", "images", *MACHINES]
    print("\n".join(markdown(header, piles())), end="\n\n")
    header = ["slots", "a node lives", "checkpoints every", "time", "useful", "done twice"]
    print("\n".join(markdown(header, failures())))


if __name__ == "__main__":
    main()
