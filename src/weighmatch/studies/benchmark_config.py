"""Parameters of the benchmark (`params:benchmark`) and what follows from them; imports no torch."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weighmatch.checks import (
    require_choice,
    require_group,
    require_integer,
    require_list,
    require_number,
    require_seeds,
    with_changes,
)
from weighmatch.data.config import REGIMES, SOURCES, DataConfig, Regime, Source, seed_key
from weighmatch.semisup.config import (
    ArmName,
    TrainingConfig,
    require_arms,
    require_schedule,
    require_stages,
)

GROUP = "benchmark"
# Of the group data, what the benchmark sets itself, and by which parameter.
ELSEWHERE = {"source": "source", "ratio": "ratios", "regime": "regime", "seeds": "seeds"}
# Likewise of the group runs.
RUNS_ELSEWHERE = {"arms": "arms", "stages": "stages"}
# Of the group data, what the images of a source do not depend on.
FOREIGN = {"digits": "glyphs", "glyphs": "seen_classes"}


@dataclass(frozen=True)
class SourceConfig:
    """What a source of images changes in the groups `data` and `training`.

    Attributes:
        data: by the names of `DataConfig`.
        training: by the names of `TrainingConfig`.
    """

    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Arm × setting × regime × ratio × stages × seed.

    Attributes:
        source: "glyphs" or "digits".
        settings: names of `known_settings`.
        ratios: r = |U_OOD| / |U| of the unlabelled pool.
        seeds: of splits and training.
        arms: names of `ARMS`, a list or names joined by "+".
        stages: schedules of the weighted arms: 1, 2, or from 3 a number of rounds, for arms of
            `RANKED_ANEW` and `RESTARTED`; the others have one stage.
        regime: "fixed_total", "added" (see `DataConfig`) or both, a list or joined by "+".
        labels_per_class: labelled images of each class; None: the source's.
        steps: of training; None: the source's.
        known_settings: by name, what a setting changes in the group `data`.
        digits: what this source changes, before the setting does.
        glyphs: likewise.
    """

    source: Source
    settings: tuple[str, ...]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    arms: tuple[ArmName, ...]
    known_settings: dict[str, dict[str, Any]]
    stages: tuple[int, ...] = (6,)
    regime: tuple[Regime, ...] = ("fixed_total",)
    labels_per_class: int | None = None
    steps: int | None = None
    digits: SourceConfig = field(default_factory=SourceConfig)
    glyphs: SourceConfig = field(default_factory=SourceConfig)

    def __post_init__(self) -> None:
        require_choice(f"{GROUP}.source", self.source, SOURCES)
        _require_dictionary(f"{GROUP}.known_settings", self.known_settings)
        odd = [name for name in self.known_settings if not isinstance(name, str)]
        if odd:
            raise ValueError(
                f"{GROUP}.known_settings: names must be text, got {odd[0]!r}; put it in quotes"
            )
        for name in ("settings", "ratios", "stages"):
            object.__setattr__(self, name, require_list(f"{GROUP}.{name}", getattr(self, name)))
        for setting in self.settings:
            require_choice(f"{GROUP}.settings", setting, tuple(self.known_settings))
        if len({_slug(setting) for setting in self.settings}) < len(self.settings):
            raise ValueError(
                f"{GROUP}.settings differ in punctuation alone, which names of files do not keep; "
                f"rename one in {GROUP}.known_settings"
            )
        for ratio in self.ratios:
            require_number(f"{GROUP}.ratios", ratio, 0, 1)
        if len({f"{ratio:g}" for ratio in self.ratios}) < len(self.ratios):
            raise ValueError(
                f"{GROUP}.ratios must differ in six digits, which names of files keep, got "
                f"{list(self.ratios)}; take one out"
            )
        for stages in self.stages:
            require_stages(f"{GROUP}.stages", stages)
        object.__setattr__(self, "seeds", require_seeds(f"{GROUP}.seeds", self.seeds))
        object.__setattr__(self, "arms", require_arms(f"{GROUP}.arms", self.arms))
        require_schedule(GROUP, self.arms, self.stages)
        given: Any = self.regime
        regimes = given.split("+") if isinstance(given, str) else given
        object.__setattr__(self, "regime", require_list(f"{GROUP}.regime", regimes))
        for regime in self.regime:
            require_choice(f"{GROUP}.regime", regime, REGIMES)
        for name in ("labels_per_class", "steps"):
            if getattr(self, name) is not None:
                require_integer(f"{GROUP}.{name} (or null)", getattr(self, name), 1)
        for name in SOURCES:
            group = require_group(f"{GROUP}.{name}", getattr(self, name), SourceConfig)
            for part in ("data", "training"):
                _require_dictionary(f"{GROUP}.{name}.{part}", getattr(group, part))
            object.__setattr__(self, name, group)


@dataclass(frozen=True)
class Cell:
    """One setting in one regime at one ratio.

    Attributes:
        setting: name.
        data: what its splits are drawn from, all seeds of the benchmark among it.
    """

    setting: str
    data: DataConfig

    def key(self, seed: int) -> str:
        """Name of the files of a seed, such as near+far-r0.75-seed_0010."""
        regime = "" if self.data.regime == REGIMES[0] else f"_{self.data.regime}"
        return f"{_slug(self.setting)}{regime}-r{self.data.ratio:g}-{seed_key(seed)}"


