"""Named arrays in one compressed file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from kedro.io import AbstractDataset
from kedro_datasets._typing import JSONPreview
from numpy.typing import NDArray

from weighmatch.io.files import write_atomically

Arrays = dict[str, NDArray[Any]]


class NpzDataset(AbstractDataset[Arrays, Arrays]):
    """A dictionary of NumPy arrays as .npz; nothing pickled is written or read."""

    def __init__(self, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Arrays:
        with np.load(self._filepath, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def save(self, data: Arrays) -> None:
        arrays: dict[str, Any] = dict(data)
        write_atomically(self._filepath, lambda file: np.savez_compressed(file, **arrays))

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

    def preview(self) -> JSONPreview:
        """Shape and type of each array, for kedro-viz."""
        arrays = {name: f"{a.dtype} {list(a.shape)}" for name, a in self.load().items()}
        return JSONPreview(json.dumps(arrays))
