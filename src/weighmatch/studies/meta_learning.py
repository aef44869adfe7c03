"""The study of implicit meta-learning: generalisation, forgetting, instability, efficiency.

Every experiment is a list of runs of `weighmatch.studies.iml.train`; one table holds them all.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from weighmatch.studies.iml import Training, gradient_memory, train
from weighmatch.studies.kept import finish_jobs
from weighmatch.studies.meta_config import MetaLearningConfig
from weighmatch.studies.names import DISTURBANCES, LABELLED, REMEDIES
from weighmatch.studies.problems import PROBLEMS, Size
from weighmatch.studies.snapshots import influence_quality

# Exact curvature of more parameters than this is out of reach of a study.
LARGEST_EXACT = 1500
# Columns of `iml.train` that a run has only where it measures them.
SOMETIMES = (
    "retrained_accuracy",
    "residual",
    "status",
    "cosine",
    "batch_cosine",
    "unguarded_residual",
    "low_share",
    "largest_eigenvalue",
    "step_sharpness",
)
# Networks of more parameters have one seed, fewer methods and half of the steps.
LARGE = 50_000
# Methods of the study of efficiency for networks that are not large.
SMALL_ONLY = ("neumann", "nystrom")
# Methods that need inner steps, or have nothing to differentiate.
ONLINE = ("none", "unrolled", "sama")
FORGETTING_METHODS = ("identity", "neumann", "conjugate_gradient", "exact")
# How far Adam can move the logarithm of a weight decay where instability is mapped.
TRAVEL = 9.9


@dataclass(frozen=True)
class Run:
    """One training of the study.

    Attributes:
        experiment: "generalisation", "map", "forgetting", "instability" or "efficiency".
        case: what the experiment varies, in words.
        problem: name of the problem.
        size: how large the problem is.
        training: how it is trained on.
        seed: seed of data, initial parameters and mini-batches.
        memory: whether the peak memory of one hypergradient is measured too.
    """

    experiment: str
    case: str
    problem: str
    size: Size
    training: Training
    seed: int
    memory: bool = False


def generalisation(config: MetaLearningConfig) -> Iterator[Run]:
    """All methods on the first problem, the core ones on the others, online and converged."""
    online = Training(
        outer_steps=config.outer_steps,
        inner_steps=config.inner_steps[0],
        budget=config.budget,
        curvature="gauss_newton",
    )
    # As far as online training moves φ, in a third of the steps.
    converged = replace(online, converge=True, outer_steps=max(1, config.outer_steps // 3))
    exact = ("exact",) if config.exact_everywhere else ()
    core = (*config.core_methods, *exact)
    for problem in config.problems:
        size = _size(config, problem)
        methods = config.methods if problem == config.problems[0] else core
        for method, seed in itertools.product(dict.fromkeys(methods), config.seeds):
            training = replace(online, method=method)
            yield Run("generalisation", "online", problem, size, training, seed)
        if problem in config.converged_problems:
            rate = 3 * PROBLEMS[problem].outer_rate
            methods = tuple(dict.fromkeys(m for m in core if m not in ONLINE))
            for method, seed in itertools.product(methods, config.seeds):
                training = replace(converged, method=method, outer_rate=rate)
                yield Run("generalisation", "converged", problem, size, training, seed)


def overfitting(config: MetaLearningConfig) -> Iterator[Run]:
    """Number of outer images × damping × T, and the exact hypergradient, on some problems."""
    methods = [*(("conjugate_gradient", damping) for damping in config.dampings), ("exact", 0.0)]
    for problem, images, steps, (method, damping), seed in itertools.product(
        config.map_problems, config.outer_images, config.inner_steps, methods, config.seeds
    ):
        # Softmax regression: its Hessian is its Gauss-Newton matrix, so that there is an exact
        # hypergradient at every point.
        size = replace(_size(config, problem), outer=images, hidden=0)
        training = Training(
            method=method,
            outer_steps=config.outer_steps,
            inner_steps=steps,
            budget=config.budget,
            damping=damping,
        )
        yield Run("map", f"T = {steps}", problem, size, training, seed)


def forgetting(config: MetaLearningConfig) -> Iterator[Run]:
    """A weight decay for every parameter, with the confounders taken away one by one.

    "as usual": a step of inner descent that suits the start, and the same α in Neumann's series.
    "stable step": α follows λ_max. "large outer set": four times the images besides. "converged":
    θ is minimised for every φ, so that there is neither a step to be too long nor a point that is
    not stationary.
    """
    size = replace(_size(config, "weight_decay"), l2=1e-3)
    large = replace(size, outer=4 * size.outer)
    own_rate = PROBLEMS["weight_decay"].outer_rate
    online = Training(
        outer_steps=config.forgetting_steps,
        inner_steps=config.inner_steps[0],
        budget=config.budget,
        damping=0.0,
        diagnose=max(1, config.forgetting_steps // 3),
        retrain=True,
        # Fast enough to see in these steps what slower learning sees later.
        outer_rate=1.5 * own_rate,
    )
    usual = replace(online, automatic_step=False, neumann_step=True)
    # A minimum is further from the last one than T steps go: fewer updates, each three times as
    # far.
    fewer = max(1, config.forgetting_steps // 6)
    converged = replace(
        online,
        converge=True,
        outer_steps=fewer,
        outer_rate=4.5 * own_rate,
        diagnose=max(1, fewer // 3),
    )
    cases = (
        ("as usual", size, usual),
        ("stable step", size, online),
        ("large outer set", large, online),
        ("converged", size, converged),
        ("converged, large outer set", large, converged),
    )
    methods, seeds = FORGETTING_METHODS, config.seeds[: config.forgetting_seeds]
    for (case, drawn, training), method, seed in itertools.product(cases, methods, seeds):
        chosen = replace(training, method=method)
        yield Run("forgetting", case, "weight_decay", drawn, chosen, seed)


def instability(config: MetaLearningConfig) -> Iterator[Run]:
    """Sources of instability × α·λ_max, without and with remedies."""
    short = Training(
        method="neumann",
        budget=max(4, config.budget // 2),
        damping=0.0,
        outer_steps=config.outer_steps,
        # Far enough for a decay to grow to where α·λ_max is 2, at a step that suits the start.
        outer_rate=TRAVEL / config.outer_steps,
        inner_steps=max(2, config.inner_steps[0] // 2),
        automatic_step=False,
        neumann_step=True,
        # Once, when most of the way is gone.
        diagnose=max(1, config.outer_steps * 3 // 4),
    )
    every = {k: v for settings in REMEDIES.values() for k, v in settings.items()}
    cures: dict[str, dict[str, Any]] = {"without": {}}
    cures |= {remedy: REMEDIES[remedy] for remedy in config.remedies}
    if "backtracking" in cures:
        others = {k: v for k, v in every.items() if k not in REMEDIES["backtracking"]}
        cures["all but backtracking"] = others
    cures["all"] = every
    middle = config.steps[len(config.steps) // 2]
    for source, (remedy, cure) in itertools.product(config.sources, cures.items()):
        normalised = "BatchNorm" in source
        size = replace(_size(config, "weight_decay"), l2=1e-3, normalised=normalised)
        steps = config.steps if remedy in ("without", "all") else (middle,)
        for step, seed in itertools.product(steps, config.seeds[: config.instability_seeds]):
            training = replace(short, step=step, **(DISTURBANCES[source] | cure))
            case = f"{source} | {remedy}"
            yield Run("instability", case, "weight_decay", size, training, seed)


def efficiency(config: MetaLearningConfig) -> Iterator[Run]:
    """Accuracy against gradients and memory, from small networks to large ones."""
    problem = config.problems[0]
    for width in config.widths:
        parameters = 75 * width
        is_large = parameters > LARGE
        choices = [("none", 4), ("identity", 4), ("darts", 4)]
        iterative = ["conjugate_gradient", "unrolled", *([] if is_large else SMALL_ONLY)]
        choices += itertools.product(iterative, config.budgets)
        if parameters <= LARGEST_EXACT:
            choices.append(("exact", 4))
        seeds = config.seeds[: 1 if is_large else config.efficiency_seeds]
        for (method, budget), seed in itertools.product(choices, seeds):
            training = Training(
                method=method,
                budget=budget,
                curvature="gauss_newton",
                damping=0.1,
                outer_steps=max(1, config.outer_steps // (6 if is_large else 3)),
                inner_steps=config.inner_steps[0],
                dtype="float32",
                outer_rate=(4 if is_large else 2) * PROBLEMS[problem].outer_rate,
            )
            size = replace(_size(config, problem), hidden=width)
            memory = seed == seeds[0] and method != "none"
            case = f"P = {parameters + 10}"
            yield Run("efficiency", case, problem, size, training, seed, memory)


def run_all(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    config: MetaLearningConfig,
    folder: Path | str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every training of the study, and the influence in FixMatch's snapshots.

    Args:
        images: digits, (N, 1, 8, 8).
        labels: their classes, (N,).
        config: what is run.
        folder: keeps what is finished, so that a study started again goes on; None: nothing is.

    Returns:
        A row an outer step of every training: `experiment`, `case`, `problem`, `parameters`,
        `outer_images`, the fields of `Training`, `seed`, `memory` (peak bytes of one
        hypergradient, where measured), and the columns of `iml.train`.
        And the table of `influence_quality`.
    """
    experiments = (efficiency, forgetting, generalisation, overfitting, instability)
    runs = [run for experiment in experiments for run in experiment(config)]
    # Remedies of what does no harm leave a training as it is: it is run once.
    numbers: dict[tuple[Any, ...], int] = {}
    for i, run in enumerate(runs):
        numbers.setdefault(_training_of(run), i)
    # The longest first, so that no core waits at the end.
    order = sorted(numbers.values(), key=lambda i: -_weight(runs[i]))
    seeds = config.snapshots.seeds
    jobs: list[tuple[Callable[..., pd.DataFrame], tuple[Any, ...]]] = [
        # What a job is known by must not change with the other seeds.
        *(
            (influence_quality, (images, labels, replace(config.snapshots, seeds=(seed,)), seed))
            for seed in seeds
        ),
        *((_train, (images, labels, runs[i])) for i in order),
    ]
    found = finish_jobs(jobs, config.workers, folder, "FixMatch snapshots and IML trainings")
    trained = dict(zip(order, found[len(seeds) :], strict=True))
    tables = [_described(run, trained[numbers[_training_of(run)]]) for run in runs]
    return _stacked(tables), pd.concat(found[: len(seeds)], ignore_index=True)


