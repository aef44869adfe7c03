"""Named arrays in one file; large ones are mapped into memory rather than read."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from kedro.io import AbstractDataset
from kedro_datasets._typing import JSONPreview
from numpy.typing import NDArray

from weighmatch.io.files import write_atomically

Arrays = dict[str, NDArray[Any]]
# Bytes of arrays from which a file is not compressed, and of an array from which it is mapped.
LARGE = 2**24


class NpzDataset(AbstractDataset[Arrays, Arrays]):
    """A dictionary of NumPy arrays as .npz; nothing pickled is written or read.

    Small files are compressed. Larger ones than `LARGE` bytes are not, so that their arrays can be
    mapped into memory: processes then share one copy, and a pool need not fit into memory.
    """

    def __init__(self, filepath: str, metadata: object = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Arrays:
        with np.load(self._filepath, allow_pickle=False) as file:
            mapped = _map_stored(self._filepath)
            return {name: mapped[name] if name in mapped else file[name] for name in file.files}

    def save(self, data: Arrays) -> None:
        large = sum(np.asarray(array).nbytes for array in data.values()) > LARGE
        save: Any = np.savez if large else np.savez_compressed
        write_atomically(self._filepath, lambda file: save(file, **data))

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, str]:
        return {"filepath": str(self._filepath)}

    def preview(self) -> JSONPreview:
        """Shape and type of each array, for kedro-viz."""
        arrays = {name: f"{a.dtype} {list(a.shape)}" for name, a in self.load().items()}
        return JSONPreview(json.dumps(arrays))


def _map_stored(path: Path) -> Arrays:
    """The large arrays of a file that are not compressed, mapped into memory, read-only."""
    found: Arrays = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size < LARGE:
                continue
            # A local header has 30 bytes, a name and extra fields of its own length.
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            file.seek(member.header_offset + 30 + name + extra)
            major, _ = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            shape, fortran, dtype = (read if major == 1 else np.lib.format.read_array_header_2_0)(
                file
            )
            if not fortran and not dtype.hasobject:
                array = np.memmap(path, dtype, "r", file.tell(), shape)
                found[member.filename.removesuffix(".npy")] = array
    return found
