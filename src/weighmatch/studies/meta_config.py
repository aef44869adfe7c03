"""Parameters of the meta-learning study (`params:meta_learning_analysis`)."""

from dataclasses import dataclass, field
from typing import Literal

from weighmatch.checks import require_boolean, require_group, require_seeds
from weighmatch.studies.checking import (
    check_fields,
    choice,
    each,
    integer,
    number,
    workers,
)
from weighmatch.studies.methods import METHOD_NAMES, require_method
from weighmatch.studies.names import (
    DISTURBANCES,
    LABELLED,
    MISMATCH,
    PROBLEM_NAMES,
    REMEDIES,
    TEST_IMAGES,
)
from weighmatch.studies.snapshot_config import SnapshotConfig

GROUP = "meta_learning_analysis"


@dataclass(frozen=True)
class MetaLearningConfig:
    """What is run, and how long.

    Attributes:
        seeds: seeds of the study of generalisation; everything else takes the first so many.
        problems: names of `weighmatch.studies.problems`.
        map_problems: problems in the map of generalisation.
        methods: methods of the widest comparison, on the first problem.
        core_methods: methods of all other comparisons.
        exact_everywhere: whether the exact hypergradient is among the core methods everywhere.
        converged_problems: problems that are also trained to convergence for every φ.
        inner: number of inner images (the contaminated pool has 24 labelled ones besides).
        outer: number of outer images, save where it is varied.
        outer_images: numbers of outer images in the map of generalisation.
        dampings: δ/λ_max in that map.
        inner_steps: T in that map; the first is T everywhere else.
        label_noise: share of wrong labels.
        hidden: width of the MLP.
        outer_steps: number of updates of φ.
        budget: number of products.
        forgetting_seeds: number of seeds of the study of forgetting.
        forgetting_steps: number of updates of φ there.
        steps: α·λ_max at the start in the map of instability.
        sources: sources of instability, names of `names.DISTURBANCES`.
        remedies: names of `names.REMEDIES`. "all" puts all of them together, whatever is listed
            here, and "all but backtracking" all but that one.
        instability_seeds: number of seeds of that map.
        widths: widths of the MLPs of the study of efficiency; P is 75 times the width.
        budgets: numbers of products there.
        efficiency_seeds: number of seeds there; one for networks of more than 50,000 parameters.
        snapshots: parameters of the study of influence in FixMatch.
        workers: number of processes; "auto": one a core.
    """

    seeds: tuple[int, ...] = tuple(range(10))
    problems: tuple[str, ...] = (
        "example_weights",
        "weight_decay",
        "weighing_network",
        "distillation",
        "contaminated_pool",
    )
    map_problems: tuple[str, ...] = ("example_weights",)
    methods: tuple[str, ...] = METHOD_NAMES
    core_methods: tuple[str, ...] = ("none", "identity", "conjugate_gradient", "unrolled")
    exact_everywhere: bool = False
    converged_problems: tuple[str, ...] = ("example_weights",)
    inner: int = 100
    outer: int = 100
    outer_images: tuple[int, ...] = (25, 400)
    dampings: tuple[float, ...] = (0.0, 0.1, 1.0)
    inner_steps: tuple[int, ...] = (20, 5)
    label_noise: float = 0.4
    hidden: int = 8
    outer_steps: int = 20
    budget: int = 20
    forgetting_seeds: int = 5
    forgetting_steps: int = 40
    steps: tuple[float, ...] = (0.5, 1.5, 2.5)
    sources: tuple[str, ...] = tuple(DISTURBANCES)
    remedies: tuple[str, ...] = tuple(REMEDIES)
    instability_seeds: int = 3
    widths: tuple[int, ...] = (13, 133, 1333, 13333)
    budgets: tuple[int, ...] = (5, 20)
    efficiency_seeds: int = 2
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    workers: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_fields(
            self,
            GROUP,
            {
                "seeds": require_seeds,
                "problems converged_problems map_problems": each(choice(PROBLEM_NAMES)),
                "methods core_methods": each(require_method),
                "sources": each(choice(tuple(DISTURBANCES))),
                "remedies": each(choice(tuple(REMEDIES))),
                "outer_images inner_steps widths": each(integer(1)),
                "budgets": each(integer(4)),
                "dampings": each(number(0, 100, below=True)),
                "steps": each(number(0, 10, above=True, below=True)),
                "label_noise": number(0, 1),
                "inner": integer(21),  # more than the mini-batches of the map of instability
                "outer hidden outer_steps": integer(1),
                "forgetting_seeds instability_seeds efficiency_seeds": integer(1),
                "budget forgetting_steps": integer(4),
                "exact_everywhere": require_boolean,
                "workers": workers,
                "snapshots": lambda name, value: require_group(name, value, SnapshotConfig),
            },
        )
        for name in ("forgetting_seeds", "instability_seeds", "efficiency_seeds"):
            if getattr(self, name) > len(self.seeds):
                raise ValueError(
                    f"{GROUP}.{name} must be at most the number of {GROUP}.seeds "
                    f"({len(self.seeds)}), got {getattr(self, name)}"
                )
        for name in ("budget", "budgets"):
            largest = max(self.budgets) if name == "budgets" else self.budget
            if largest > self.inner_steps[0]:
                raise ValueError(
                    f"{GROUP}.{name} must be at most the first of {GROUP}.inner_steps "
                    f"({self.inner_steps[0]}), which unrolled differentiation goes through, "
                    f"got {largest}"
                )
        self._check_images()

    def _check_images(self) -> None:
        """Every experiment finds the images it needs among the digits."""
        test = TEST_IMAGES
        known = LABELLED + self.inner - round(MISMATCH * self.inner)
        mapped = max(self.outer_images)
        pool = mapped if "contaminated_pool" in self.map_problems else 0
        for needed, there, cure in (
            (self.inner + 4 * self.outer + test, 1797, "inner or outer"),
            (self.inner + mapped + test, 1797, "inner or outer_images"),
            (known + max(self.outer, pool) + test, 1083, "inner, outer or outer_images"),
        ):
            if needed > there:
                raise ValueError(
                    f"{GROUP} needs {needed} digits for inner {self.inner}, outer {self.outer} "
                    f"(four times it where forgetting is studied), outer_images "
                    f"{list(self.outer_images)} and {test} test images, and there are {there}; "
                    f"make {cure} smaller"
                )
