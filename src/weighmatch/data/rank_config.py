"""What the pipeline `rank` can be asked for (`params:rank`)."""

from dataclasses import dataclass
from typing import Literal

from weighmatch.checks import require_integer


@dataclass(frozen=True)
class RankConfig:
    """A folder to be ranked by a stored run.

    Attributes:
        images: the folder; "" as long as nothing is ranked.
        workers: processes that decode its files; "auto": one a core.
    """

    images: str = ""
    workers: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.images, str):
            raise ValueError(f"rank.images must be the path of a folder, got {self.images!r}")
        if self.workers != "auto":
            require_integer("rank.workers (or auto)", self.workers, 1)

    def require_folder(self) -> None:
        """Raise a ValueError unless a folder is named."""
        if not self.images:
            raise ValueError(
                "rank.images names no folder; say which to rank with "
                "kedro run --pipelines rank --params rank.images=DIR"
            )
