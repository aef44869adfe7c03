"""What a training run is defined by, beside its data and its seed; imports no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from weighmatch.arms import SCHEDULES, Schedule, arm_names, get_arm, require_arms
from weighmatch.checks import (
    require_boolean,
    require_choice,
    require_group,
    require_integer,
    require_list,
    require_multiple,
    require_number,
)
from weighmatch.engine_config import EngineConfig
from weighmatch.extras import family_of, require_backbone, require_packages

SolverName = Literal["identity", "neumann", "conjugate_gradient"]
PoolMemory = Literal["auto", "device", "sharded", "host"]
# RandAugment's operations as FixMatch uses them (Sohn et al., 2020, table 12).
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
# Those that neither invert nor quantise grey levels, which carry the class of a digit.
GENTLE_OPERATIONS = (
    "identity",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "brightness",
    "contrast",
    "sharpness",
)
MAX_ROUNDS = 100
# The groups of `TrainingConfig` that a schedule reads, as far as the arm reads them.
GROUPS_OF_SCHEDULE: dict[Schedule, tuple[str, ...]] = {
    "online": ("weighting", "influence"),
    "two_stages": ("weighting", "influence", "ranking", "two_stages"),
    "rounds": ("influence", "ranking"),
}


@dataclass(frozen=True)
class AugmentationConfig:
    """What the two views of an image may look like.

    Attributes:
        shift: weak view: move by up to this fraction of the side, reflecting at the border.
        flip: weak view: mirror half of the images (not where mirroring changes the class).
        operations: what the strong view draws from, names of `OPERATIONS`.
        draws: how many of them an image gets, drawn with replacement.
        magnitude: 0 to 1, a factor on the geometric ranges of FixMatch.
        cutout: side of the erased square as a fraction of the image's side; 0 for none.
        fill: grey level (0–255) of cutout and of what moves in from outside.
    """

    shift: float = 0.125
    flip: bool = False
    operations: tuple[str, ...] = GENTLE_OPERATIONS
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
class FeaturesConfig:
    """Which views of an image a frozen backbone sees; its features of them are stored.

    Attributes:
        weak_views: weak views of an image, beside the image itself; 0: the image stands in.
        strong_views: strong views of an image; 0: the image stands in.
    """

    weak_views: int = 2
    strong_views: int = 4

    def __post_init__(self) -> None:
        for name in ("weak_views", "strong_views"):
            require_integer(f"training.features.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class WeightingConfig:
    """How weights are learned while the classifier trains (schedules online and two_stages).

    Attributes:
        weights: whether the arms `pu`, `free` and `learned` use weights of two sizes, cut where
            the pool's scores fall apart ("hard", Otsu), or the scores themselves ("soft"). The
            weights of `energy` and `inlier` are always hard, those of `ds3l` soft.
        width: first-layer channels of the Confidence Network and of the `pu` classifier.
        learning_rate: step size of Adam on the Confidence Network or what an arm has in its place.
        weight_decay: decoupled weight decay of the same.
        interval: steps of the classifier between two updates of the weights.
        warmup: share of all steps during which weights are 1 and nothing is learned of them.
        outer_labels: "training": the outer loss is taken on the labelled images that are also
            trained on; "held_out": half of each class is kept for the outer loss alone.
        fit_steps: Adam steps on the Confidence Network in one update.
        fit_batch: images in one of them.
        proximity: strength of the pull of the weights towards 1, so that they cannot collapse
            onto few images.
    """

    weights: Literal["hard", "soft"] = "hard"
    width: int = 8
    learning_rate: float = 6e-3
    weight_decay: float = 1e-2
    interval: int = 48
    warmup: float = 0.2
    outer_labels: Literal["training", "held_out"] = "training"
    fit_steps: int = 4
    fit_batch: int = 128
    proximity: float = 1.0

    def __post_init__(self) -> None:
        group = "training.weighting"
        require_choice(f"{group}.weights", self.weights, ("hard", "soft"))
        require_multiple(f"{group}.width", self.width, 4, "GroupNorm has 4 groups")
        require_number(f"{group}.learning_rate", self.learning_rate, 0, 10, above=True)
        require_number(f"{group}.weight_decay", self.weight_decay, 0, 10)
        require_integer(f"{group}.interval", self.interval, 1)
        require_number(f"{group}.warmup", self.warmup, 0, 1)
        require_choice(f"{group}.outer_labels", self.outer_labels, ("training", "held_out"))
        require_integer(f"{group}.fit_steps", self.fit_steps, 1)
        # The weights of a batch have mean 1: a single one would always be 1.
        require_integer(f"{group}.fit_batch", self.fit_batch, 2)
        require_number(f"{group}.proximity", self.proximity, 0, 1e6)


@dataclass(frozen=True)
class InfluenceConfig:
    """How the influence of unlabelled images on the outer loss is measured.

    Attributes:
        solver: the IHVP method.
        max_products: curvature products that one solve may spend.
        damping: δ as a multiple of the curvature's largest eigenvalue.
        outer_batch: labelled images, strongly augmented, in one estimate of the outer gradient.
        curvature_batch: unlabelled images in the curvature.
        batch: unlabelled images whose influence is measured in one pass.
        measurements: measurements at the classifier that a round or a stage ends with; at least 2,
            as their spread is the error of their mean.
        memory: weight of the past in an image's running mean of influence; 0 for none.
    """

    solver: SolverName = "conjugate_gradient"
    max_products: int = 3
    damping: float = 1.0
    outer_batch: int = 64
    curvature_batch: int = 24
    batch: int = 128
    measurements: int = 6
    memory: float = 0.9

    def __post_init__(self) -> None:
        group = "training.influence"
        require_choice(f"{group}.solver", self.solver, get_args(SolverName))
        require_integer(f"{group}.max_products", self.max_products, 2)
        require_number(f"{group}.damping", self.damping, 0, 1e6, above=True)
        for name in ("outer_batch", "curvature_batch", "batch"):
            require_integer(f"{group}.{name}", getattr(self, name), 1)
        require_integer(f"{group}.measurements", self.measurements, 2)
        require_number(f"{group}.memory", self.memory, 0, 1)


@dataclass(frozen=True)
class RankingConfig:
    """How the pool is ranked between stages or rounds, and how much of it is kept.

    Attributes:
        steps: Adam steps on the MLPs of the head that ranks the pool.
        batch: images in one of them, half of them labelled; even.
        learning_rate: step size of Adam.
        weight_decay: decoupled weight decay.
        contamination_level: the chance that the pool is clean, as the arm `learned` sees it, or
            the p of a test of other arms, below which it is not kept whole; at 0 every pool is
            kept whole, at 1 every one is taken for contaminated.
    """

    steps: int = 75
    batch: int = 256
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    contamination_level: float = 0.2

    def __post_init__(self) -> None:
        group = "training.ranking"
        require_integer(f"{group}.steps", self.steps, 1)
        require_multiple(f"{group}.batch", self.batch, 2, "half of it is labelled")
        require_number(f"{group}.learning_rate", self.learning_rate, 0, 10, above=True)
        require_number(f"{group}.weight_decay", self.weight_decay, 0, 10)
        require_number(f"{group}.contamination_level", self.contamination_level, 0, 1, below=False)


@dataclass(frozen=True)
class TwoStagesConfig:
    """The schedule two_stages.

    Attributes:
        first_share: steps of the first stage as a share of those of the second.
    """

    first_share: float = 0.5

    def __post_init__(self) -> None:
        require_number("training.two_stages.first_share", self.first_share, 0, 10, above=True)


@dataclass(frozen=True)
class TrainingConfig:
    """FixMatch (Sohn et al., 2020, section 2) and its optimiser.

    Attributes:
        network: name in `semisup.parts.networks`; "small_cnn" for images of about 8×8,
            "wrn_28_2" for 32×32, or a network that is trained on photographs already:
            "efficientnet_lite0", "torchvision/<name>" or "timm/<name>".
        weights: of such a network: "packaged" (of efficientnet_lite0), "DEFAULT" (its library
            fetches what it publishes), the path of a state dict or of a .safetensors file, or
            "none": it is trained from scratch.
        fine_tune: what is trained of a network with weights, besides its head: "none", the "last"
            two blocks, or "all". The statistics of BatchNorm are frozen in any case.
        width: first-layer channels of "small_cnn".
        steps: steps K of the arms whose compute is "equal".
        batch_size: labelled images in a step, B.
        unlabelled_ratio: µ; a step sees µB unlabelled images.
        threshold: τ, the confidence from which a pseudo-label counts.
        unlabelled_weight: λ_u.
        distribution_alignment: whether pseudo-labels' probabilities are multiplied by the ratio
            of the labelled images' classes to those predicted (Berthelot et al., 2020). Arms
            whose alignment is "opposite" do the opposite.
        learning_rate: step size of SGD with Nesterov momentum; it decays as cos(7πk/16K).
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD, on kernels alone. On 16 paired
            seeds of digits, decay of all parameters changes FixMatch by +0.4 points (−0.8 to +1.6).
        ema: decay of the exponential moving average of the weights, which is evaluated.
        snapshots: how often, evenly over the run, the weights of the whole pool are recorded.
        checkpoint_every: steps between two checkpoints that a killed run resumes from.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        precision: "float32", "float64", or "bfloat16" for the classifier's passes (autocast), where
            parameters, their average, hypergradients and weights stay in single precision.
        channels_last: whether images and kernels lie in memory with channels last.
        compile: whether `torch.compile` prepares the classifier; its minute or so counts.
        deterministic: whether only repeatable algorithms are used on a GPU.
        pool_memory: "device", "sharded" (a part on the device of each process), "host" (pinned), or
            "auto": the first of them that takes at most a quarter of a GPU's free memory.
        augmentation: see `AugmentationConfig`.
        features: see `FeaturesConfig`.
        weighting: see `WeightingConfig`.
        influence: see `InfluenceConfig`.
        ranking: see `RankingConfig`.
        two_stages: see `TwoStagesConfig`.
    """

    network: str = "small_cnn"
    weights: str = "none"
    fine_tune: Literal["none", "last", "all"] = "none"
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
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    pool_memory: PoolMemory = "auto"
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    ranking: RankingConfig = field(default_factory=RankingConfig)
    two_stages: TwoStagesConfig = field(default_factory=TwoStagesConfig)

    def __post_init__(self) -> None:
        for name, kind in _GROUPS.items():
            group: Any = require_group(f"training.{name}", getattr(self, name), kind)
            object.__setattr__(self, name, group)
        if not isinstance(self.network, str) or not self.network:
            raise ValueError(f"training.network must be a name, got {self.network!r}")
        self._require_weights()
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
        require_choice("training.precision", self.precision, ("float32", "bfloat16", "float64"))
        require_choice("training.pool_memory", self.pool_memory, get_args(PoolMemory))
        for name in ("distribution_alignment", "channels_last", "compile", "deterministic"):
            require_boolean(f"training.{name}", getattr(self, name))

    def _require_weights(self) -> None:
        """Require that the network, its weights and what is trained of it fit."""
        if not isinstance(self.weights, str) or not self.weights:
            raise ValueError(
                f"training.weights must be none, packaged, DEFAULT or a path, got {self.weights!r}"
            )
        require_choice("training.fine_tune", self.fine_tune, ("none", "last", "all"))
        if self.weights != "none":
            require_backbone(self.network, self.weights)
        elif self.fine_tune != "none":
            raise ValueError(
                f"training.fine_tune {self.fine_tune!r} needs weights to start from; set "
                "training.weights, or leave training.fine_tune at none"
            )
        elif family_of(self.network) is not None:
            require_packages(self.network, self.weights)

    @property
    def frozen(self) -> bool:
        """Whether the network's pretrained trunk stays as it is and the head alone is trained."""
        return self.weights != "none" and self.fine_tune == "none"