def make_cells(benchmark: BenchmarkConfig, data: DataConfig) -> list[Cell]:
    """Every setting in every regime at every ratio.

    What is set later wins: `data`, the source's changes, the setting's, the benchmark's own
    ratio, regime, seeds and labels per class.

    Raises:
        ValueError: if a setting does not fit the source, or asks for more than there is, or if
            files of two cells would have the same names.
    """
    source = benchmark.source
    _refuse_elsewhere(f"{GROUP}.{source}.data", getattr(benchmark, source).data)
    own: dict[str, Any] = {
        "source": source,
        "seeds": benchmark.seeds,
    }
    if benchmark.labels_per_class is not None:
        own["labels_per_class"] = benchmark.labels_per_class
    cells = []
    for setting in benchmark.settings:
        name = f"{GROUP}.known_settings.{setting}"
        changes = _merged(getattr(benchmark, source).data, benchmark.known_settings[setting], name)
        _refuse_elsewhere(name, benchmark.known_settings[setting])
        for regime, ratio in itertools.product(benchmark.regime, benchmark.ratios):
            place = {"regime": regime, "ratio": ratio}
            try:
                config = with_changes("data", data, {**changes, **own, **place})
            except ValueError as error:
                raise ValueError(
                    f"{name} with {GROUP}.source {source} at ratio {ratio:g}: {error} (here they "
                    f"are set by {GROUP}.ratios, {GROUP}.labels_per_class, {GROUP}.{source}.data "
                    "and the setting)"
                ) from error
            cells.append(Cell(setting, config))
        if FOREIGN[source] in benchmark.known_settings[setting]:
            raise ValueError(
                f"{name}.{FOREIGN[source]} has no effect with {GROUP}.source {source}; take the "
                f"setting out of {GROUP}.settings or change {GROUP}.source"
            )
    keys: dict[str, Cell] = {}
    for cell in cells:
        other = keys.setdefault(cell.key(0), cell)
        if other is not cell:
            raise ValueError(
                f"files of the settings {other.setting} ({other.data.regime}) and {cell.setting} "
                f"({cell.data.regime}) would have the same names; rename one in "
                f"{GROUP}.known_settings"
            )
    return cells


def require_effect(benchmark: BenchmarkConfig, given: Mapping[str, Any]) -> None:
    """Require that every parameter given for this run counts in the benchmark.

    Args:
        benchmark: its own parameters, which win.
        given: of a run, by group.

    Raises:
        ValueError: if one is overridden; it names the parameter to set instead.
    """
    source = getattr(benchmark, benchmark.source)
    owners = {f"data.{name}": f"{GROUP}.{own}" for name, own in ELSEWHERE.items()}
    owners |= {f"runs.{name}": f"{GROUP}.{own}" for name, own in RUNS_ELSEWHERE.items()}
    for group in ("data", "training"):
        for name in _leaves(getattr(source, group)):
            owners[f"{group}.{name}"] = f"{GROUP}.{benchmark.source}.{group}.{name}"
    if benchmark.labels_per_class is not None:
        owners["data.labels_per_class"] = f"{GROUP}.labels_per_class"
    if benchmark.steps is not None:
        owners["training.steps"] = f"{GROUP}.steps"
    for name in _leaves({group: given.get(group, {}) for group in ("data", "training", "runs")}):
        if name in owners:
            raise ValueError(f"{name} has no effect in the benchmark; set {owners[name]} instead")


def _leaves(group: Any) -> list[str]:
    """Names of the parameters within, such as weighing.damping."""
    if not isinstance(group, Mapping):
        return []
    return [
        ".".join((str(name), *inner))
        for name, value in group.items()
        for inner in ([[leaf] for leaf in _leaves(value)] or [[]])
    ]


def _refuse_elsewhere(name: str, changes: Mapping[str, Any]) -> None:
    for key in ELSEWHERE.keys() & changes.keys():
        raise ValueError(f"{name}.{key} has no effect; set {GROUP}.{ELSEWHERE[key]} instead")


def make_training(benchmark: BenchmarkConfig, training: TrainingConfig) -> TrainingConfig:
    """The configuration of every run: `training`, the source's changes, the benchmark's steps.

    Raises:
        ValueError: if the source's changes do not fit.
    """
    changes = dict(getattr(benchmark, benchmark.source).training)
    if benchmark.steps is not None:
        changes["steps"] = benchmark.steps
    try:
        changed = with_changes("training", training, changes)
    except ValueError as error:
        raise ValueError(f"{GROUP}.{benchmark.source}: {error}") from error
    rounds = max(benchmark.stages)
    if rounds > changed.steps:
        raise ValueError(
            f"{GROUP}.stages {rounds} are more rounds than there are steps ({changed.steps}); "
            f"lower them or raise {GROUP}.steps"
        )
    return changed


def _merged(first: Any, second: Any, name: str) -> dict[str, Any]:
    """Both, groups within groups too; the second wins."""
    _require_dictionary(name, second)
    both = dict(first)
    for key, value in second.items():
        nested = isinstance(both.get(key), dict)
        both[key] = _merged(both[key], value, f"{name}.{key}") if nested else value
    return both


def _require_dictionary(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a group of parameters, got {value!r}")


def _slug(setting: str) -> str:
    return re.sub(r"[^A-Za-z0-9+.]+", "_", setting)
