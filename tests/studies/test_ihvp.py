import pytest

from weighmatch.studies.config import StudyConfig
from weighmatch.studies.ihvp import compare_methods


def test_the_study_finds_what_theory_says(training_set):
    config = StudyConfig(hidden=4, pool=30, steps=60, dampings=(0.1,), budgets=(5, 40), seeds=1)
    table = compare_methods(training_set, config, seed=0).set_index(["method", "max_products"])
    assert (table["products"] <= table.index.get_level_values("max_products")).all()
    cg, neumann = table.loc[("conjugate_gradient", 40)], table.loc[("neumann", 40)]
    assert cg["ihvp_error"] < 1e-6
    assert cg["ihvp_error"] < neumann["ihvp_error"] < table.loc[("identity", 1)]["ihvp_error"]
    assert (table["ihvp_error"] <= table["error_bound"] * (1 + 1e-6) + 1e-10).all()
    assert cg["hypergradient_cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"hidden": 0}, "ihvp_analysis.hidden"),
        ({"dampings": []}, "ihvp_analysis.dampings"),
        ({"dampings": [0.0]}, "ihvp_analysis.dampings"),
        ({"budgets": [2]}, "ihvp_analysis.budgets"),
        ({"budgets": 5}, "ihvp_analysis.budgets"),
    ],
)
def test_wrong_parameters_are_named(wrong, name):
    with pytest.raises(ValueError, match=name):
        StudyConfig(**wrong)
