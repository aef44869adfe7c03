"""What many machines would do: a cost model of the parts, and a simulation of the whole.

python -m benchmarks.scale

Prints the tables of `docs/scale.md`: times of one run and of a pile of images on one H100, eight,
and a hundred machines; and how long many runs take where nodes fail, by a discrete-event simulation
(simpy). Constants of a CPU are measured; those of GPUs are published ones, as none was at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.simulation import Cluster, simulate
from benchmarks.tables import markdown

# Per core of the CPU that everything here was measured on: 100,000 JPEG files of 200 to 500 pixels
# in 190 s on two cores, the search for copies included; two views of each in 527 s.
FILES_PER_CORE, VIEWS_PER_CORE = 263.0, 190.0
# Published: tf_efficientnet_lite0 at 224 pixels, mixed precision, on an RTX PRO 6000 (timm's table
# of inference, PyTorch 2.9.1). At 96 pixels it has (224 / 96)² times fewer pixels to go through.
# Assumed: memory is what its layers wait for, and an H100 has 3.35 TB/s where that card has 1.79.
VIEWS_PER_H100 = 11_600.0 * (224 / 96) ** 2 * 3.35 / 1.79
# Published: eight H100 train ResNet-50 at 224 pixels in 13.466 minutes (MLPerf Training v3.0, entry
# 3.0-2053). Assumed: in 35 passes over the 1,281,167 images of ImageNet.
GRADIENTS_PER_H100 = 35 * 1_281_167 / (13.466 * 60) / 8
PARAMETERS = 25.6e6
# Assumed: bytes a second between two GPUs, over a port of 400 Gbit/s each.
NETWORK = 50e9
# Bytes of the features of an image and a view, and of a row of a ranking.
FEATURE_BYTES, ROW_BYTES = 2 * 1280, 120
# Assumed: bytes a second of one disk or network file system, into which everything is gathered.
GATHERED_PER_SECOND = 1e9
# What the machine of the command does alone, measured by `benchmarks.ranking`: files that it lists,
# rows that it merges and tasks that it hands out in a second. A shard has about so many images.
LISTED_PER_SECOND, MERGED_PER_SECOND, TASKS_PER_SECOND, SHARD = 29_000.0, 74_000.0, 104.0, 900
# Measured by `benchmarks.two_nodes`: seconds until a worker's first task, and the standard
# deviation of the logarithm of a run's time.
START, SPREAD = 4.4, 0.04
# Ray's defaults: a machine that says nothing is lost after five checks, three seconds apart, of
# which each waits for ten seconds.
DETECT = 5 * 13.0


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
    """Seconds of each part of the work on a pile, by `count` equal machines."""
    decoding = pile.images / (FILES_PER_CORE * machine.cores * count)
    speed = VIEWS_PER_H100 * machine.gpus if machine.gpus else VIEWS_PER_CORE * machine.cores
    features = pile.images * pile.views / (speed * count)
    size = pile.views * FEATURE_BYTES if pile.stored else ROW_BYTES
    return {
        "listing": pile.images / LISTED_PER_SECOND,
        "decoding": decoding,
        "features": features,
        "handing out": pile.images / SHARD / TASKS_PER_SECOND,
        "gathering": pile.images * size / GATHERED_PER_SECOND,
        "merging": 0.0 if pile.stored else pile.images / MERGED_PER_SECOND,
    }


def whole_seconds(parts: Mapping[str, float], machine: Machine) -> float:
    """The time of the whole work, from that of its parts.

    Files are listed first, and rows are merged last, both by one machine. Between the two, decoding
    and features go on side by side where GPUs do the latter, and handing out and gathering beside
    them: the longest of them counts. Without a GPU the cores do decoding and features in turn.
    """
    both = (parts["decoding"], parts["features"])
    work = max(both) if machine.gpus else sum(both)
    beside = max(work, parts["handing out"], parts["gathering"])
    return parts["listing"] + beside + parts["merging"]


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
        forward pass. A product with the Gauss-Newton matrix costs 1.5 gradients of its batch, and
        influences by forward mode a gradient each. The arbiter does not depend on the pool.
        """
        step = self.batch * (1 + self.ratio + self.ratio / 3)
        arbiter = self.outer + 1.5 * self.products * self.curvature + self.measured
        return {
            "training": self.steps * step,
            "ranking": self.rounds * pool / 3,
            "arbiter": self.rounds * self.measurements * arbiter,
        }


