"""What the pipeline `rank` can be asked for (`params:rank`), and how its files become images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from weighmatch.checks import require_integer
from weighmatch.data.containers import base_of
from weighmatch.data.files import Fit
from weighmatch.engine_config import EngineConfig


@dataclass(frozen=True)
class RankConfig(EngineConfig):
    """A folder to be ranked by a stored run, and where that is done (see `EngineConfig`).

    Attributes:
        images: the folder, or one tar archive or Parquet file; "" as long as nothing is ranked.
        workers: processes that decode and score its files; "auto": one a core, or as many as a
            cluster has room for.
    """

    images: str = ""
    workers: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        self.check_engine("rank")
        if self.num_gpus is not None and self.engine == "local":
            raise ValueError(
                "rank.num_gpus has no effect with rank.engine local; leave it out or set "
                "rank.engine=ray"
            )
        if not isinstance(self.images, str):
            raise ValueError(f"rank.images must be the path of a folder, got {self.images!r}")
        if self.workers != "auto":
            require_integer("rank.workers (or auto)", self.workers, 1)

    def require_folder(self) -> None:
        """Raise a ValueError unless there is a folder that is named."""
        if not self.images:
            raise ValueError(
                "rank.images names no folder; say which to rank with "
                "kedro run --pipelines rank --params rank.images=DIR"
            )
        base_of(self.images)


@dataclass(frozen=True)
class Preparation:
    """How files become images, as in training.

    Attributes:
        fit: see `weighmatch.data.files.decode`.
        background: see there.
    """

    fit: Fit = "crop"
    background: str = "white"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Preparation":
        """That which is among the given parameters; the defaults for what is not."""
        return cls(**{name: given[name] for name in ("fit", "background") if name in given})
