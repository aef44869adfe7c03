"""A folder of files of one kind, one file a seed or a run."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset
from kedro.io.core import parse_dataset_definition
from kedro_datasets._typing import JSONPreview

from weighmatch.io.files import UnfitFileError, check_files, sha256_of, write_text

log = logging.getLogger(__name__)

# Lies in the folder: the SHA-256 of each file, and the names of those that are being written.
LIST = "files.json"

Parts = dict[str, Any]


class Partitions(AbstractDataset[Parts, Parts]):
    """A dictionary whose values lie in files `<path>/<key><suffix>` of a given dataset type.

    Unlike kedro-datasets' PartitionedDataset it may be empty where that is said (an arm that is
    left out). A list of the files and their checksums lies beside them, so that a file that is
    missing or damaged is named. Saving removes the files of keys that are gone, as far as the
    list names them; a file that somebody else put there is left alone and is not loaded. As in
    PartitionedDataset, a value to be saved may be a function that makes it, called when its turn
    comes.

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
        try:
            files = self.files()
        except UnfitFileError as error:
            raise UnfitFileError(f"{error}; run the pipeline that makes it") from error
        known = {self._path / name for name in files}
        for path in sorted(set(self._path.glob(f"*{self._suffix}")) - known):
            log.warning("%s is none of the files that were saved there, and is left out", path)
        loaders = {
            name.removesuffix(self._suffix): partial(self._load_checked, name, checksum)
            for name, checksum in sorted(files.items())
        }
        return dict(loaders) if self._lazy else {key: load() for key, load in loaders.items()}

    def files(self) -> dict[str, str]:
        """SHA-256 of each file by its name, as they were saved.

        Raises:
            UnfitFileError: if there is no such list, or saving was cut off, or nothing was saved
                where something must be.
        """
        if not self._path.is_dir():
            raise UnfitFileError(f"{self._path} does not exist")
        files, unfinished = self._read_list()
        if unfinished:
            raise UnfitFileError(f"the writing of {self._path} was cut off")
        if not files and not self._may_be_empty:
            raise UnfitFileError(f"{self._path} is empty")
        return files

    def save(self, data: Parts) -> None:
        names = {f"{key}{self._suffix}": key for key in data}
        try:
            before, unfinished = self._read_list()
        except UnfitFileError:
            before, unfinished = {}, []
        # Files are this dataset's from before they are written until after they are removed.
        own = {*before, *unfinished, *names}
        self._write_list(before, sorted(own))
        files = {}
        for name, key in names.items():
            value = data[key]
            self._member(name).save(value() if callable(value) else value)
            files[name] = sha256_of(self._path / name)
        for name in own - set(names):
            (self._path / name).unlink(missing_ok=True)
        self._write_list(files, [])

    def _read_list(self) -> tuple[dict[str, str], list[str]]:
        path = self._path / LIST
        try:
            found = json.loads(path.read_text("utf-8"))
            return dict(found["files"]), list(found["unfinished"])
        except FileNotFoundError:
            raise UnfitFileError(f"{path}, the list of the folder's files, is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnfitFileError(f"{path} is damaged") from error

    def _write_list(self, files: dict[str, str], unfinished: list[str]) -> None:
        write_text(
            self._path / LIST,
            json.dumps({"files": files, "unfinished": unfinished}, indent=1, sort_keys=True),
        )

    def _load_checked(self, name: str, checksum: str) -> Any:
        try:
            check_files(self._path, {name: checksum})
        except UnfitFileError as error:
            raise UnfitFileError(f"{error}; run the pipeline that makes it") from error
        return self._member(name).load()

    def _names(self) -> list[str]:
        """Names of the files that were saved."""
        return sorted(self._read_list()[0]) if self._exists() else []

    def _member(self, name: str) -> Any:
        return self._kind(filepath=str(self._path / name))

    def _exists(self) -> bool:
        return (self._path / LIST).exists()

    def _describe(self) -> dict[str, str]:
        return {"path": str(self._path), "dataset": self._kind.__name__}

    def preview(self) -> JSONPreview:
        """The names of the files and what is in the first, for kedro-viz."""
        names = self._names()
        first = json.loads(self._member(names[0]).preview()) if names else {}
        keys = [name.removesuffix(self._suffix) for name in names]
        return JSONPreview(json.dumps({"files": keys, "first": first}))
