"""Kedro datasets of this project."""

from weighmatch.io.arrays import NpzDataset
from weighmatch.io.checkpoint import CheckpointDataset
from weighmatch.io.folder import FolderDataset
from weighmatch.io.images import FigureDataset, FigureFolder
from weighmatch.io.partitions import Partitions

__all__ = [
    "CheckpointDataset",
    "FigureDataset",
    "FigureFolder",
    "FolderDataset",
    "NpzDataset",
    "Partitions",
]
