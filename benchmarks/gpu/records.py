"""What `gpu.json` holds: the dataclasses here are its schema.

None stands for what was not measured: the time was spent, or it has no meaning on the device.
Times are in seconds, memory in MiB of 2^20 bytes, all unless an attribute's name says otherwise.
"""

import dataclasses
import types
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin, get_type_hints

from benchmarks.timing import Operation


@dataclass
class ArmAgreement:
    """One arm trained on the CPU and on the device from the same seed.

    Attributes:
        arm: which one.
        steps: of each run.
        tolerance: what the two differences may be.
        loss: ‖losses − losses‖ / ‖losses‖ over the steps.
        parameters: the same over the averaged classifier's parameters.
        equal: whether both are within the tolerance.
    """

    arm: str
    steps: int
    tolerance: float
    loss: float
    parameters: float
    equal: bool


@dataclass
class Agreement:
    """Whether the device computes what the CPU computes.

    Attributes:
        tests: what became of the tests marked `gpu`, in pytest's words, or why they were not run.
        tests_failed: whether any failed; None: they were not run.
        arms: one an arm.
    """

    tests: str | None = None
    tests_failed: bool | None = None
    arms: list[ArmAgreement] = field(default_factory=list)


@dataclass
class Rate:
    """Pairs of views a second for so many images at once; all operations of RandAugment."""

    images: int
    pairs_a_second: float


@dataclass
class Views:
    """Weak and strong views of uint8 images.

    Attributes:
        copied_a_second: bytes that a large copy on the device reads and writes a second.
        bytes_a_pair: read and written for a pair at the least: the image once, both views as
            float32.
        limit: pairs a second at that bandwidth.
        rates: one a number of images.
        pairs_a_second: the best of them.
        share_of_limit: that over the limit.
        operations: where the time of the largest number of images goes.
    """

    copied_a_second: float | None = None
    bytes_a_pair: int | None = None
    limit: float | None = None
    rates: list[Rate] = field(default_factory=list)
    pairs_a_second: float | None = None
    share_of_limit: float | None = None
    operations: list[Operation] = field(default_factory=list)


@dataclass
class Variant:
    """FixMatch's step in one way to run the network, beside a bare loop in the same way.

    Attributes:
        name: the way.
        error: why it could not be measured; None: it could.
        warm_up: of the first steps, compilation included, over what as many take later.
        steps_a_second: of whole steps, bookkeeping and augmentation included.
        images_a_second: that pass the network: the labelled ones and two views of the others.
        share_of_bare: the bare loop's time over that of a step, median of the rounds.
        peak_memory: of all that lies on the device, the pool included.
        synchronisations: in a step, as torch warns of them.
    """

    name: str
    error: str | None = None
    warm_up: float | None = None
    steps_a_second: float | None = None
    images_a_second: float | None = None
    share_of_bare: float | None = None
    peak_memory: float | None = None
    synchronisations: float | None = None


@dataclass
class Place:
    """A line that made the host wait for the device, and how often."""

    line: str
    times: int


@dataclass
class Steps:
    """A step of FixMatch.

    Attributes:
        network: its name.
        labelled: images in a step, B.
        unlabelled: images in a step, µB.
        precision: of the network's passes.
        variants: one a way to run the network.
        graphed_bare_steps_a_second: of a bare loop as one CUDA graph a step: what is left to gain.
        counted_steps: that `places` were counted in, of the first variant.
        places: the lines that synchronise.
        operations: the ten that take most time, of the first variant.
    """

    network: str | None = None
    labelled: int | None = None
    unlabelled: int | None = None
    precision: str | None = None
    variants: list[Variant] = field(default_factory=list)
    graphed_bare_steps_a_second: float | None = None
    counted_steps: int | None = None
    places: list[Place] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass
class Learned:
    """What learned weights add to FixMatch.

    Attributes:
        fixmatch_step: a step of FixMatch.
        learned_step: a step with weights, without an update of them.
        update: one update of the weights.
        interval: steps between two updates.
        overhead: the learned arm's time over FixMatch's, updates included, weights learned while
            training.
        overhead_of_run: the same over a run whose first steps learn no weights.
        ranked: images that were ranked.
        ranking: a ranking of them.
        rounds: rankings of a run that learns its weights in rounds.
        run_steps: of such a run.
        overhead_in_rounds: that run's time over FixMatch's.
    """

    fixmatch_step: float | None = None
    learned_step: float | None = None
    update: float | None = None
    interval: int | None = None
    overhead: float | None = None
    overhead_of_run: float | None = None
    ranked: int | None = None
    ranking: float | None = None
    rounds: int | None = None
    run_steps: int | None = None
    overhead_in_rounds: float | None = None


@dataclass
class Reference:
    """A solve in double precision that errors are measured against.

    Attributes:
        curvature: "Hessian" or "Gauss-Newton".
        method: that solved.
        damping: δ of this and of every other solve with the curvature.
        products: spent.
        seconds: spent.
        residual: reached, relative.
        reached: whether that is 1e-6 or less; where it is not, no error is told.
    """

    curvature: str
    method: str
    damping: float
    products: int
    seconds: float
    residual: float
    reached: bool


