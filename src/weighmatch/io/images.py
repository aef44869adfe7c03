"""Figures."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from kedro.io import AbstractDataset
from kedro_datasets._typing import ImagePreview

from weighmatch.io.files import write_atomically
from weighmatch.io.partitions import Partitions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FigureDataset(AbstractDataset["Figure", bytes]):
    """A matplotlib figure as PNG; loads as the file's bytes, so that a report can hold it.

    The PNG carries no date or version, so that the same figure gives the same bytes.
    """

    def __init__(self, filepath: str, dpi: int = 150, metadata: object = None) -> None:
        self._filepath, self._dpi = Path(filepath), dpi
        self.metadata = metadata

    def load(self) -> bytes:
        return self._filepath.read_bytes()

    def save(self, data: "Figure") -> None:
        write_atomically(
            self._filepath,
            lambda file: data.savefig(
                file, format="png", dpi=self._dpi, metadata={"Software": None}
            ),
        )

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, str]:
        return {"filepath": str(self._filepath)}

    def preview(self) -> ImagePreview:
        """The picture, for kedro-viz."""
        return ImagePreview(base64.b64encode(self.load()).decode())


class FigureFolder(Partitions):
    """Figures by name, a PNG each; kedro-viz shows the first."""

    def __init__(self, path: str, metadata: object = None) -> None:
        super().__init__(path, "weighmatch.io.FigureDataset", ".png", metadata=metadata)

    def preview(self) -> ImagePreview:
        """The first figure, for kedro-viz; None before there is one."""
        names = self._names()
        return self._member(names[0]).preview() if names else None
