"""Files of tensors, written whole or not at all, with a checksum of their content.

torch does not check what it reads: a flipped bit would give other weights without a word.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weighmatch.checks import ToldError

log = logging.getLogger(__name__)

# Nested dictionaries of tensors, numbers and strings: what a checkpoint holds of an object.
State = dict[str, Any]


class DamagedFileError(ToldError, ValueError):
    """A file whose content is not what was written; the message names it and the cure."""


def write_state(path: Path, state: State) -> None:
    """Write nested containers of tensors, numbers and strings to `path`.

    Equal content gives equal bytes. Torch would put the name of a path into the archive, and would
    tell a string that stands twice from two equal strings.
    """
    state = _separate(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        torch.save({"checksum": content_digest(state), "content": state}, file)
    os.replace(partial, path)


def read_state(path: Path) -> State | None:
    """What `write_state` wrote to `path`, on the CPU; None if there is no such file.

    Raises:
        DamagedFileError: if the file is damaged or something else.
    """
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state: State = saved["content"]
        whole = saved["checksum"] == content_digest(state)
    except Exception as error:  # damaged files make torch raise almost anything
        raise _damaged(path) from error
    if not whole:
        raise _damaged(path)
    return state


def read_if_whole(path: Path, otherwise: str) -> State | None:
    """What `read_state` gives; None, and a warning, where the file is damaged.

    Args:
        path: the file.
        otherwise: what happens then, such as "it is made again".
    """
    try:
        return read_state(path)
    except DamagedFileError:
        log.warning("%s is damaged or was not written by this program; %s", path, otherwise)
        return None


def leaves(content: Any) -> Iterator[Any]:
    """What nested dictionaries, lists and tuples hold in the end, in order."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list | tuple):
        for item in content:
            yield from leaves(item)
    else:
        yield content


def _separate(value: Any) -> Any:
    """Equal content that shares no storage and nothing but strings, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {_separate(key): _separate(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_separate, value))
    return sys.intern(value) if type(value) is str else value


def _damaged(path: Path) -> DamagedFileError:
    return DamagedFileError(
        f"{path} is damaged or was not written by this program; delete it (in a folder of runs: "
        "that folder), and it will be made anew"
    )


def content_digest(content: Any) -> str:
    """Identifies nested dictionaries, lists and tuples of tensors, numbers and strings; SHA-256."""
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {list(value.shape)}".encode())
        # A tensor of one row is contiguous whatever its stride is, and a view wants a stride of 1.
        flat = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1))
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)}".encode())
        for key, item in value.items():
            digest.update(repr(key).encode())
            _add(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)}".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(f"{type(value).__name__} {value!r}".encode())