@dataclass(frozen=True)
class Together:
    """One run of FixMatch by several H100 together, each with an equal share of every batch.

    Attributes:
        gpus: how many there are.
        batch: labelled images of each of them in a batch.
        ratio: µ.
        training: its rounds, measurements and products.
    """

    gpus: int
    batch: int = 64
    ratio: int = 7
    training: Training = Training()

    @property
    def sum_seconds(self) -> float:
        """Seconds in which gradients are added up, in a ring."""
        return 8 * PARAMETERS * (self.gpus - 1) / self.gpus / NETWORK

    def pass_seconds(self, pool: float) -> dict[str, float]:
        """Seconds of each part of a pass in which every image of the pool is seen once."""
        steps = pool / (self.batch * self.ratio * self.gpus)
        step = self.batch * (1 + self.ratio + self.ratio / 3) / GRADIENTS_PER_H100
        return {"gradients": steps * step, "sums": steps * self.sum_seconds}

    def ranking_seconds(self, pool: float) -> float:
        """Seconds of a forward pass over the pool, which is shared out."""
        return pool / 3 / GRADIENTS_PER_H100 / self.gpus

    def arbiter_seconds(self) -> dict[str, float]:
        """Seconds of each part of the arbiter in a round: each product is added up by itself."""
        parts, one = self.training.costs(0), self.training
        gradients = parts["arbiter"] / one.rounds / GRADIENTS_PER_H100 / self.gpus
        return {
            "gradients": gradients,
            "sums": one.measurements * (one.products + 1) * self.sum_seconds,
        }


MACHINES = {
    "two cores": (Machine(2), 1),
    "one H100, 16 cores": (Machine(16, 1), 1),
    "8 H100, 128 cores": (Machine(128, 8), 1),
    "100 such machines": (Machine(128, 8), 100),
}


def say(seconds: float) -> str:
    """A time as people say it."""
    if not seconds:
        return "0 s"
    for size, name in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


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


def trainings() -> list[list[str]]:
    """Rows of how long the parts of one run take on one H100, eight, and 800."""
    groups = [Together(gpus) for gpus in (1, 8, 800)]
    rows = []
    for pool in (1e6, 1e8, 1e9):
        passes = [one.pass_seconds(pool) for one in groups]
        rows.append([f"a pass over {pool:,.0f} images", *(say(sum(p.values())) for p in passes)])
    shares = [f"{100 * p['sums'] / sum(p.values()):.0f} %" for p in passes]
    rows.append(["of it, sums of gradients", *shares])
    rows.append(["a ranking of 1,000,000,000", *(say(one.ranking_seconds(1e9)) for one in groups)])
    arbiters = [one.arbiter_seconds() for one in groups]
    rows.append(["the arbiter, in a round", *(say(sum(a.values())) for a in arbiters)])
    shares = [f"{100 * a['sums'] / sum(a.values()):.0f} %" for a in arbiters]
    return [*rows, ["of it, sums of products", *shares]]


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


BASE = Cluster(8, 8, START, 1 / TASKS_PER_SECOND, DETECT, SPREAD, 60, repair=600)


def failures() -> list[list[str]]:
    """Rows of how long 1,000 runs of an hour take on clusters whose nodes fail."""
    rows = []
    work = [3600.0] * 1000
    for nodes in (8, 100):
        for lifetime in (np.inf, 86_400.0, 3600.0):
            for checkpoint in (60.0, np.inf):
                cluster = replace(BASE, nodes=nodes, lifetime=lifetime, checkpoint=checkpoint)
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


def delays() -> list[list[str]]:
    """Rows of what stragglers and the one scheduler cost, where no node fails.

    The share that is lost is that of slots which wait. Tasks fill all slots ten times.
    """
    rows = []
    for nodes in (1, 8, 100):
        for task in (1.0, 60.0, 3600.0):
            row = [f"{nodes} × 8", say(task)]
            for dispatch, slowness in ((1 / TASKS_PER_SECOND, 0.0), (0.0, SPREAD), (0.0, 1.0)):
                cluster = Cluster(nodes, 8, dispatch=dispatch, spread=slowness)
                found = [simulate([task] * (80 * nodes), cluster, seed).busy for seed in range(5)]
                row.append(f"{100 * (1 - np.mean(found)):.0f} %")
            rows.append(row)
    return rows


def main() -> None:
    """Print the tables."""
    header = ["run", "pool", "rankings / training", "arbiter / training"]
    print("\n".join(markdown(header, costs())), end="\n\n")
    header = ["what", "one H100", "8", "800"]
    print("\n".join(markdown(header, trainings())), end="\n\n")
    header = ["what", "images", *MACHINES]
    print("\n".join(markdown(header, piles())), end="\n\n")
    header = ["slots", "a node lives", "checkpoints every", "time", "useful", "done twice"]
    print("\n".join(markdown(header, failures())), end="\n\n")
    header = ["slots", "a task", "scheduler", "stragglers", "heavy stragglers"]
    print("\n".join(markdown(header, delays())))


if __name__ == "__main__":
    main()