def _stacked(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """One table with the columns of all; those that no run has are empty."""
    steps = pd.concat(tables, ignore_index=True)
    return steps.reindex(columns=[*steps, *(c for c in SOMETIMES if c not in steps)])


def perform(images: NDArray[np.uint8], labels: NDArray[np.int64], run: Run) -> pd.DataFrame:
    """The rows of one training."""
    return _described(run, _train(images, labels, run))


def _training_of(run: Run) -> tuple[Any, ...]:
    """What is the same in two runs that are the same training."""
    training = run.training
    if training.automatic_step and not training.converge:
        training = replace(training, step=min(training.step, 1.0))
    return run.problem, run.size, training, run.seed, run.memory


def _train(images: NDArray[np.uint8], labels: NDArray[np.int64], run: Run) -> pd.DataFrame:
    kind = PROBLEMS[run.problem]
    dtype: torch.dtype = getattr(torch, run.training.dtype)
    digits = kind.draw(images, labels, run.size, run.seed)
    problem = kind(digits.to(dtype), run.size, run.seed)
    reference = None if dtype == torch.float64 else kind(digits, run.size, run.seed)
    # Mini-batches of different problems have nothing to do with one another.
    seed = run.seed + zlib.crc32(run.problem.encode()) % 10_000
    return pd.DataFrame(train(problem, run.training, seed, reference)).assign(
        parameters=sum(p.numel() for p in problem.initial.values()),
        batch=run.training.batch or problem.examples,
        memory=gradient_memory(problem, run.training) if run.memory else np.nan,
    )


def _described(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of a training; the first columns say which one it is."""
    common = {
        "experiment": run.experiment,
        "case": run.case,
        "problem": run.problem,
        "parameters": rows["parameters"],
        "outer_images": run.size.outer,
        **asdict(run.training),
        "seed": run.seed,
        "memory": rows["memory"],
        "batch": rows["batch"],
    }
    table = rows.assign(**common)
    return table[[*common, *(c for c in rows if c not in common)]]


def _size(config: MetaLearningConfig, problem: str) -> Size:
    more = LABELLED if problem == "contaminated_pool" else 0
    return Size(
        inner=config.inner + more,
        outer=config.outer,
        label_noise=config.label_noise,
        hidden=config.hidden,
    )


def _weight(run: Run) -> float:
    """About how long a run takes, in inner gradients of a small network."""
    training = run.training
    a_step = 300 if training.converge else training.inner_steps
    a_step += 100 if training.method == "exact" else 2 * training.budget
    if training.diagnose:
        a_step += 200 // training.diagnose
    return training.outer_steps * a_step * max(1.0, 75 * run.size.hidden / 10_000)
