"""What a source of images is, and the register of all sources.

A new source is one new file in `weighmatch/data/sources`. It imports at its top only what costs
no time, as every start of the project imports it; heavier libraries it imports where it loads.
"""

import hashlib
import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from weighmatch.checks import ToldError, require_choice
from weighmatch.data.ood import MIXED
from weighmatch.data.splits import Arrays, Splits

if TYPE_CHECKING:
    from weighmatch.data.config import DataConfig
    from weighmatch.data.files import Rejected

# What a job trains on images whose truth is known.
DEFAULT_ARMS = (
    "supervised",
    "fixmatch",
    "fixmatch_matched",
    "pu",
    "learned",
    "oracle",
)


@dataclass(frozen=True)
class Wishes:
    """What is asked for beside the data, as far as a recipe depends on it.

    Attributes:
        network: `training.network`; None: any.
        weights: `training.weights`; None: any.
        fine_tuned: whether a pretrained network is trained further.
        seconds: how long all may take; None: there is no limit.
    """

    network: str | None = None
    weights: str | None = None
    fine_tuned: bool = False
    seconds: float | None = None


# Parameters by group, such as {"training": {"steps": 2000}}.
Recipe = dict[str, dict[str, Any]]
Own = TypeVar("Own")


class UnusableDataError(ToldError, ValueError):
    """A source has too little to go on with: one sentence that names the cure."""


@dataclass(frozen=True)
class NoParameters:
    """The parameters of a source that has none of its own."""


class Source(ABC, Generic[Own]):
    """A source of images.

    Attributes:
        name: what `data.source` calls it.
        parameters: a frozen dataclass whose fields are the source's own parameters in the group
            `data`. Each has a default and can be hashed, and `__post_init__` checks the values.
        contaminates: whether the source mixes OOD into the pool as `data.ratio` asks. False: the
            pool is as it is found, and the parameters of contamination have no effect.
        ood_kinds: the kinds of OOD that the source can mix into the pool, names of `OOD_KINDS`.
        has_domains: whether the source can draw the share `data.shifted` from a shifted domain.
        without_effect: the shared parameters that have no effect on this source, beside those of
            contamination where it does not contaminate.
    """

    name: ClassVar[str]
    parameters: type[Own]
    contaminates: ClassVar[bool] = True
    ood_kinds: ClassVar[tuple[str, ...]] = MIXED
    has_domains: ClassVar[bool] = False
    without_effect: ClassVar[tuple[str, ...]] = ()

    def own(self, config: "DataConfig") -> Own:
        """The source's own parameters; a TypeError if the configuration is of another source."""
        if not isinstance(config.own, self.parameters):
            raise TypeError(f"this configuration is of the source {config.source}, not {self.name}")
        return config.own

    def own_names(self) -> tuple[str, ...]:
        """The names of the source's own parameters."""
        return tuple(field.name for field in fields(self.parameters))  # type: ignore[arg-type]

    def check(self, config: "DataConfig") -> None:
        """Check a configuration without loading an image.

        Raises:
            ValueError: if it cannot be drawn; it names the parameter and the cure.
        """

    @abstractmethod
    def class_names(self, config: "DataConfig") -> tuple[str, ...]:
        """The names of the seen classes, in the order of their labels; no image is loaded."""

    @abstractmethod
    def load(self, config: "DataConfig") -> Arrays:
        """The arrays that splits are drawn from, for the raw layer of the catalog.

        A grid keeps what its settings load in one file, so an array's name says what it holds.
        """

    def load_cached(self, config: "DataConfig", cache: Path | None) -> Arrays:
        """`load`, with a folder for what takes long to read and need not be read twice.

        Raises:
            UnusableDataError: if there is too little to draw splits from.
        """
        return self.load(config)

    def check_found(self, config: "DataConfig") -> None:
        """Check before a run loads images that they are there; none is decoded.

        Raises:
            UnusableDataError: if there is too little to draw splits from.
        """

    @abstractmethod
    def draw(self, raw: Arrays, config: "DataConfig", seed: int) -> Splits:
        """Draw the splits of one seed.

        Args:
            raw: arrays from `load`.
            config: a configuration that `check` accepts.
            seed: the seed of every draw.
        """

    def seeds(self, raw: Arrays, config: "DataConfig") -> tuple[int, ...]:
        """The seeds that splits are drawn for, the first of `config.seeds` or all of them."""
        return config.seeds

    def draw_all(self, raw: Arrays, config: "DataConfig") -> Splits | None:
        """Splits that train on every labelled image, for a model to hand out.

        None where each seed is a task of its own, and there is no model to hand out.
        """
        return None

    def rejected(self, raw: Arrays, config: "DataConfig") -> "list[Rejected]":
        """The files that are not used, with the reason."""
        return []

    def describe(self, raw: Arrays, config: "DataConfig") -> dict[str, object]:
        """What the manifest says of what was found: counts, and where it was."""
        return {}

    def recipe(self, config: "DataConfig", wishes: Wishes = Wishes()) -> Recipe:  # noqa: B008
        """The settings that serve this source; they count where nothing else is asked for.

        No image is decoded for it.

        Args:
            config: of this source.
            wishes: what is asked for beside it.

        Raises:
            UnusableDataError: if that cannot be told, as images are missing.
        """
        return {"runs": {"arms": list(DEFAULT_ARMS)}}


def tag_arrays(arrays: Arrays, own: object) -> Arrays:
    """The arrays by names that end in a hash of a source's own parameters.

    Settings of a grid that load other images then share one file.
    """
    return {f"{name}@{_tag(own)}": array for name, array in arrays.items()}


def untag_arrays(raw: Arrays, own: object) -> Arrays:
    """Of the arrays, those that `tag_arrays` named for these parameters, by their first names."""
    end = f"@{_tag(own)}"
    return {k.removesuffix(end): array for k, array in raw.items() if k.endswith(end)}


def _tag(own: object) -> str:
    return hashlib.sha256(repr(own).encode()).hexdigest()[:8]


_SOURCES: dict[str, Source[Any]] = {}
S = TypeVar("S", bound=type[Source[Any]])


def register(source: S) -> S:
    """Add a source to the register; a decorator of its class.

    Raises:
        ValueError: if there is another source of that name.
    """
    if source.name in _SOURCES:
        raise ValueError(f"there is a source {source.name!r} already; choose another name")
    _SOURCES[source.name] = source()
    return source


def unregister(name: str) -> None:
    """Take a source out again, for tests."""
    _SOURCES.pop(name, None)


def all_sources() -> tuple[Source[Any], ...]:
    """Every source, those of `weighmatch.data.sources` first."""
    # Imported here, as the modules of that package import this one.
    importlib.import_module("weighmatch.data.sources")
    return tuple(_SOURCES.values())


def get_source(name: str) -> Source[Any]:
    """The source of that name; a ValueError if there is none."""
    require_choice("data.source", name, tuple(source.name for source in all_sources()))
    return _SOURCES[name]
