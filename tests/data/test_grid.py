import pytest
import yaml

from weighmatch.data.config import DataConfig
from weighmatch.data.grid import (
    GridConfig,
    make_cells,
    names_without_effect,
    require_effect,
)

DIGITS = DataConfig(seeds=[10, 11])
SIZES = {"pool_size": 4000, "id_size": 1000}
GLYPHS = DataConfig(seeds=[10], source="glyphs", **SIZES, glyphs={"clutter": 0})
# As an environment writes settings.
KNOWN = yaml.safe_load("""
near: {ood_source: unseen}
near+far: {ood_source: unseen+patches}
one kind: {ood_source: unseen, glyphs: {unseen: G}}
"shifted: fonts": {shifted: 0.5, glyphs: {shift: fonts}}
""")


def test_the_grid_of_a_job_that_says_nothing_is_one_cell():
    (cell,) = make_cells(GridConfig(), DIGITS)
    assert cell.data == DIGITS
    assert (cell.setting, cell.key(10)) == ("unseen", "unseen-r0.75-seed_0010")
    (mixed,) = make_cells(GridConfig(), DIGITS.changed({"ood_source": "mix", "regime": "added"}))
    assert mixed.key(3) == "mix_added-r0.75-seed_0003"


@pytest.mark.parametrize("regimes", ["fixed_total+added", ["fixed_total", "added"]])
def test_every_setting_in_every_regime_at_every_ratio(regimes):
    grid = GridConfig(KNOWN, ratios=[0.5, 0.75], regimes=regimes)
    cells = {cell.key(7): cell.data for cell in make_cells(grid, GLYPHS)}
    assert set(cells) == {
        f"{name}{regime}-r{ratio}-seed_0007"
        for name in ("near", "near+far", "one_kind", "shifted_fonts")
        for regime in ("", "_added")
        for ratio in (0.5, 0.75)
    }
    assert [
        cells[f"near+far{place}-seed_0007"].pool_id
        for place in ("-r0.75", "_added-r0.75", "-r0.5", "_added-r0.5")
    ] == [1000, 1000, 2000, 1000]
    # A group within the group: what a setting does not name is that of the group data.
    looks = {cell.own.glyphs for cell in cells.values()}
    assert {(look.unseen, look.shift, look.clutter) for look in looks} == {
        (GLYPHS.own.glyphs.unseen, "none", 0),
        ("G", "none", 0),
        (GLYPHS.own.glyphs.unseen, "fonts", 0),
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratios": [1.0]}, "grid.ratios must be a number at least 0 and below 1, got 1.0"),
        ({"ratios": 0.5}, "grid.ratios must be a list of different values, got 0.5"),
        ({"ratios": [0.5, 0.50000001]}, "grid.ratios must differ in six digits"),
        ({"regimes": "both"}, "grid.regimes 'both' is unknown; choose from fixed_total, added"),
        ({"regimes": ["added", "added"]}, "grid.regimes must be a list of different values"),
        ({"settings": 3}, "grid.settings must be a group of parameters, got 3"),
        ({"settings": {"a": 3}}, "grid.settings.a must be a group of parameters, got 3"),
        ({"settings": {2024: {}}}, "names must be text, got 2024; put it in quotes"),
        ({"settings": {"a b": {}, "a-b": {}}}, "grid.settings differ in punctuation alone"),
        ({"settings": {"a": {"ratio": 0.9}}}, "a.ratio has no effect; set grid.ratios instead"),
        ({"settings": {"a": {"source": "x"}}}, "a.source has no effect; set data.source instead"),
        ({"settings": {"a": {"glyphs": {"unseen": "G"}}}}, "no effect with data.source digits"),
        ({"settings": {"a": {"shifted": 0.5}}}, "grid.settings.a in regime fixed_total at ratio"),
        ({"settings": {"a": {"shifted": 0.5}}}, "a share above 0 needs glyphs"),
        ({"settings": {"a": {"shapes": 1}}}, "data has no parameter shapes; it has"),
        ({"ratios": [0.9999]}, "data.ratio 0.9999 leaves no in-distribution image"),
        (
            {"settings": {"near": {}, "near_added": {}}, "regimes": "fixed_total+added"},
            "near (added) and near_added (fixed_total) would have the same names",
        ),
    ],
)
def test_wrong_parameters_are_named_with_the_cure(wrong, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below)
        make_cells(GridConfig(**wrong), DIGITS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_setting_that_means_nothing_to_glyphs_is_refused():
    for changes, message in (
        (
            {"seen_classes": [0, 1]},
            r"a .*seen_classes has no effect with data\.source glyphs",
        ),
        ({"glyphs": 3}, r"data\.glyphs must be a group of parameters, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cells(GridConfig({"a": changes}), GLYPHS)


@pytest.mark.parametrize(
    ("given", "grid", "reason"),
    [
        ({"ratio": 0.2}, {"ratios": [0.5]}, "ratio has no effect, as grid.ratios sets it"),
        ({"regime": "added"}, {"regimes": "added"}, "regime has no effect, as grid.regimes"),
        ({"glyphs": {"clutter": 3}}, {}, "glyphs.clutter has no effect, as data.source is digits"),
        ({"id_size": 9}, {}, "id_size has no effect, as the regime is fixed_total"),
        ({"pool_size": 9}, {"regimes": "added"}, "pool_size has no effect, as the regime is added"),
        (
            {"heldout_size": 9},
            {"settings": {"a": {"heldout_size": 1}, "b": {"heldout_size": 2}}},
            "every setting of grid.settings sets it",
        ),
    ],
)
def test_a_parameter_without_effect_is_refused(given, grid, reason):
    with pytest.raises(ValueError, match="leave it out") as error:
        require_effect(given, GridConfig(**grid), DIGITS)
    assert reason in str(error.value)


def test_parameters_that_count_are_let_through():
    both = GridConfig({"a": {"test_size": 9}, "b": {}}, regimes="fixed_total+added")
    given = {"glyphs": {"noise": 3.0}, "id_size": 3, "pool_size": 9, "test_size": 5, "ratio": 0.5}
    assert require_effect(given, both, GLYPHS) is None


def test_what_has_no_effect_on_a_source_is_known():
    assert names_without_effect("digits") == ()
    assert {"labels_per_class", "ratio", "pool_size"} < set(names_without_effect("folder"))
