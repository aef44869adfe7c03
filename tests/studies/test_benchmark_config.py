"""What the benchmark can be asked for, and which splits and runs follow."""

from pathlib import Path

import pytest
import yaml

from weighmatch.data.config import DataConfig
from weighmatch.semisup.config import TrainingConfig
from weighmatch.studies.benchmark import plan_runs
from weighmatch.studies.benchmark_config import (
    BenchmarkConfig,
    make_cells,
    make_training,
    require_effect,
)

BASE = Path(__file__).parents[2] / "conf" / "base"


def base(group, **changes):
    file = "data" if group == "data" else "training" if group == "training" else "benchmark"
    return {**yaml.safe_load((BASE / f"parameters_{file}.yml").read_text())[group], **changes}


DATA, TRAINING = DataConfig(**base("data")), TrainingConfig(**base("training"))


def test_a_user_sets_source_ratios_seeds_and_arms_alone():
    four = {"ratios": [0.25], "seeds": [40, 41], "arms": ["fixmatch", "learned"]}
    for source in ("digits", "glyphs"):
        benchmark = BenchmarkConfig(**base("benchmark", source=source, **four))
        (cell,) = make_cells(benchmark, DATA)
        assert (cell.data.source, cell.data.ratio, cell.data.seeds) == (source, 0.25, (40, 41))
        assert cell.key(40) == "near+far-r0.25-seed_0040"


def test_a_source_has_its_own_sizes_and_training():
    digits = BenchmarkConfig(**base("benchmark", source="digits"))
    glyphs = BenchmarkConfig(**base("benchmark", source="glyphs"))
    assert make_cells(digits, DATA)[0].data.pool_size == DATA.pool_size
    assert make_training(digits, TRAINING) == TRAINING
    assert make_cells(glyphs, DATA)[0].data.pool_size == 4000
    assert make_training(glyphs, TRAINING).steps == 6000
    fewer = BenchmarkConfig(**base("benchmark", steps=50, labels_per_class=3))
    assert make_training(fewer, TRAINING).steps == 50
    assert make_cells(fewer, DATA)[0].data.labels_per_class == 3


@pytest.mark.parametrize("regimes", ["fixed_total+added", ["fixed_total", "added"]])
def test_both_regimes_can_be_compared(regimes):
    benchmark = BenchmarkConfig(**base("benchmark", regime=regimes, ratios=[0.5, 0.75], seeds=[7]))
    cells = {cell.key(7): cell.data for cell in make_cells(benchmark, DATA)}
    assert set(cells) == {
        f"near+far{regime}-r{ratio}-seed_0007" for regime in ("", "_added") for ratio in (0.5, 0.75)
    }
    assert cells["near+far-r0.75-seed_0007"].pool_id == 1000
    assert cells["near+far_added-r0.75-seed_0007"].pool_id == 1000
    assert cells["near+far-r0.5-seed_0007"].pool_id == 2000
    assert cells["near+far_added-r0.5-seed_0007"].pool_id == 1000


def test_every_known_setting_can_be_drawn_from_glyphs():
    settings = base("benchmark")["known_settings"]
    benchmark = BenchmarkConfig(**base("benchmark", settings=list(settings), ratios=[0.0, 0.75]))
    cells = make_cells(benchmark, DATA)
    assert len({cell.key(10) for cell in cells}) == 2 * len(settings)
    shifted = {cell.setting: cell.data.glyphs.shift for cell in cells if cell.data.shifted}
    assert shifted == {
        "shifted: inverted": "inverted",
        "shifted: background": "background",
        "shifted: fonts": "fonts",
    }
    # A group within the group: what a setting does not name is the source's.
    assert {cell.data.glyphs.size for cell in cells} == {16}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratios": [1.0]}, "benchmark.ratios must be a number at least 0 and below 1, got 1.0"),
        ({"ratios": 0.5}, "benchmark.ratios must be a list of different values, got 0.5"),
        ({"seeds": [1, 1]}, "benchmark.seeds must be a list of different whole numbers"),
        ({"arms": []}, "benchmark.arms must be a list of different names"),
        ({"settings": ["moon"]}, "benchmark.settings 'moon' is unknown; choose from near, far"),
        ({"settings": [["near"], ["near"]]}, "benchmark.settings must be a list of different"),
        ({"stages": [0]}, "benchmark.stages must be an integer of at least 1, got 0"),
        ({"stages": [101]}, "benchmark.stages must be at most 100, got 101"),
        ({"regime": "both"}, "benchmark.regime 'both' is unknown; choose from fixed_total, added"),
        ({"regime": []}, "benchmark.regime must be a list of different values, got []"),
        ({"known_settings": 3}, "benchmark.known_settings must be a group of parameters, got 3"),
        ({"glyphs": {"dta": {}}}, "benchmark.glyphs has no parameter dta; it has data, training"),
        ({"digits": {"data": 3}}, "benchmark.digits.data must be a group of parameters, got 3"),
        ({"known_settings": {2024: {}}}, "names must be text, got 2024; put it in quotes"),
        ({"ratios": [0.5, 0.50000001]}, "benchmark.ratios must differ in six digits"),
        (
            {"known_settings": {"a b": {}, "a-b": {}}, "settings": ["a b", "a-b"]},
            "benchmark.settings differ in punctuation alone",
        ),
    ],
)
def test_wrong_parameters_are_named_with_the_cure(wrong, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below)
        BenchmarkConfig(**base("benchmark", **wrong))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_setting_that_does_not_fit_its_source_is_named():
    benchmark = BenchmarkConfig(
        **base("benchmark", source="digits", settings=["shifted: inverted"])
    )
    with pytest.raises(ValueError, match="shifted: inverted with benchmark") as error:
        make_cells(benchmark, DATA)
    assert "needs glyphs" in str(error.value)
    broken = BenchmarkConfig(
        **base("benchmark", settings=["a"], known_settings={"a": {"glyphs": 3}})
    )
    with pytest.raises(ValueError, match="glyphs must be a group of parameters, got 3"):
        make_cells(broken, DATA)


