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
# Columns of `iml.train` that a run has where it measures them.
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
# More than these and one seed, fewer methods and half of the steps have to do.
LARGE = 50_000
# Hypergradients that need inner steps, or nothing to differentiate.
ONLINE = ("none", "unrolled", "sama")
# How far Adam can move the logarithm of a weight decay where instability is mapped.
TRAVEL = 9.9


@dataclass(frozen=True)
class Run:
    """One training of the study.

    Attributes:
        experiment: "generalisation", "map", "forgetting", "instability" or "efficiency".
        case: what the experiment varies, in words.
        problem: name.
        size: of the problem.
        training: how.
        seed: of data, initial parameters and mini-batches.
        memory: measure the peak memory of one hypergradient too.
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
    steps = config.inner_steps[0]
    online = Training(
        outer_steps=config.outer_steps,
        inner_steps=steps,
        budget=config.budget,
        curvature="gauss_newton",
    )
    # As far as online training moves φ, in a third of the steps.
    converged = replace(online, converge=True, outer_steps=max(1, config.outer_steps // 3))
    exact = ("exact",) if config.exact_everywhere else ()
    for number, problem in enumerate(config.problems):
        methods = config.methods if number == 0 else (*config.core_methods, *exact)
        for method in dict.fromkeys(methods):
            for seed in config.seeds:
                training = replace(online, method=method)
                yield Run(
                    "generalisation", "online", problem, _size(config, problem), training, seed
                )
        if problem not in config.converged_problems:
            continue
        rate = 3 * PROBLEMS[problem].outer_rate
        for method in dict.fromkeys((*(m for m in config.core_methods if m not in ONLINE), *exact)):
            for seed in config.seeds:
                training = replace(converged, method=method, outer_rate=rate)
                size = _size(config, problem)
                yield Run("generalisation", "converged", problem, size, training, seed)


def overfitting(config: MetaLearningConfig) -> Iterator[Run]:
    """Number of outer images × damping × T, and the exact hypergradient, on some problems."""
    for problem, images, steps in itertools.product(
        config.map_problems, config.outer_images, config.inner_steps
    ):
        # Softmax regression: its Hessian is its Gauss-Newton matrix, so that there is an exact
        # hypergradient at every point.
        size = replace(_size(config, problem), outer=images, hidden=0)
        damped = [("conjugate_gradient", damping) for damping in config.dampings]
        for method, damping in [*damped, ("exact", 0.0)]:
            training = Training(
                method=method,
                outer_steps=config.outer_steps,
                inner_steps=steps,
                budget=config.budget,
                damping=damping,
            )
            for seed in config.seeds:
                yield Run("map", f"T = {steps}", problem, size, training, seed)


def forgetting(config: MetaLearningConfig) -> Iterator[Run]:
    """A weight decay for every parameter, with the confounders taken away one by one.

    "as usual": a step of inner descent that suits the start, and the same α in Neumann's series.
    "stable step": α follows λ_max. "large outer set": four times the images besides. "converged":
    θ is minimised for every φ, so that there is neither a step to be too long nor a point that is
    not stationary.
    """
    size = replace(_size(config, "weight_decay"), l2=1e-3)
    online = Training(
        outer_steps=config.forgetting_steps,
        inner_steps=config.inner_steps[0],
        budget=config.budget,
        damping=0.0,
        diagnose=max(1, config.forgetting_steps // 3),
        retrain=True,
        # Fast enough to see in these steps what slower learning sees later.
        outer_rate=1.5 * PROBLEMS["weight_decay"].outer_rate,
    )
    usual = replace(online, automatic_step=False, neumann_step=True)
    # A minimum is further from the last one than T steps go: fewer updates, each three times as
    # far.
    fewer = max(1, config.forgetting_steps // 6)
    rate = 4.5 * PROBLEMS["weight_decay"].outer_rate
    converged = replace(
        online, converge=True, outer_steps=fewer, outer_rate=rate, diagnose=max(1, fewer // 3)
    )
    large = replace(size, outer=4 * size.outer)
    cases = (
        ("as usual", size, usual),
        ("stable step", size, online),
        ("large outer set", large, online),
        ("converged", size, converged),
        ("converged, large outer set", large, converged),
    )
    for case, drawn, training in cases:
        for method in ("identity", "neumann", "conjugate_gradient", "exact"):
            for seed in config.seeds[: config.forgetting_seeds]:
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
    others = {k: v for k, v in every.items() if k not in REMEDIES["backtracking"]}
    middle = config.steps[len(config.steps) // 2]
    alone = {remedy: REMEDIES[remedy] for remedy in config.remedies}
    cures: dict[str, dict[str, Any]] = {
        "without": {},
        **alone,
        **({"all but backtracking": others} if "backtracking" in alone else {}),
        "all": every,
    }
    for source in config.sources:
        harm = DISTURBANCES[source]
        size = replace(_size(config, "weight_decay"), l2=1e-3, normalised="BatchNorm" in source)
        for remedy, cure in cures.items():
            steps = config.steps if remedy in ("without", "all") else (middle,)
            for step in steps:
                training = replace(short, step=step, **(harm | cure))
                for seed in config.seeds[: config.instability_seeds]:
                    case = f"{source} | {remedy}"
                    yield Run("instability", case, "weight_decay", size, training, seed)


def efficiency(config: MetaLearningConfig) -> Iterator[Run]:
    """Accuracy against gradients and memory, from small networks to large ones."""
    problem = config.problems[0]
    for width in config.widths:
        parameters = 75 * width
        iterative: tuple[str, ...] = ("conjugate_gradient", "unrolled")
        if parameters <= LARGE:
            iterative = (*iterative, "neumann", "nystrom")
        seeds = config.seeds[: 1 if parameters > LARGE else config.efficiency_seeds]
        size = replace(_size(config, problem), hidden=width)
        choices = [("none", 4), ("identity", 4), ("darts", 4)]
        choices += [(method, budget) for method in iterative for budget in config.budgets]
        if parameters <= LARGEST_EXACT:
            choices.append(("exact", 4))
        for method, budget in choices:
            training = Training(
                method=method,
                budget=budget,
                curvature="gauss_newton",
                damping=0.1,
                outer_steps=max(1, config.outer_steps // (6 if parameters > LARGE else 3)),
                inner_steps=config.inner_steps[0],
                dtype="float32",
                outer_rate=(4 if parameters > LARGE else 2) * PROBLEMS[problem].outer_rate,
            )
            for seed in seeds:
                yield Run(
                    "efficiency",
                    f"P = {parameters + 10}",
                    problem,
                    size,
                    training,
                    seed,
                    memory=seed == seeds[0] and method != "none",
                )


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
    """Rows of a training with what they are of in front."""
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
