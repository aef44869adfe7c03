"""Files of trained runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kedro.io import AbstractDataset
from kedro_datasets._typing import JSONPreview

if TYPE_CHECKING:
    from weighmatch.semisup.checkpoint import TrainedRun


class CheckpointDataset(AbstractDataset["TrainedRun", "TrainedRun"]):
    """A trained run as .pt; a file that was damaged is refused by its checksum."""

    def __init__(self, filepath: str, metadata: object = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> "TrainedRun":
        # Here, so that a catalog that merely lists runs needs no torch.
        from weighmatch.semisup.checkpoint import TrainedRun

        return TrainedRun.load(self._filepath)

    def save(self, data: "TrainedRun") -> None:
        self._filepath.parent.mkdir(parents=True, exist_ok=True)
        data.save(self._filepath)

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, str]:
        return {"filepath": str(self._filepath)}

    def preview(self) -> JSONPreview:
        """The configuration that the run was trained with, for kedro-viz."""
        return JSONPreview(json.dumps(self.load().config.to_dict()))
