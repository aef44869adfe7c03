"""The weightings: what decides how much each unlabelled image counts, one a file.

Every module of this package is imported, and every class with a `name` registers itself.
"""

import importlib
import pkgutil

from weighmatch.semisup.weightings.base import Context, Weighting

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Context", "Weighting"]