_GROUPS: dict[str, type] = {
    "augmentation": AugmentationConfig,
    "features": FeaturesConfig,
    "weighting": WeightingConfig,
    "influence": InfluenceConfig,
    "ranking": RankingConfig,
    "two_stages": TwoStagesConfig,
}


@dataclass(frozen=True)
class RunsConfig(EngineConfig):
    """Which runs are done, how many at a time, and where (see `EngineConfig`).

    Attributes:
        arms: names of arms, a list or joined by "+".
        schedule: schedules, a list or joined by "+"; an arm that fits none is trained online.
        rounds: number of rounds of the schedule `rounds`.
        workers: runs at a time; "auto": one a core, or one on a GPU.
        processes: how many train a run together, one run after another, where `engine` says.
        time_limit: how long a command may take, such as "15m"; steps and seeds follow it, or None.
    """

    arms: tuple[str, ...] = field(default_factory=arm_names)
    schedule: tuple[Schedule, ...] = ("rounds",)
    rounds: int = 4
    workers: int | Literal["auto"] = "auto"
    processes: int = 1
    time_limit: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", require_arms("runs.arms", self.arms))
        if self.time_limit is not None and self.seconds() <= 0:
            raise ValueError(
                "runs.time_limit must be a number with s, m or h, such as 15m, got "
                f"{self.time_limit!r}"
            )
        given: Any = self.schedule
        schedules = given.split("+") if isinstance(given, str) else given
        object.__setattr__(self, "schedule", require_list("runs.schedule", schedules))
        for schedule in self.schedule:
            require_choice("runs.schedule", schedule, SCHEDULES)
        for name in ("rounds", "processes"):
            require_integer(f"runs.{name}", getattr(self, name), 1)
        self.check_engine("runs")
        if self.rounds > MAX_ROUNDS:
            raise ValueError(f"runs.rounds must be at most {MAX_ROUNDS}, got {self.rounds}")
        if self.workers != "auto":
            require_integer("runs.workers (or auto)", self.workers, 1)
        if not any(get_arm(arm).schedules_among(self.schedule) for arm in self.arms):
            raise ValueError(
                f"runs.arms: {', '.join(self.arms)} can be trained in rounds alone; set "
                "runs.schedule to rounds, or add another arm"
            )

    def seconds(self) -> float:
        """The time limit in seconds; 0 where there is none or it cannot be read."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", str(self.time_limit))
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0


def require_effect(given: Mapping[str, Any], arms: Sequence[str], runs: RunsConfig) -> None:
    """Require that every group of `training` that is set has an effect on some run.

    Args:
        given: what is set of the group `training`, by the names of its fields.
        arms: names of the arms that are trained.
        runs: their schedules.

    Raises:
        ValueError: if a parameter has no effect; it says which arm or schedule would read it.
    """
    read = {
        group
        for arm in map(get_arm, arms)
        for schedule in arm.schedules_among(runs.schedule)
        for group in GROUPS_OF_SCHEDULE[schedule]
        if group in (*arm.reads, "two_stages") and arm.weighs
    }
    for group in _GROUPS.keys() - {"augmentation", "features"}:
        if given.get(group) and group not in read:
            name = next(iter(given[group]))
            schedules = [s for s, groups in GROUPS_OF_SCHEDULE.items() if group in groups]
            raise ValueError(
                f"training.{group}.{name} has no effect on these runs: it is read by the schedules "
                f"{' and '.join(schedules)}, here runs.schedule is {'+'.join(runs.schedule)} and "
                f"runs.arms are {'+'.join(arms)}; leave it out, or change one of them"
            )
