"""A folder of files of one kind, one file a seed or a run."""

import hashlib
import json
import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from kedro.io import AbstractDataset
from kedro.io.core import parse_dataset_definition
from kedro_datasets._typing import JSONPreview
from numpy.typing import NDArray

from weighmatch.io.files import (
    UnfitFileError,
    check_files,
    sha256_of,
    write_atomically,
    write_text,
)

log = logging.getLogger(__name__)

# Lies in the folder: the SHA-256 of each file, and the names of those that are being written.
LIST = "files.json"
# Bytes from which an array that is in several files is stored once, in a file beside them.
LARGE = 2**20
# Begins the name of an entry that holds the name of that file instead of the array.
REFERENCE = "shared:"

Parts = dict[str, Any]


class Partitions(AbstractDataset[Parts, Parts]):
    """A dictionary whose values lie in files `<path>/<key><suffix>` of a given dataset type.

    Unlike kedro-datasets' PartitionedDataset it may be empty where that is said (an arm that is
    left out). A list of the files and their checksums lies beside them, so that a file that is
    missing or damaged is named. Saving removes the files of keys that are gone, as far as the
    list names them; a file that somebody else put there is left alone and is not loaded. As in
    PartitionedDataset, a value to be saved may be a function that makes it, called when its turn
    comes.

    Where values are dictionaries of arrays, a large array that is the same object in several of
    them is stored once, in a file `shared-<fingerprint>.npy`. It is loaded as one memory map, which
    all of them have.

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
        shared: dict[str, NDArray[Any]] = {}
        for path in sorted(set(self._path.glob(f"*{self._suffix}")) - known):
            log.warning("%s is none of the files that were saved there, and is left out", path)
        loaders = {
            name.removesuffix(self._suffix): partial(self._load_checked, name, files, shared)
            for name in sorted(files)
            if name.endswith(self._suffix)
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
        shared = _find_shared(data)
        try:
            before, unfinished = self._read_list()
        except UnfitFileError:
            before, unfinished = {}, []
        # Files are this dataset's from before they are written until after they are removed.
        own = {*before, *unfinished, *names, *(name for name, _ in shared.values())}
        self._write_list(before, sorted(own))
        files = {
            name: self._save_array(name, array, before.get(name)) for name, array in shared.values()
        }
        for name, key in names.items():
            value = data[key]
            self._member(name).save(value() if callable(value) else _refer(value, shared))
            files[name] = sha256_of(self._path / name)
        for name in own - set(files):
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

    def _save_array(self, name: str, array: NDArray[Any], checksum: str | None) -> str:
        """Store an array, unless it lies there whole: its name tells the content. Its SHA-256."""
        path = self._path / name
        if not path.exists() or sha256_of(path) != checksum:
            write_atomically(path, lambda file: np.save(file, array))
        return sha256_of(path)

    def _load_checked(
        self, name: str, files: dict[str, str], shared: dict[str, NDArray[Any]]
    ) -> Any:
        """What is in a file, with the arrays that it shares with others."""
        self._require_whole(name, files)
        value = self._member(name).load()
        if not isinstance(value, dict):
            return value
        return {
            str(key).removeprefix(REFERENCE): self._load_shared(str(array), files, shared)
            if str(key).startswith(REFERENCE)
            else array
            for key, array in value.items()
        }

    def _load_shared(
        self, name: str, files: dict[str, str], shared: dict[str, NDArray[Any]]
    ) -> NDArray[Any]:
        if name not in shared:
            self._require_whole(name, files)
            shared[name] = np.load(self._path / name, mmap_mode="r")
        return shared[name]

    def _require_whole(self, name: str, files: dict[str, str]) -> None:
        try:
            check_files(self._path, {name: files.get(name, "")})
        except UnfitFileError as error:
            raise UnfitFileError(f"{error}; run the pipeline that makes it") from error

    def _names(self) -> list[str]:
        """Names of the files that were saved, without those of shared arrays."""
        names = sorted(self._read_list()[0]) if self._exists() else []
        return [name for name in names if name.endswith(self._suffix)]

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
        for name in [name for name in first if name.startswith(REFERENCE)]:
            first.pop(name)
            first[name.removeprefix(REFERENCE)] = "stored once for several files"
        keys = [name.removesuffix(self._suffix) for name in names]
        return JSONPreview(json.dumps({"files": keys, "first": first}))


def _find_shared(data: Parts) -> dict[int, tuple[str, NDArray[Any]]]:
    """The large arrays that are in several parts, by `id`, with the names of their files."""
    arrays = [
        array
        for value in data.values()
        if isinstance(value, dict)
        for array in value.values()
        if isinstance(array, np.ndarray) and array.nbytes >= LARGE
    ]
    times = Counter(map(id, arrays))
    repeated = {id(array): array for array in arrays if times[id(array)] > 1}
    return {key: (f"shared-{_fingerprint(array)}.npy", array) for key, array in repeated.items()}


def _refer(value: Any, shared: dict[int, tuple[str, NDArray[Any]]]) -> Any:
    """A part with the names of files in the place of arrays that are stored there."""
    if not isinstance(value, dict):
        return value
    return {
        f"{REFERENCE}{key}" if id(array) in shared else key: np.array(shared[id(array)][0])
        if id(array) in shared
        else array
        for key, array in value.items()
    }


def _fingerprint(array: NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