@dataclass
class Solve:
    """One IHVP.

    Attributes:
        curvature: "Hessian" or "Gauss-Newton".
        precision: of the passes through the network; vectors are in single precision.
        method: its class.
        budget: products that it was meant to spend (rank or probes, of a method that has these),
            the check of its residual apart; 0: it has no choice.
        products: that it spent.
        seconds: that it took.
        peak_memory: of all that lies on the device, the graphs of all curvatures included; None
            on a CPU.
        own_memory: of that, what was not there before the solve.
        residual: relative.
        error: ‖v − v*‖/‖v*‖ against the reference; None: there is none.
        status: the method's own.
        note: what else is to be known.
    """

    curvature: str
    precision: str
    method: str
    budget: int
    products: int
    seconds: float
    peak_memory: float | None
    own_memory: float | None
    residual: float
    error: float | None
    status: str
    note: str = ""


@dataclass
class Ihvps:
    """Every IHVP method on a classifier that was trained for a while.

    Attributes:
        network: its name.
        parameters: P: of the convolutions and the linear layer. Norms are held constant: K-FAC
            would take one product for each of their parameters.
        images: in the curvature.
        references: one a curvature.
        solves: one a method, budget, curvature and precision.
        planned: how many solves there are to be.
        left_out: those for which a package is missing, and which.
    """

    network: str | None = None
    parameters: int | None = None
    images: int | None = None
    references: list[Reference] = field(default_factory=list)
    solves: list[Solve] = field(default_factory=list)
    planned: int | None = None
    left_out: list[str] = field(default_factory=list)


@dataclass
class Accuracy:
    """One arm at the end of its run, or where the time ended it.

    Attributes:
        arm: its name, and how it was trained.
        steps: of the classifier.
        planned: steps that the learning rate was laid out for.
        seconds: of training, rankings included.
        accuracy: on test images of the seen classes, 0 to 1; None: the run was cut.
    """

    arm: str
    steps: int
    planned: int
    seconds: float
    accuracy: float | None


@dataclass
class OpenSet:
    """Six classes seen, four unseen in the pool.

    Attributes:
        images: what was trained on.
        labels_per_class: labelled images of each seen class.
        pool: unlabelled images.
        foreign: of them, those of unseen classes.
        arms: one a run.
    """

    images: str | None = None
    labels_per_class: int | None = None
    pool: int | None = None
    foreign: int | None = None
    arms: list[Accuracy] = field(default_factory=list)


PARTS: dict[str, type] = {
    "agreement": Agreement,
    "augmentation": Views,
    "training": Steps,
    "learned": Learned,
    "ihvps": Ihvps,
    "openset": OpenSet,
}


@dataclass
class Part:
    """What became of a part.

    Attributes:
        seconds: that it took.
        cut: whether the time ended it before all was done.
        not_done: what was left out, in words.
        error: the sentence it failed with; None: it did not.
        result: one of `PARTS`, with what was measured up to then.
    """

    seconds: float
    cut: bool
    not_done: list[str]
    error: str | None
    result: Any


@dataclass
class Document:
    """The whole file.

    Attributes:
        device: its name.
        date: when it began, ISO 8601 in UTC.
        versions: of Python and of packages; those that are not installed are left out.
        commit: of the repository, "+" after it where files differ from it; "unknown" without Git.
        images: what the images are.
        rehearsal: whether the sizes are tiny, so that no figure means anything.
        minutes: that there were.
        parts: those that were done, by name, in order.
    """

    device: str
    date: str
    versions: dict[str, str]
    commit: str
    images: str
    rehearsal: bool
    minutes: float
    parts: dict[str, Part] = field(default_factory=dict)


def problems(document: Any) -> list[str]:
    """What is wrong with a parsed `gpu.json`, a sentence each; nothing if it fits the schema."""
    found = _misfits(document, Document, "the file")
    parts = document.get("parts") if isinstance(document, dict) else None
    for name, part in (parts if isinstance(parts, dict) else {}).items():
        if name not in PARTS:
            found.append(f"parts has {name}, which is no part")
        elif isinstance(part, dict) and "result" in part:
            found += _misfits(part["result"], PARTS[name], f"parts.{name}.result")
    return found


def _misfits(value: Any, kind: Any, where: str) -> list[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return []
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            return [f"{where} must be an object, got {value!r}"]
        hints = get_type_hints(kind)
        found = [f"{where} lacks {name}" for name in hints if name not in value]
        found += [
            f"{where} has {name}, which is not in the schema" for name in value.keys() - hints
        ]
        for name in hints.keys() & value.keys():
            found += _misfits(value[name], hints[name], f"{where}.{name}")
        return found
    if origin in (Union, types.UnionType):
        fits = any(not _misfits(value, option, where) for option in inner)
        return [] if fits else [f"{where} must be {kind}, got {value!r}"]
    if origin is list and isinstance(value, list):
        return [
            m for i, item in enumerate(value) for m in _misfits(item, inner[0], f"{where}[{i}]")
        ]
    if origin is dict and isinstance(value, dict):
        return [m for k, item in value.items() for m in _misfits(item, inner[1], f"{where}.{k}")]
    number = kind is float and isinstance(value, int | float) and not isinstance(value, bool)
    if number or type(value) is kind or (kind is type(None) and value is None):
        return []
    return [f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r}"]
