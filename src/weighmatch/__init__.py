"""WeighMatch: FixMatch that learns which unlabelled images to trust."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weighmatch.own_images import FittedRun, Folder, fit

__version__ = "0.1.0"
__all__ = ["FittedRun", "Folder", "fit"]


def __getattr__(name: str) -> Any:
    """Import on demand: the package itself costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("weighmatch.own_images"), name)
