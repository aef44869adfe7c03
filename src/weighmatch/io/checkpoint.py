"""Checkpoints of a training run."""

import json
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset
from kedro_datasets._typing import JSONPreview

from weighmatch.io.files import write_atomically


class CheckpointDataset(AbstractDataset[dict[str, Any], dict[str, Any]]):
    """Nested dictionaries of tensors, numbers and strings as .pt.

    Written through an open file, so that equal content gives equal bytes (a path would put the
    file's name into the archive), and read with `weights_only=True`, so that no code is run.
    """

    def __init__(self, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> dict[str, Any]:
        import torch  # here, so that a catalog that merely lists checkpoints starts at once

        checkpoint: dict[str, Any] = torch.load(
            self._filepath, map_location="cpu", weights_only=True
        )
        return checkpoint

    def save(self, data: dict[str, Any]) -> None:
        import torch

        write_atomically(self._filepath, lambda file: torch.save(data, file))

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

    def preview(self) -> JSONPreview:
        """The configuration that the checkpoint was trained with, for kedro-viz."""
        return JSONPreview(json.dumps(self.load().get("config", {})))
