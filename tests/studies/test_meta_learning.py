"""The study as a whole, in a small setting."""

from dataclasses import replace

import pandas as pd
import pytest

from weighmatch.data.sources.digits import load_digits
from weighmatch.evaluation.meta_tables import RUN, compare_to, summarise_runs
from weighmatch.studies import meta_learning
from weighmatch.studies.meta_config import MetaLearningConfig
from weighmatch.studies.methods import METHOD_NAMES
from weighmatch.studies.names import DISTURBANCES, PROBLEM_NAMES, REMEDIES
from weighmatch.studies.problems import PROBLEMS
from weighmatch.studies.snapshot_config import SnapshotConfig
from weighmatch.studies.snapshots import influence_quality

SMALL = MetaLearningConfig(
    seeds=(0, 1),
    problems=("example_weights", "distillation"),
    methods=("none", "conjugate_gradient"),
    core_methods=("identity",),
    converged_problems=("distillation",),
    inner=30,
    outer=30,
    outer_images=(20,),
    dampings=(0.1,),
    inner_steps=(5,),
    hidden=3,
    outer_steps=2,
    budget=5,
    forgetting_seeds=1,
    forgetting_steps=4,
    steps=(1.0,),
    sources=("none", "bfloat16"),
    remedies=("damping",),
    instability_seeds=1,
    widths=(4,),
    budgets=(5,),
    efficiency_seeds=1,
    snapshots=SnapshotConfig(
        seeds=(0,),
        pool_size=80,
        steps=20,
        stages=(1.0,),
        dampings=(0.1,),
        copies=2,
        draws=1,
        curvature_batch=8,
        width=8,
        threshold=0.5,
    ),
    workers=1,
)


@pytest.fixture(scope="module")
def study():
    return meta_learning.run_all(*load_digits(), SMALL)


@pytest.mark.integration
def test_reruns_give_the_same_numbers(study):
    steps, quality = study
    runs = [
        next(iter(experiment(SMALL)))
        for experiment in (
            meta_learning.generalisation,
            meta_learning.overfitting,
            meta_learning.forgetting,
            meta_learning.instability,
            meta_learning.efficiency,
        )
    ]
    for run in runs:
        again = meta_learning.perform(*load_digits(), run)
        first = steps
        for column in RUN:
            first = first[first[column] == again[column].iloc[0]]
        pd.testing.assert_frame_equal(
            first[again.columns].reset_index(drop=True), again, check_exact=True, check_dtype=False
        )
    again = influence_quality(*load_digits(), SMALL.snapshots, 0)
    pd.testing.assert_frame_equal(quality, again, check_exact=True)


@pytest.mark.integration
def test_every_experiment_is_there_and_a_run_is_a_row(study):
    steps, quality = study
    experiments = {"generalisation", "map", "forgetting", "instability", "efficiency"}
    assert set(steps["experiment"]) == experiments
    runs = summarise_runs(steps)
    assert not runs.duplicated(list(RUN)).any()
    assert len(runs) == steps.groupby(list(RUN)).ngroups
    assert (runs["drop"] >= 0).all()
    assert runs.loc[runs["experiment"] == "efficiency", "memory"].notna().any()
    assert set(runs.loc[runs["experiment"] == "instability", "case"]) == {
        f"{source} | {remedy}"
        for source in ("none", "bfloat16")
        for remedy in ("without", "damping", "all")
    }
    compared = compare_to(runs)
    assert len(compared)
    assert compared["final"].notna().all()
    assert quality["auroc"].between(0, 1).all()


