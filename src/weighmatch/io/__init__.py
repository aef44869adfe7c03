"""Kedro datasets of this project."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weighmatch.io.arrays import NpzDataset
    from weighmatch.io.checkpoint import CheckpointDataset
    from weighmatch.io.images import FigureDataset
    from weighmatch.io.partitions import Partitions

_HOMES = {
    "CheckpointDataset": "checkpoint",
    "FigureDataset": "images",
    "NpzDataset": "arrays",
    "Partitions": "partitions",
}

__all__ = ["CheckpointDataset", "FigureDataset", "NpzDataset", "Partitions"]


def __getattr__(name: str) -> Any:
    """Import on demand: a run that touches no checkpoint need not import torch."""
    if name not in _HOMES:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(f"weighmatch.io.{_HOMES[name]}"), name)
