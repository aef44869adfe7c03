"""What a training run is defined by, beside its data and its seed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from weighmatch.checks import (
    require_boolean,
    require_choice,
    require_group,
    require_integer,
    require_multiple,
    require_number,
)

ArmName = Literal[
    "supervised",
    "fixmatch",
    "fixmatch_matched",
    "fixmatch_converged",
    "fixmatch_realigned",
    "fixmatch_rounds",
    "oracle",
    "max_prob",
    "softmatch",
    "energy",
    "ds3l",
    "pu",
    "inlier",
    "free",
    "learned",
]
# From cheap to dear.
ARMS: tuple[ArmName, ...] = (
    "supervised",
    "fixmatch",
    "fixmatch_matched",
    "fixmatch_converged",
    "fixmatch_realigned",
    "fixmatch_rounds",
    "oracle",
    "max_prob",
    "softmatch",
    "energy",
    "ds3l",
    "pu",
    "inlier",
    "free",
    "learned",
)
# Those whose weights are to lower an outer loss on labelled images.
OUTER_ARMS: tuple[ArmName, ...] = ("ds3l", "free", "learned")
# Those that can rank the pool anew in every round.
RANKED_ANEW: tuple[ArmName, ...] = ("max_prob", "pu", "learned")
# Schedules of the weighted arms: in one stage, weights are learned while training; in two, they
# are learned, frozen, and a classifier is trained anew; more than two are as many rounds.
MOST_STAGES = 100
# FixMatch in as many rounds, which drops no image: what the restarts alone bring.
RESTARTED: ArmName = "fixmatch_rounds"
# FixMatch aligned where the other arms are not, and not where they are.
REALIGNED: ArmName = "fixmatch_realigned"
# Those that weigh no image: they have one stage (`RESTARTED`: or rounds), and nothing to score an
# image by.
UNWEIGHTED: tuple[ArmName, ...] = (
    "supervised",
    "fixmatch",
    "fixmatch_matched",
    "fixmatch_converged",
    REALIGNED,
    RESTARTED,
    "oracle",
)
SolverName = Literal["identity", "neumann", "conjugate_gradient"]
SOLVERS: tuple[SolverName, ...] = ("identity", "neumann", "conjugate_gradient")
NetworkName = Literal["small_cnn", "wrn_28_2"]
NETWORKS: tuple[NetworkName, ...] = ("small_cnn", "wrn_28_2")
# RandAugment as FixMatch uses it (Sohn et al., 2020, table 12).
OPERATIONS = (
    "identity",
    "autocontrast",
    "brightness",
    "color",
    "contrast",
    "equalize",
    "posterize",
    "sharpness",
    "solarize",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)


def schedules(arm: ArmName, stages: Sequence[int]) -> tuple[int, ...]:
    """Of these numbers of stages, those that an arm can be trained in, or else one.

    From 3 they are rounds, for `RESTARTED`, which has no other schedule, and arms that can rank
    the pool anew.
    """
    in_rounds = arm == RESTARTED or arm in RANKED_ANEW
    able = (in_rounds if count > 2 else arm not in UNWEIGHTED for count in stages)
    found = tuple(count for count, is_able in zip(stages, able, strict=True) if is_able)
    return found or (() if arm == RESTARTED else (1,))


def require_schedule(group: str, arms: Sequence[ArmName], stages: Sequence[int]) -> None:
    """Require that some arm can be trained in some of these numbers of stages.

    Raises:
        ValueError: if none can; `group` is that of the parameters.
    """
    if not any(schedules(arm, stages) for arm in arms):
        raise ValueError(
            f"{group}.arms: {RESTARTED} restarts in every round, and {group}.stages has no number "
            "of rounds; make it 3 or more, or add another arm"
        )


@dataclass(frozen=True)
class AugmentationConfig:
    """What the two views of an image may look like.

    Attributes:
        shift: weak view: move by up to this fraction of the side, reflecting at the border.
        flip: weak view: mirror half of the images (not where mirroring changes the class).
        operations: what the strong view draws from, names of `OPERATIONS`.
        draws: how many of them an image gets, with replacement.
        magnitude: 0 to 1, a factor on the geometric ranges of FixMatch.
        cutout: side of the erased square as a fraction of the image's side; 0 for none.
        fill: grey level (0–255) of cutout and of what moves in from outside.
    """

    shift: float = 0.125
    flip: bool = False
    operations: tuple[str, ...] = OPERATIONS
    draws: int = 2
    magnitude: float = 1.0
    cutout: float = 0.5
    fill: float = 0.0

    def __post_init__(self) -> None:
        group = "training.augmentation"
        if not isinstance(self.operations, list | tuple) or not self.operations:
            raise ValueError(
                f"{group}.operations must be a list of names from {', '.join(OPERATIONS)}, "
                f"got {self.operations!r}"
            )
        for name in self.operations:
            require_choice(f"{group}.operations", name, OPERATIONS)
        object.__setattr__(self, "operations", tuple(self.operations))
        require_number(f"{group}.shift", self.shift, 0, 0.5, below=False)
        require_number(f"{group}.magnitude", self.magnitude, 0, 1, below=False)
        require_number(f"{group}.cutout", self.cutout, 0, 1, below=False)
        require_number(f"{group}.fill", self.fill, 0, 255, below=False)
        require_integer(f"{group}.draws", self.draws, 1)
        require_boolean(f"{group}.flip", self.flip)


@dataclass(frozen=True)
class WeighingConfig:
    """How the weights of the arms other than `max_prob` and `softmatch` are made.

    In rounds, `weights`, `width`, `learning_rate`, `interval`, `warmup`, `outer_labels`,
    `fit_steps`, `fit_batch`, `proximity` and `first_stage` have no effect.

    Attributes:
        weights: of `pu`, `free` and `learned`, "hard": two sizes, cut where the pool's scores fall
            apart (Otsu); "soft": the scores themselves. (`energy` and `inlier` are always hard,
            `ds3l` soft.)
        width: first-layer channels of the Confidence Network (and of the `pu` classifier).
        learning_rate: of Adam on the Confidence Network and what other arms have in its place.
        weight_decay: of the same, decoupled.
        interval: steps of the classifier between two updates of the weights.
        warmup: share of all steps, of every weighted arm, during which weights are 1 and nothing
            is learned of them.
        solver: the IHVP method.
        max_products: curvature products that one solve may spend.
        damping: δ as a multiple of λ_max of the curvature.
        outer_batch: labelled images, strongly augmented, in one estimate of the outer gradient.
        outer_labels: "training": the outer loss is taken on the labelled images that are also
            trained on; "held_out": half of each class is kept for the outer loss alone.
        curvature_batch: unlabelled images in the curvature.
        influence_batch: unlabelled images whose influence is measured in one update.
        memory: weight of the past in an image's running mean of influence, 0 for none.
        fit_steps: Adam steps on the Confidence Network in one update.
        fit_batch: images in one of them.
        proximity: pulls the weights towards 1, so that they cannot collapse onto few images.
        first_stage: steps of the first of two stages, as a share of the second's.
        head_steps: Adam steps on the MLPs of the head that ranks the pool between stages or rounds.
        head_batch: images in one of them, half of them labelled; even.
        head_learning_rate: of those Adam steps.
        influence_weight: β, of the measured influence in that head's objective (arm `learned`).
        keep_above: the MLPs' probability from which an image counts towards the share that is
            kept. At ½ it is more like a labelled image than like one of the pool.
        contamination_level: nominal, of the test whether the pool is clean and kept whole; at 1
            every pool is taken for contaminated.
    """

    weights: Literal["hard", "soft"] = "hard"
    width: int = 8
    learning_rate: float = 6e-3
    weight_decay: float = 1e-2
    interval: int = 48
    warmup: float = 0.2
    solver: SolverName = "conjugate_gradient"
    max_products: int = 3
    damping: float = 1.0
    outer_batch: int = 64
    outer_labels: Literal["training", "held_out"] = "training"
    curvature_batch: int = 24
    influence_batch: int = 128
    memory: float = 0.9
    fit_steps: int = 4
    fit_batch: int = 128
    proximity: float = 1.0
    first_stage: float = 0.5
    head_steps: int = 75
    head_batch: int = 256
    head_learning_rate: float = 1e-2
    influence_weight: float = 0.3
    keep_above: float = 0.5
    contamination_level: float = 0.2

    def __post_init__(self) -> None:
        for name in ("interval", "outer_batch", "curvature_batch", "influence_batch"):
            require_integer(f"training.weighing.{name}", getattr(self, name), 1)
        for name in ("fit_steps", "head_steps"):
            require_integer(f"training.weighing.{name}", getattr(self, name), 1)
        require_multiple(
            "training.weighing.head_batch", self.head_batch, 2, "half of it is labelled"
        )
        require_number("training.weighing.first_stage", self.first_stage, 0, 10, above=True)
        require_number(
            "training.weighing.head_learning_rate", self.head_learning_rate, 0, 10, above=True
        )
        require_number("training.weighing.influence_weight", self.influence_weight, 0, 1e6)
        require_number("training.weighing.keep_above", self.keep_above, 0, 1)
        require_number(
            "training.weighing.contamination_level", self.contamination_level, 0, 1, below=False
        )
        # The weights of a batch have mean 1: a single one would always be 1.
        require_integer("training.weighing.fit_batch", self.fit_batch, 2)
        require_number("training.weighing.proximity", self.proximity, 0, 1e6)
        require_integer("training.weighing.max_products", self.max_products, 2)
        require_multiple("training.weighing.width", self.width, 4, "GroupNorm has 4 groups")
        require_number("training.weighing.learning_rate", self.learning_rate, 0, 10, above=True)
        require_number("training.weighing.weight_decay", self.weight_decay, 0, 10)
        require_number("training.weighing.warmup", self.warmup, 0, 1)
        require_number("training.weighing.damping", self.damping, 0, 1e6, above=True)
        require_number("training.weighing.memory", self.memory, 0, 1)
        require_choice("training.weighing.weights", self.weights, ("hard", "soft"))
        require_choice("training.weighing.solver", self.solver, SOLVERS)
        require_choice(
            "training.weighing.outer_labels", self.outer_labels, ("training", "held_out")
        )


@dataclass(frozen=True)
class TrainingConfig:
    """FixMatch (Sohn et al., 2020, section 2) and its optimiser.

    Attributes:
        network: "small_cnn" for images of about 8×8, "wrn_28_2" for 32×32.
        width: first-layer channels of "small_cnn".
        steps: of the arms other than `fixmatch_matched`, `fixmatch_converged`,
            `fixmatch_realigned` and `fixmatch_rounds`.
        batch_size: labelled images in a step, B.
        unlabelled_ratio: µ; a step sees µB unlabelled images.
        threshold: τ, the confidence from which a pseudo-label counts.
        unlabelled_weight: λ_u.
        distribution_alignment: whether pseudo-labels' probabilities are multiplied by the ratio
            of the labelled images' classes to those predicted (Berthelot et al., 2020);
            of the arm `fixmatch_realigned`, whether they are not.
        learning_rate: of SGD with Nesterov momentum; decays as cos(7πk/16K).
        momentum: of SGD.
        weight_decay: of SGD.
        ema: decay of the exponential moving average of the weights, which is evaluated.
        snapshots: how often, evenly over the run, the weights of the whole pool are recorded.
        checkpoint_every: steps between two checkpoints that a killed run resumes from.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        precision: of the classifier's passes, "float32" or "bfloat16" (autocast); parameters,
            their average, hypergradients and weights stay in single precision.
        channels_last: whether images and kernels lie in memory with channels last.
        compile: whether `torch.compile` prepares the classifier; its minute or so counts.
        deterministic: whether only repeatable algorithms are used on a GPU.
        pool_memory: where the pool lies: "device", "host" (streamed through pinned memory), or
            "auto": on the GPU if it takes no more than a quarter of what is free there.
        augmentation: see `AugmentationConfig`.
        weighing: see `WeighingConfig`.
    """

    network: NetworkName = "small_cnn"
    width: int = 16
    steps: int = 1000
    batch_size: int = 16
    unlabelled_ratio: int = 4
    threshold: float = 0.95
    unlabelled_weight: float = 1.0
    distribution_alignment: bool = False
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ema: float = 0.99
    snapshots: int = 10
    checkpoint_every: int = 200
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    pool_memory: Literal["auto", "device", "host"] = "auto"
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    weighing: WeighingConfig = field(default_factory=WeighingConfig)

    def __post_init__(self) -> None:
        for name, kind in (("augmentation", AugmentationConfig), ("weighing", WeighingConfig)):
            group = require_group(f"training.{name}", getattr(self, name), kind)
            object.__setattr__(self, name, group)
        require_choice("training.network", self.network, NETWORKS)
        for name in ("steps", "batch_size", "unlabelled_ratio", "snapshots", "checkpoint_every"):
            require_integer(f"training.{name}", getattr(self, name), 1)
        require_multiple("training.width", self.width, 4, "GroupNorm has 4 groups")
        require_number("training.threshold", self.threshold, 0, 1, above=True)
        require_number("training.unlabelled_weight", self.unlabelled_weight, 0, 1e6)
        require_number("training.learning_rate", self.learning_rate, 0, 100, above=True)
        require_number("training.momentum", self.momentum, 0, 1, above=True)
        require_number("training.weight_decay", self.weight_decay, 0, 1)
        require_number("training.ema", self.ema, 0, 1)
        require_choice("training.device", self.device, ("auto", "cpu", "cuda"))
        require_choice("training.precision", self.precision, ("float32", "bfloat16"))
        require_choice("training.pool_memory", self.pool_memory, ("auto", "device", "host"))
        for name in ("distribution_alignment", "channels_last", "compile", "deterministic"):
            require_boolean(f"training.{name}", getattr(self, name))


@dataclass(frozen=True)
class RunsConfig:
    """Which runs are done and how many at a time.

    Attributes:
        arms: names of `ARMS`, a list or names joined by "+".
        stages: of the weighted arms: 1, weights are learned while training; 2, before; from 3 a
            number of rounds, for arms of `RANKED_ANEW` (the others have one stage).
        workers: runs at a time; "auto": one a core, or one on a GPU.
    """

    arms: tuple[ArmName, ...] = ARMS
    stages: int = 4
    workers: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", require_arms("runs.arms", self.arms))
        require_stages("runs.stages", self.stages)
        require_schedule("runs", self.arms, (self.stages,))
        if self.workers != "auto":
            require_integer("runs.workers (or auto)", self.workers, 1)


def require_stages(name: str, given: Any) -> None:
    """Require a number of stages of a run, or from 3 of rounds.

    Raises:
        ValueError: if it is not, or more than `MOST_STAGES`.
    """
    require_integer(name, given, 1)
    if given > MOST_STAGES:
        raise ValueError(f"{name} must be at most {MOST_STAGES}, got {given}")


def require_arms(name: str, given: Any) -> tuple[ArmName, ...]:
    """The arms as a tuple, from a list of different names or names joined by "+".

    Raises:
        ValueError: if they are anything else; `name` is the parameter's.
    """
    arms = given.split("+") if isinstance(given, str) else given
    names = isinstance(arms, list | tuple) and all(isinstance(arm, str) for arm in arms)
    if not names or not arms or len(set(arms)) < len(arms):
        raise ValueError(
            f"{name} must be a list of different names from {', '.join(ARMS)}, got {given!r}"
        )
    for arm in arms:
        require_choice(name, arm, ARMS)
    return tuple(arms)