def test_what_the_benchmark_sets_itself_is_refused_in_a_setting():
    settings = {"settings": ["a"], "known_settings": {"a": {"ratio": 0.9}}}
    with pytest.raises(ValueError, match=r"a\.ratio has no effect; set benchmark\.ratios instead"):
        make_cells(BenchmarkConfig(**base("benchmark", **settings)), DATA)
    own = BenchmarkConfig(**base("benchmark", glyphs={"data": {"seeds": [7]}}))
    with pytest.raises(
        ValueError, match=r"glyphs\.data\.seeds has no effect; set benchmark\.seeds"
    ):
        make_cells(own, DATA)


def test_a_setting_that_means_nothing_to_its_source_is_refused():
    digits = BenchmarkConfig(**base("benchmark", source="digits", settings=["near", "one kind"]))
    with pytest.raises(ValueError, match=r"one kind\.glyphs has no effect with .*source digits"):
        make_cells(digits, DATA)
    settings = {"settings": ["a"], "known_settings": {"a": {"seen_classes": [0, 1]}}}
    with pytest.raises(ValueError, match=r"a\.seen_classes has no effect with .*source glyphs"):
        make_cells(BenchmarkConfig(**base("benchmark", **settings)), DATA)


def test_cells_with_the_same_names_of_files_are_refused():
    known = {"near": {"ood_source": "unseen"}, "near_added": {"ood_source": "noise"}}
    both = {"settings": ["near", "near_added"], "known_settings": known, "ratios": [0.5]}
    regimes = ["fixed_total", "added"]
    benchmark = BenchmarkConfig(**base("benchmark", regime=regimes, **both))
    with pytest.raises(ValueError, match=r"near \(added\) and near_added \(fixed_total\)"):
        make_cells(benchmark, DATA)
    assert len(make_cells(BenchmarkConfig(**base("benchmark", **both)), DATA)) == 2


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"data": {"ratio": 0.2}}, "benchmark.ratios"),
        ({"runs": {"stages": 1}}, "benchmark.stages"),
        ({"data": {"glyphs": {"clutter": 3}}}, "benchmark.glyphs.data.glyphs.clutter"),
        ({"training": {"weighing": {"damping": 1}}}, "benchmark.glyphs.training.weighing.damping"),
        ({"training": {"steps": 3}}, "benchmark.steps"),
        ({"data": {"labels_per_class": 3}}, "benchmark.labels_per_class"),
    ],
)
def test_a_parameter_that_the_benchmark_overrides_is_refused(given, instead):
    benchmark = BenchmarkConfig(**base("benchmark", steps=5, labels_per_class=2))
    with pytest.raises(ValueError, match=rf"has no effect in the benchmark; set {instead} instead"):
        require_effect(benchmark, given)


def test_parameters_that_count_in_the_benchmark_are_let_through():
    benchmark = BenchmarkConfig(**base("benchmark"))
    counting = {
        "data": {"glyphs": {"noise": 3.0}},
        "training": {"weighing": {"contamination_level": 1}, "device": "cpu"},
        "runs": {"workers": 1},
        "benchmark": {"steps": 7},
        "data_folder": "elsewhere",
    }
    require_effect(benchmark, counting)  # raises nothing
    with pytest.raises(ValueError, match=r"data\.ratio has no effect"):
        require_effect(benchmark, {**counting, "data": {"ratio": 0.5}})


def test_fixmatch_is_matched_to_the_cost_of_ranking_each_size_of_pool(training_set, run_config):
    benchmark = BenchmarkConfig(**base("benchmark", stages=[4]))
    small = {**vars(training_set), "unlabelled_images": training_set.unlabelled_images[:20]}
    sets = {"small-seed_0001": small, "large-seed_0001": vars(training_set)}
    runs = plan_runs(("fixmatch_matched",), benchmark, sets, run_config().training)
    steps = {run.key: run.job.config.steps for run in runs}
    assert steps["small-seed_0001"] < steps["large-seed_0001"]