@pytest.mark.integration
def test_a_training_that_a_remedy_leaves_as_it_is_runs_once(monkeypatch):
    trained = []
    original = meta_learning._train
    monkeypatch.setattr(meta_learning, "_train", lambda *a: trained.append(a[2]) or original(*a))
    for other in ("efficiency", "forgetting", "generalisation", "overfitting"):
        monkeypatch.setattr(meta_learning, other, lambda config: [])
    monkeypatch.setattr(meta_learning, "influence_quality", lambda *_: pd.DataFrame())
    # One batch for curvature and mixed derivative is what there is without a remedy.
    small = replace(SMALL, sources=("none",), remedies=("shared batch",), steps=(1.0, 2.0))
    steps, _ = meta_learning.run_all(*load_digits(), small)
    rows = steps[(steps["experiment"] == "instability") & (steps["step"] == 2.0)]
    one, other = (rows[rows["case"] == f"none | {r}"] for r in ("without", "shared batch"))
    columns = ["outer_loss", "test_accuracy", "residual"]
    assert len(one) == 3
    pd.testing.assert_frame_equal(
        one[columns].reset_index(drop=True), other[columns].reset_index(drop=True)
    )
    cases = [r.case for r in trained if r.experiment == "instability"]
    assert "none | shared batch" not in cases
    # An automatic step is at most 1, so that two columns of the grid are one.
    assert cases.count("none | all") == 1


def test_names_of_problems_are_those_of_what_there_is():
    assert set(PROBLEMS) == set(PROBLEM_NAMES)


def test_the_default_study_covers_what_the_library_has():
    config = MetaLearningConfig()
    first = [r for r in meta_learning.generalisation(config) if r.case == "online"]
    assert {r.training.method for r in first} == set(METHOD_NAMES)
    assert {r.seed for r in first} == set(range(10))
    grid = list(meta_learning.instability(config))
    assert {r.case.split(" | ")[0] for r in grid} == set(DISTURBANCES)
    assert {r.case.split(" | ")[1] for r in grid} == {
        "without",
        "all but backtracking",
        "all",
        *REMEDIES,
    }
    ends = {r.case: r.training for r in grid if r.training.step == 1.5}
    for source in DISTURBANCES:
        others = ends[f"{source} | all but backtracking"]
        assert replace(others, backtrack=0.1) == ends[f"{source} | all"]
    forgetting = list(meta_learning.forgetting(config))
    assert {r.case for r in forgetting} == {
        "as usual",
        "stable step",
        "large outer set",
        "converged",
        "converged, large outer set",
    }
    methods = {"identity", "neumann", "conjugate_gradient", "exact"}
    for case in {r.case for r in forgetting}:
        assert {r.training.method for r in forgetting if r.case == case} == methods
    # Only "as usual" may leave the stability region.
    assert all(
        r.training.automatic_step or r.training.converge for r in forgetting if r.case != "as usual"
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"problems": ("weights",)}, "meta_learning_analysis.problems 'weights' is unknown"),
        ({"methods": ("newton",)}, "meta_learning_analysis.methods 'newton' is unknown"),
        ({"dampings": (-1.0,)}, "meta_learning_analysis.dampings must be a number at least 0"),
        ({"forgetting_seeds": 11}, "forgetting_seeds must be at most the number"),
        ({"sources": ("weather",)}, "meta_learning_analysis.sources 'weather' is unknown"),
        ({"snapshots": {"step": 3}}, "meta_learning_analysis.snapshots has no parameter step"),
        ({"outer_images": ()}, "meta_learning_analysis.outer_images must be a list"),
        ({"map_problems": ("weights",)}, "meta_learning_analysis.map_problems 'weights' is unk"),
        (
            {"map_problems": ("contaminated_pool",), "outer_images": (600,), "outer": 50},
            "make inner, outer or outer_images smaller",
        ),
        ({"outer": 300}, "meta_learning_analysis needs 1800 digits"),
        ({"budget": 21}, "meta_learning_analysis.budget must be at most the first"),
        ({"exact_everywhere": 1}, "meta_learning_analysis.exact_everywhere must be true or false"),
        ({"workers": 0}, "meta_learning_analysis.workers must be an integer"),
    ],
)
def test_a_wrong_parameter_is_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        MetaLearningConfig(**wrong)
