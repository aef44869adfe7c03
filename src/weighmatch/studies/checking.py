"""Checks of a group of parameters, field by field; imports no torch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from weighmatch.checks import require_choice, require_integer, require_list, require_number

# Called with the name of a parameter and its value. It raises a ValueError, or gives the value
# to be kept; None: the value as it is.
Check = Callable[[str, Any], Any]


def check_fields(config: Any, group: str, checks: Mapping[str, Check]) -> None:
    """Check fields of a frozen dataclass; the keys are names of fields, joined by blanks."""
    for names, check in checks.items():
        for name in names.split():
            kept = check(f"{group}.{name}", getattr(config, name))
            if kept is not None:
                object.__setattr__(config, name, kept)


def each(check: Check, in_order: bool = False) -> Check:
    """Check each value of a list of different ones, kept as a tuple, sorted if asked for."""

    def checked(name: str, values: Any) -> tuple[Any, ...]:
        kept = require_list(name, values)
        for value in kept:
            check(name, value)
        return tuple(sorted(kept)) if in_order else kept

    return checked


def integer(low: int) -> Check:
    """A whole number of at least `low`."""
    return partial(require_integer, minimum=low)


def number(low: float, high: float, *, above: bool = False, below: bool = False) -> Check:
    """A number between `low` and `high`; `above` and `below` exclude the ends themselves."""
    return partial(require_number, low=low, high=high, above=above, below=below)


def choice(names: tuple[str, ...]) -> Check:
    """One of the names."""
    return partial(require_choice, choices=names)


def workers(name: str, value: Any) -> None:
    """A number of processes, or "auto"."""
    if value != "auto":
        require_integer(name, value, 1)
