"""What `data_preparation` can be asked for (`params:data`), checked before any work starts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from weighmatch.checks import (
    lacks,
    require_choice,
    require_integer,
    require_number,
    require_seeds,
)
from weighmatch.data.ood import KIND_NAMES, ood_parts
from weighmatch.data.source import all_sources, get_source

Regime = Literal["fixed_total", "added"]
# Seeds 0–4 were used for tuning.
DEFAULT_SEEDS = tuple(range(10, 16))
REGIMES: tuple[Regime, ...] = ("fixed_total", "added")


def seed_key(seed: int) -> str:
    """The part of a file's name that tells its seed, such as seed_0010."""
    return f"seed_{seed:04d}"


@dataclass(frozen=True)
class SharedDataConfig:
    """The parameters of splits and contamination that all sources share.

    Attributes:
        seeds: one complete set of splits is drawn for each, and all runs are trained on it. The
            folds of a folder of own images are as many.
        labels_per_class: how many images of each seen class are labelled.
        ood_source: "unseen" classes, natural "patches", "noise", some of them joined by "+", or
            a "mix" of the three; in equal parts.
        ratio: r = |U_OOD| / |U| of the unlabelled pool, 0 ≤ r < 1.
        regime: "fixed_total": `pool_size` images whatever r is; "added": `id_size`
            in-distribution images, and OOD added until their share is r.
        pool_size: |U| in the regime "fixed_total".
        id_size: how many in-distribution images the regime "added" has.
        heldout_size: how many in-distribution unlabelled images are held out of training; as
            many OOD images are.
        test_size: how many images of seen classes there are to test on.
        source: the name of a source of images, see `weighmatch.data.sources`.
        shifted: the share of the unlabelled and test images that is of the source's shifted
            domain; no labelled image is.
    """

    seeds: tuple[int, ...] = DEFAULT_SEEDS
    labels_per_class: int = 4
    ood_source: str = "unseen"
    ratio: float = 0.75
    regime: Regime = "fixed_total"
    pool_size: int = 600
    id_size: int = 150
    heldout_size: int = 150
    test_size: int = 270
    source: str = "digits"
    shifted: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", require_seeds("data.seeds", self.seeds))
        for name in ("labels_per_class", "pool_size", "id_size", "heldout_size", "test_size"):
            require_integer(f"data.{name}", getattr(self, name), 1)
        source = get_source(self.source)
        self._check_ood_source(source.ood_kinds)
        require_choice("data.regime", self.regime, REGIMES)
        require_number("data.ratio", self.ratio, 0, 1)
        require_number("data.shifted", self.shifted, 0, 1, below=False)
        if self.shifted > 0 and not source.has_domains:
            able = " or ".join(other.name for other in all_sources() if other.has_domains)
            raise ValueError(
                f"data.shifted is {self.shifted}, but data.source is {self.source}; a share above "
                f"0 needs {able} and a shift"
            )
        if source.contaminates and self.pool_id < 1:
            raise ValueError(
                f"data.ratio {self.ratio} leaves no in-distribution image in a pool of "
                f"{self.pool_size}; lower it or raise data.pool_size"
            )

    def _check_ood_source(self, known: tuple[str, ...]) -> None:
        parts = self.ood_source.split("+") if isinstance(self.ood_source, str) else [None]
        if self.ood_source != "mix" and (
            any(part not in known for part in parts) or len(set(parts)) < len(parts)
        ):
            raise ValueError(
                f"data.ood_source {self.ood_source!r} is unknown; choose from mix, "
                f"{', '.join(known)}, or several joined by +, such as unseen+patches"
            )

    @property
    def pool_ood(self) -> int:
        """How many OOD images the pool has."""
        if self.regime == "fixed_total":
            return round(self.ratio * self.pool_size)
        return round(self.id_size * self.ratio / (1 - self.ratio))

    @property
    def pool_id(self) -> int:
        """How many in-distribution images the pool has."""
        return self.id_size if self.regime == "added" else self.pool_size - self.pool_ood

    def ood_counts(self, total: int) -> dict[str, int]:
        """How many of `total` OOD images are of each kind."""
        parts = ood_parts(self.ood_source)
        counts = dict.fromkeys(KIND_NAMES[1:], 0)
        for position, kind in enumerate(parts):
            counts[kind] = (total + len(parts) - 1 - position) // len(parts)
        return counts


SHARED_NAMES = tuple(field.name for field in fields(SharedDataConfig))


@dataclass(frozen=True, init=False)
class DataConfig(SharedDataConfig):
    """The parameters of the group `data`: those that all sources share, and the source's own.

    It is made from the parameters by name, such as `DataConfig(seeds=[0], glyphs={"size": 32})`.
    The own parameters of every source are checked; those of `source` are kept.

    Attributes:
        own: the source's own parameters, a `Source.parameters`.
    """

    own: object = None

    def __init__(self, *shared: Any, own: object = None, **given: Any) -> None:
        super().__init__(*shared, **{k: v for k, v in given.items() if k in SHARED_NAMES})
        known = {name for source in all_sources() for name in source.own_names()}
        unknown = sorted(given.keys() - known - set(SHARED_NAMES))
        if unknown:
            raise ValueError(lacks("data", unknown, known.union(SHARED_NAMES)))
        for source in all_sources():
            mine = {name: given[name] for name in source.own_names() if name in given}
            parameters = source.parameters(**mine)
            if own is None and source.name == self.source:
                own = parameters
        object.__setattr__(self, "own", own)
        get_source(self.source).check(self)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the seen classes."""
        return get_source(self.source).class_names(self)

    @property
    def classes(self) -> int:
        """The number of seen classes."""
        return len(self.class_names)

    def parameters(self) -> dict[str, object]:
        """The shared and the own parameters by name, as in the group `data`."""
        values: dict[str, object] = asdict(self)
        own: Any = values.pop("own")
        return {**values, **own}

    def changed(self, changes: Mapping[str, Any]) -> "DataConfig":
        """A copy with these parameters changed, groups within the group too.

        Raises:
            ValueError: if one is unknown, has no effect on this source or a wrong value.
        """
        for name in foreign_names(self.source):
            if name in changes:
                raise ValueError(f"data.{name} has no effect with data.source {self.source}")
        merged = merge_groups(self.parameters(), changes)
        return DataConfig(**{str(name): value for name, value in merged.items()})


def merge_groups(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, groups within groups too; the second wins."""
    both = {**first, **second}
    for name, value in second.items():
        if isinstance(value, Mapping) and isinstance(first.get(name), Mapping):
            both[name] = merge_groups(first[name], value)
    return both


def foreign_names(source: str) -> tuple[str, ...]:
    """The names of parameters that other sources have and this one lacks."""
    mine = get_source(source).own_names()
    names = [name for other in all_sources() for name in other.own_names() if name not in mine]
    return tuple(dict.fromkeys(names))
