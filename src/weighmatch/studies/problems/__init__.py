"""Bilevel problems, one a module; each is known by its `name` as soon as this package is."""

import importlib
import pkgutil

from weighmatch.studies.digits import Digits, Size
from weighmatch.studies.problems.contract import BilevelProblem

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

PROBLEMS = BilevelProblem.registry

__all__ = ["PROBLEMS", "BilevelProblem", "Digits", "Size"]
