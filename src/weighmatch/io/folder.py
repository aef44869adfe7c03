"""A folder of files that one node writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from kedro.io import AbstractDataset
from kedro_datasets._typing import JSONPreview


class FolderDataset(AbstractDataset[Callable[[Path], object], Path]):
    """A folder; what is saved is a function that fills it, and its path is loaded.

    The function may return another one, which is called when the folder is in its place.

    Args:
        path: the folder.
        keep: whether the function adds to what the folder holds. Else the folder is replaced, as a
            whole or not at all.
        metadata: for kedro-viz.
    """

    def __init__(self, path: str, keep: bool = False, metadata: object = None) -> None:
        self._path, self._keep = Path(path), keep
        self.metadata = metadata

    def load(self) -> Path:
        if not self._path.is_dir():
            raise FileNotFoundError(f"{self._path} does not exist; run the pipeline that makes it")
        return self._path

    def save(self, data: Callable[[Path], object]) -> None:
        if self._keep:
            self._path.mkdir(parents=True, exist_ok=True)
            data(self._path)
            return
        partial = self._path.with_name(self._path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        finish = data(partial)
        shutil.rmtree(self._path, ignore_errors=True)
        partial.rename(self._path)
        if callable(finish):
            finish()

    def _exists(self) -> bool:
        return self._path.is_dir()

    def _describe(self) -> dict[str, str]:
        return {"path": str(self._path)}

    def preview(self) -> JSONPreview:
        """The names and sizes of the files, for kedro-viz; None before there are any."""
        if not self._path.is_dir():
            return None
        files = {path.name: path.stat().st_size for path in sorted(self._path.iterdir())}
        return JSONPreview(json.dumps(files))
