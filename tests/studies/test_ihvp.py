import numpy as np
import pytest

from weighmatch.data.sources.digits import load_digits
from weighmatch.studies.config import StudyConfig
from weighmatch.studies.ihvp import compare_all
from weighmatch.studies.memory import measure_memory

SMALL = {
    "networks": ("mlp-4",),
    "seeds": (0,),
    "inner": 60,
    "outer": 60,
    "steps": 60,
    "stages": (0.0, 1.0),
    "l2": (0.05,),
    "dampings": (0.1, 0.01),
    "budgets": (5, 10, 40),
    "batches": 2,
    "batch_size": 30,
    "memory_sizes": (1000, 10_000),
    "workers": 1,
}


@pytest.fixture(scope="module")
def study():
    return compare_all(*load_digits(), StudyConfig(**SMALL))


@pytest.mark.integration
def test_the_study_finds_what_theory_says(study):
    table = study[0]
    end = table[(table["stage"] == "1.0") & (table["damping_ratio"] == 0.1)]
    end = end[(end["dtype"] == "float64") & (end["batch"] == -1)]
    end = end.set_index(["method", "max_products"])
    cg, neumann = end.loc[("conjugate_gradient", 40)], end.loc[("neumann", 40)]
    assert cg["ihvp_error"] < 1e-6
    assert cg["ihvp_error"] < neumann["ihvp_error"] < end.loc[("identity", 1)]["ihvp_error"]
    assert cg["hypergradient_cosine"] == pytest.approx(1, abs=1e-6)
    # Unrolling K steps is a series of K terms; Neumann's has fewer, some products found λ_max.
    unrolled = end.loc[("unrolled", 40)]["hypergradient_error"]
    assert cg["hypergradient_error"] < unrolled < neumann["hypergradient_error"]
    assert end.loc[("exact", 310)]["hypergradient_error"] == 0


@pytest.mark.integration
def test_every_certificate_of_the_study_holds(study):
    known = study[0].dropna(subset=["error_bound", "true_error"])
    assert len(known) > 50
    assert (known["true_error"] <= known["error_bound"] * (1 + 1e-6) + 1e-10).all()


@pytest.mark.integration
def test_stages_precisions_and_batches_are_there(study):
    table, spectra = study
    assert {"0.0", "1.0", "indefinite"} == set(table["stage"])
    assert {"float32", "float64"} == set(table["dtype"])
    assert {-1, 0, 1} == set(table["batch"])
    assert (spectra.groupby("stage").size() == 310).all()
    assert spectra.loc[spectra["stage"] == "indefinite", "eigenvalue"].min() < 0
    assert np.isfinite(table["hypergradient_error"]).all()


@pytest.mark.integration
def test_a_training_so_short_that_stages_fall_together():
    config = {**SMALL, "steps": 3, "stages": (0.0, 0.1, 0.2), "budgets": (5,), "batches": 0}
    table, _ = compare_all(*load_digits(), StudyConfig(**{**config, "dampings": (0.1,)}))
    assert set(table["stage"]) >= {"0.0", "0.1", "0.2"}


def test_memory_is_linear_in_the_number_of_parameters():
    memory = measure_memory(StudyConfig(**SMALL)).pivot(
        index="method", columns="parameters", values="vectors"
    )
    small, large = memory.iloc[:, 0], memory.iloc[:, 1]
    assert (large <= 1.3 * small + 1).all()
    assert large["conjugate_gradient"] < 15
    assert large["nystrom, rank 40"] > 3 * large["nystrom, rank 10"]


@pytest.mark.integration
def test_two_processes_say_what_one_says():
    config = {**SMALL, "networks": ("softmax",), "batches": 0, "budgets": (5,), "stages": (0.0,)}
    config = {**config, "dampings": (0.1,), "indefinite": False}
    numbers = ["hypergradient_error", "hypergradient_cosine", "ihvp_error"]
    found = [
        compare_all(*load_digits(), StudyConfig(**{**config, "seeds": (0, 1), "workers": workers}))
        for workers in (1, 2)
    ]
    one, two = (table.loc[table["dtype"] == "float64", numbers].to_numpy() for table, _ in found)
    np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"networks": ("mlp",)}, "ihvp_analysis.networks 'mlp' is unknown; give softmax"),
        ({"networks": ("cnn-3",)}, "a multiple of 4"),
        ({"networks": ("vit-3",)}, "choose from softmax, mlp, cnn"),
        ({"dampings": ()}, "ihvp_analysis.dampings must be a list"),
        ({"dampings": (-1.0,)}, "ihvp_analysis.dampings must be a number at least 0"),
        ({"stages": (0.0, 2.0)}, "ihvp_analysis.stages must be a number at least 0 and at most 1"),
        ({"l2": (0.0,)}, "ihvp_analysis.l2 must be a number above 0"),
        ({"budgets": (2,)}, "ihvp_analysis.budgets must be an integer of at least 4"),
        ({"budgets": 5}, "ihvp_analysis.budgets must be a list"),
        ({"inner": 1700, "outer": 300}, "at most the 1797 digits"),
        ({"batch_size": 61}, "ihvp_analysis.batch_size must be at most"),
        ({"workers": 0}, "ihvp_analysis.workers"),
        ({"indefinite": 1}, "ihvp_analysis.indefinite must be true or false"),
    ],
)
def test_bad_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        StudyConfig(**{**SMALL, **wrong})
