"""The grid of a job: settings × regimes × ratios, each of them a cell of data (`params:grid`)."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from weighmatch.checks import require_choice, require_list, require_number
from weighmatch.data.config import REGIMES, DataConfig, Regime, foreign_names, seed_key
from weighmatch.data.source import get_source

# Of the group `data`, what a setting cannot change, and what sets it instead.
SET_ELSEWHERE = {
    "ratio": "grid.ratios",
    "regime": "grid.regimes",
    "seeds": "data.seeds",
    "source": "data.source",
}
# What has no effect on a source whose pool is as it is found.
CONTAMINATION = ("ood_source", "ratio", "regime", "pool_size", "id_size")


@dataclass(frozen=True)
class GridConfig:
    """Setting × regime × ratio. What is empty here is that of the group `data`.

    Attributes:
        settings: what each setting changes in the group `data`, by the setting's name. {}: one
            setting, named by its OOD source.
        ratios: shares of OOD images in the pool, r = |U_OOD| / |U|.
        regimes: "fixed_total", "added" (see `DataConfig`) or both, a list or joined by "+".
    """

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratios: tuple[float, ...] = ()
    regimes: tuple[Regime, ...] = ()

    def __post_init__(self) -> None:
        _require_dictionary("grid.settings", self.settings)
        for name, changes in self.settings.items():
            if not isinstance(name, str):
                raise ValueError(
                    f"grid.settings: names must be text, got {name!r}; put it in quotes"
                )
            _require_dictionary(f"grid.settings.{name}", changes)
            for key in SET_ELSEWHERE.keys() & changes.keys():
                raise ValueError(
                    f"grid.settings.{name}.{key} has no effect; set {SET_ELSEWHERE[key]} instead"
                )
        if len({_slug(name) for name in self.settings}) < len(self.settings):
            raise ValueError(
                "grid.settings differ in punctuation alone, which names of files do not keep; "
                "rename one"
            )
        given: Any = self.regimes
        regimes = given.split("+") if isinstance(given, str) and given else given
        for key, values in (("ratios", self.ratios), ("regimes", regimes)):
            empty = isinstance(values, list | tuple | str) and not values
            object.__setattr__(self, key, () if empty else require_list(f"grid.{key}", values))
        for ratio in self.ratios:
            require_number("grid.ratios", ratio, 0, 1)
        if len({f"{ratio:g}" for ratio in self.ratios}) < len(self.ratios):
            raise ValueError(
                "grid.ratios must differ in six digits, which names of files keep, got "
                f"{list(self.ratios)}; take one out"
            )
        for regime in self.regimes:
            require_choice("grid.regimes", regime, REGIMES)


@dataclass(frozen=True)
class Cell:
    """One setting in one regime at one ratio.

    Attributes:
        setting: the name of the setting.
        data: what the cell's splits are drawn from, with all its seeds.
        part: what a set of splits that is no seed's is called, or "".
    """

    setting: str
    data: DataConfig
    part: str = ""

    @property
    def contaminated(self) -> bool:
        """Whether its pool is contaminated as its regime and ratio say, or is as it is found."""
        return get_source(self.data.source).contaminates

    def key(self, seed: int) -> str:
        """The name of the files of a seed, such as near+far-r0.75-seed_0010."""
        regime = "" if self.data.regime == REGIMES[0] else f"_{self.data.regime}"
        place = f"{regime}-r{self.data.ratio:g}" if self.contaminated else ""
        part = f"-{self.part}" if self.part else ""
        return f"{_slug(self.setting)}{place}{part}-{seed_key(seed)}"


def make_cells(grid: GridConfig, data: DataConfig) -> list[Cell]:
    """Every setting in every regime at every ratio: `data` with the changes of each.

    Raises:
        ValueError: if a setting does not fit the source or asks for more than there is, or if
            files of two cells would have the same names.
    """
    contaminates = get_source(data.source).contaminates
    if not contaminates and (grid.ratios or grid.regimes):
        raise ValueError(
            f"grid.ratios and grid.regimes have no effect with data.source {data.source}, whose "
            "pool is as it is found; leave them out"
        )
    settings = grid.settings or {data.ood_source if contaminates else data.source: {}}
    regimes, ratios = grid.regimes or (data.regime,), grid.ratios or (data.ratio,)
    cells: dict[str, Cell] = {}
    for (setting, changes), regime, ratio in itertools.product(settings.items(), regimes, ratios):
        try:
            changed = data.changed({**changes, "regime": regime, "ratio": ratio})
        except ValueError as error:
            raise ValueError(
                f"grid.settings.{setting} in regime {regime} at ratio {ratio:g}: {error} (in a "
                "grid, settings, grid.regimes and grid.ratios change the group data)"
            ) from error
        cell = Cell(setting, changed)
        other = cells.setdefault(cell.key(0), cell)
        if other is not cell:
            raise ValueError(
                f"files of the settings {other.setting} ({other.data.regime}) and {setting} "
                f"({regime}) would have the same names; rename one in grid.settings"
            )
    return list(cells.values())


def require_effect(given: Mapping[str, Any], grid: GridConfig, data: DataConfig) -> None:
    """Require that every parameter of the group `data` that is given for one run has an effect.

    Args:
        given: the parameters given, as by `--params`; groups within the group are nested.
        grid: the grid of the run.
        data: the group `data` with what was given.

    Raises:
        ValueError: if one has none; it says why.
    """
    reasons = dict.fromkeys(foreign_names(data.source), f"data.source is {data.source}")
    regimes = grid.regimes or (data.regime,)
    if "added" not in regimes:
        reasons["id_size"] = f"the regime is {REGIMES[0]}, where data.pool_size counts"
    if REGIMES[0] not in regimes:
        reasons["pool_size"] = "the regime is added, where data.id_size counts"
    if grid.ratios:
        reasons["ratio"] = "grid.ratios sets it"
    if grid.regimes:
        reasons["regime"] = "grid.regimes sets it"
    if not get_source(data.source).contaminates:
        reasons |= dict.fromkeys(CONTAMINATION, f"the pool of {data.source} is as it is found")
    reasons |= dict.fromkeys(
        get_source(data.source).without_effect, f"{data.source} has its images as they are found"
    )
    changed = [set(_leaves(changes)) for changes in grid.settings.values()]
    reasons |= dict.fromkeys(
        set.intersection(*changed) if changed else (), "every setting of grid.settings sets it"
    )
    for leaf in _leaves(given):
        reason = reasons.get(leaf) or reasons.get(leaf.partition(".")[0])
        if reason:
            raise ValueError(f"data.{leaf} has no effect, as {reason}; leave it out")


def names_without_effect(source: str) -> tuple[str, ...]:
    """The parameters of the group `data` that have no effect on a source."""
    kind = get_source(source)
    return (*kind.without_effect, *(() if kind.contaminates else CONTAMINATION))


def _leaves(group: Mapping[str, Any]) -> Iterator[str]:
    """The names of the parameters within, such as glyphs.clutter."""
    for name, value in group.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{leaf}" for leaf in _leaves(value))
        else:
            yield str(name)


def _require_dictionary(name: str, value: object) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a group of parameters, got {value!r}")


def _slug(setting: str) -> str:
    return re.sub(r"[^A-Za-z0-9+.]+", "_", setting)
