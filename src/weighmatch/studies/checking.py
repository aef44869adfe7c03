"""Checks of a group of parameters, field by field; imports no torch."""

from collections.abc import Callable, Mapping
from typing import Any

from weighmatch.checks import (
    require_boolean,
    require_choice,
    require_integer,
    require_list,
    require_number,
)

# Called with the name of a parameter and its value: raises a ValueError, or gives what is kept.
Check = Callable[[str, Any], Any]


def check_fields(config: Any, group: str, checks: Mapping[str, Check]) -> None:
    """Check the fields of a frozen dataclass, and keep what each check gives.

    Args:
        config: the dataclass.
        group: name of the group of parameters that it is.
        checks: names of fields, joined by blanks, and the check of each of them.
    """
    for names, check in checks.items():
        for name in names.split():
            object.__setattr__(config, name, check(f"{group}.{name}", getattr(config, name)))


def each(check: Check, in_order: bool = False) -> Check:
    """Each value of a list of different values, kept as a tuple, sorted if asked for."""

    def checked(name: str, values: Any) -> tuple[Any, ...]:
        kept = tuple(check(name, value) for value in require_list(name, values))
        return tuple(sorted(kept)) if in_order else kept

    return checked


def keep(require: Callable[[str, Any], object]) -> Check:
    """The value as it is, where `require` raises nothing."""

    def checked(name: str, value: Any) -> Any:
        require(name, value)
        return value

    return checked


def integer(low: int) -> Check:
    """A whole number of at least `low`."""
    return keep(lambda name, value: require_integer(name, value, low))


def number(low: float, high: float, *, above: bool = False, below: bool = False) -> Check:
    """A number between `low` and `high`; `above` and `below` exclude the ends themselves."""
    return keep(lambda name, v: require_number(name, v, low, high, above=above, below=below))


def choice(names: tuple[str, ...]) -> Check:
    """One of the names."""
    return keep(lambda name, value: require_choice(name, value, names))


def workers(name: str, value: Any) -> Any:
    """A number of processes, or "auto"."""
    return value if value == "auto" else integer(1)(name, value)


boolean = keep(require_boolean)
