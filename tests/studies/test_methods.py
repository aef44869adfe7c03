"""The table of ways to a hypergradient, and how a new class of an IHVP finds its way into it."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from weighmatch.data.sources.digits import load_digits
from weighmatch.evaluation import ihvp_figures, meta_figures
from weighmatch.evaluation.meta_tables import summarise_runs
from weighmatch.implicit import Method
from weighmatch.implicit.method import Iterate
from weighmatch.studies.config import StudyConfig
from weighmatch.studies.ihvp import compare_all
from weighmatch.studies.iml import Training
from weighmatch.studies.memory import measure_memory
from weighmatch.studies.meta_config import MetaLearningConfig
from weighmatch.studies.meta_learning import SOMETIMES, Run, perform
from weighmatch.studies.methods import (
    ADDED_COLOURS,
    all_methods,
    get_method,
    get_methods,
    require_method,
)
from weighmatch.studies.problems import Size

STUDY = StudyConfig(
    networks=("softmax",),
    inner=30,
    outer=30,
    steps=3,
    stages=(0.5, 1.0),
    indefinite=False,
    dampings=(0.1,),
    budgets=(5, 10),
    batches=1,
    batch_size=20,
    memory_sizes=(1000,),
    workers=1,
)


@pytest.fixture
def forget():
    """Takes classes that a test defines out of the registry again."""
    before = dict(Method.registry)
    yield
    Method.registry.clear()
    Method.registry.update(before)


@pytest.fixture
def steepest_descent(forget):
    @dataclass(frozen=True, kw_only=True)
    class SteepestDescent(Method):
        """Descent with exact line search."""

        label = "steepest descent"
        max_products: int = 20

        def _iterate(self, op, unit, state):
            value, residual = 0 * unit, unit
            for _ in range(self.max_products // 2 - 1):
                product = self._damped(op, residual)
                step = (residual @ residual) / (residual @ product)
                value, residual = value + step * residual, residual - step * product
            return Iterate(value)

    return SteepestDescent


@pytest.mark.integration
def test_a_new_method_is_in_the_table_and_in_every_figure_of_the_ihvp_study(steepest_descent):
    table, _ = compare_all(*load_digits(), STUDY)
    rows = table[table["method"] == "steepest_descent"]
    assert {5, 10} == set(rows["max_products"])
    assert {"float32", "float64"} == set(rows["dtype"])
    base = ihvp_figures.base_cells(rows)
    ended = base[base["stage"] == "1.0"].set_index("max_products")["hypergradient_error"]
    assert ended[10] < ended[5] < 1
    memory = measure_memory(STUDY)
    assert "steepest_descent" in set(memory["method"])
    for figure in (
        ihvp_figures.draw_cost(table),
        ihvp_figures.draw_progress(table),
        ihvp_figures.draw_stability(table),
        ihvp_figures.draw_memory(memory),
    ):
        lines = [line for axes in figure.axes for line in axes.get_lines()]
        (found,) = {line.get_color() for line in lines if line.get_label() == "steepest descent"}
        assert found == ADDED_COLOURS[0]
    batches = ihvp_figures.draw_stability(table).axes[0]
    assert "steepest descent" in [label.get_text() for label in batches.get_yticklabels()]


def test_a_new_method_trains(steepest_descent):
    config = MetaLearningConfig(core_methods=("none", "steepest_descent"))
    assert config.core_methods[1] == "steepest_descent"
    training = Training(method="steepest_descent", outer_steps=2, inner_steps=4, budget=4)
    size = Size(inner=30, outer=30, test=30, hidden=0)
    run = Run("efficiency", "P = 650", "example_weights", size, training, 0, memory=True)
    steps = perform(*load_digits(), run)
    assert steps["residual"].iloc[0] > 0
    assert steps["test_accuracy"].notna().all()
    table = steps.reindex(columns=[*steps, *(name for name in SOMETIMES if name not in steps)])
    figure = meta_figures.draw_efficiency(summarise_runs(table))
    assert figure.legends[0].get_texts()[0].get_text() == "steepest descent"


def test_a_class_may_say_how_it_looks_and_two_have_different_colours(steepest_descent):
    class Plain(steepest_descent):
        label, colour, marker = "plain", "#123456", "v"

    class Other(steepest_descent):
        label = "other"

    first, plain, other = all_methods()[-3:]
    assert (plain.label, plain.colour, plain.marker) == ("plain", "#123456", "v")
    assert first.colour != other.colour
    assert first.budgeted
    assert get_method("other").build(0.1, 7) == Other(damping=0.1, max_products=7, shorten=False)


def test_a_method_that_is_no_more_can_still_be_drawn():
    identity, lost = get_methods(["old_method", "identity", "old_method"])
    assert (identity.name, lost.label) == ("identity", "old method")


def test_budgets_become_products_ranks_and_probes():
    assert get_method("neumann").build(0.1, 20, rtol=1e-12).rtol == 1e-12
    assert not get_method("neumann").build(0.1, 20).extrapolate
    assert get_method("nystrom").build(0.1, 20).rank == 17
    assert get_method("nystrom_plain").build(0.1, 20).rank == 19
    assert get_method("diagonal").build(0.1, 20).probes == 19
    preconditioned = get_method("nystrom_cg").build(0.1, 20)
    assert (preconditioned.max_products, preconditioned.preconditioner.rank) == (20, 10)
    assert get_method("ekfac").build(0.1, 20).eigenvalue_corrected


def test_every_registered_method_has_a_row():
    assert set(Method.registry) == {row.solver for row in all_methods() if row.solver}


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="methods 'newton' is unknown; choose from none, identity"):
        require_method("methods", "newton")
    with pytest.raises(ValueError, match="methods 'ekfac' is unknown"):
        require_method("methods", "ekfac")


def test_parameters_are_checked_without_torch():
    code = (
        "import sys\n"
        "from weighmatch.studies.config import StudyConfig\n"
        "from weighmatch.studies.meta_config import MetaLearningConfig\n"
        "StudyConfig(); MetaLearningConfig()\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
