"""A folder of files of one kind, one file a seed or a run."""

import json
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset
from kedro.io.core import parse_dataset_definition
from kedro_datasets._typing import JSONPreview

Parts = dict[str, Any]


class Partitions(AbstractDataset[Parts, Parts]):
    """A dictionary whose values lie in files `<path>/<key><suffix>` of a given dataset type.

    Unlike kedro-datasets' PartitionedDataset it may be empty where that is said (an arm that is
    left out), and saving removes the files of keys that are gone: what lies in the folder is
    what was saved. As there, a value to be saved may be a function that makes it, called when its
    turn comes.

    Args:
        path: the folder.
        dataset: class name of the files' dataset.
        suffix: of the files, with its dot.
        lazy: whether loading gives functions that load a file each, instead of what is in them.
        may_be_empty: whether a folder without a file is no sign of work cut off.
        metadata: for kedro-viz.
    """

    def __init__(
        self,
        path: str,
        dataset: str,
        suffix: str,
        lazy: bool = False,
        may_be_empty: bool = False,
        metadata: object = None,
    ) -> None:
        self._path, self._suffix, self._lazy = Path(path), suffix, lazy
        self._may_be_empty = may_be_empty
        self._kind: Any
        self._kind, _ = parse_dataset_definition({"type": dataset, "filepath": ""})
        self.metadata = metadata

    def load(self) -> Parts:
        if not self._path.is_dir():
            raise FileNotFoundError(f"{self._path} does not exist; run the pipeline that makes it")
        if not self._members() and not self._may_be_empty:
            raise FileNotFoundError(f"{self._path} is empty; run the pipeline that makes it")
        loaders = {path.stem: self._member(path.stem).load for path in self._members()}
        return loaders if self._lazy else {key: load() for key, load in loaders.items()}

    def save(self, data: Parts) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        for key, value in data.items():
            self._member(key).save(value() if callable(value) else value)
        for path in self._members():
            if path.stem not in data:
                path.unlink()

    def _member(self, key: str) -> Any:
        return self._kind(filepath=str(self._path / f"{key}{self._suffix}"))

    def _members(self) -> list[Path]:
        return sorted(self._path.glob(f"*{self._suffix}"))

    def _exists(self) -> bool:
        return self._path.is_dir()

    def _describe(self) -> dict[str, str]:
        return {"path": str(self._path), "dataset": self._kind.__name__}

    def preview(self) -> JSONPreview:
        """The names of the files and what is in the first, for kedro-viz."""
        keys = [path.stem for path in self._members()]
        first = json.loads(self._member(keys[0]).preview()) if keys else {}
        return JSONPreview(json.dumps({"files": keys, "first": first}))
