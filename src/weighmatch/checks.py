"""Checks of parameters: each error is one sentence with the parameter's name and the cure."""

import re
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")


class ToldError(Exception):
    """An error that is one sentence for the user, who is shown no traceback."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun, such as "1 image" and "2 images"; `many` is for other plurals."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def find_nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that was most likely meant; None if none is near."""
    # A name within a namespace or a family is often given by its last part.
    short = {re.split("[./]", other)[-1]: other for other in known}
    parts = get_close_matches(name, short, n=1)
    found = parts if name in short else get_close_matches(name, known, n=1) or parts
    return short.get(found[0], found[0]) if found else None


def lacks(group: str, unknown: Sequence[str], known: Collection[str]) -> str:
    """The sentence about parameters that a group lacks: those that were meant, or all it has."""
    meant = {name: near for name in unknown if (near := find_nearest(name, known))}
    found = [near if len(unknown) == 1 else f"{near} for {name}" for name, near in meant.items()]
    cure = f"did you mean {', '.join(found)}?" if found else f"it has {', '.join(sorted(known))}"
    return f"{group} has no parameter {', '.join(unknown)}; {cure}"


def require_boolean(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def require_integer(name: str, value: Any, minimum: int) -> None:
    """Raise a ValueError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def require_multiple(name: str, value: Any, of: int, reason: str) -> None:
    """Raise a ValueError unless `value` is a positive multiple of `of`."""
    require_integer(name, value, of)
    if value % of:
        raise ValueError(f"{name} must be a multiple of {of} ({reason}), got {value}")


def require_number(
    name: str, value: Any, low: float, high: float, *, above: bool = False, below: bool = True
) -> None:
    """Raise a ValueError unless `value` lies between `low` and `high`.

    Args:
        name: of the parameter.
        value: to check.
        low: smallest value allowed, or excluded where `above`.
        high: largest value allowed, or excluded where `below`.
        above: exclude `low` itself.
        below: exclude `high` itself.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        enough = value > low if above else value >= low
        little = value < high if below else value <= high
        if enough and little:
            return
    lower = f"{'above' if above else 'at least'} {low:g}"
    upper = f"{'below' if below else 'at most'} {high:g}"
    raise ValueError(f"{name} must be a number {lower} and {upper}, got {value!r}")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; choose from {', '.join(choices)}")


def require_images(name: str, images: Any) -> "NDArray[np.uint8]":
    """The images (n, C, H, W) uint8, side by side in memory; a memory map stays one.

    Raises:
        ValueError: unless they are that, n at least 1 and C 1 or 3.
    """
    import numpy as np

    found = images if isinstance(images, np.memmap) else np.asarray(images)
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[1] not in (1, 3):
        raise ValueError(
            f"{name} must be uint8 (grey levels 0 to 255) of shape (n, channels, height, width) "
            f"with 1 or 3 channels, got {found.dtype} of shape {found.shape}; convert them to grey "
            "or RGB, move the channels to the second place or add it"
        )
    if not len(found):
        raise ValueError(f"{name} must have at least one image")
    return found if found.flags.c_contiguous else np.ascontiguousarray(found)


def require_seeds(name: str, seeds: Any) -> tuple[int, ...]:
    """The seeds as a tuple; a ValueError unless they are different whole numbers ≥ 0."""
    listed = isinstance(seeds, list | tuple) and len(seeds) > 0
    whole = listed and all(
        isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**31 for s in seeds
    )
    if not whole or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{name} must be a list of different whole numbers from 0, such as [10, 11, 12], "
            f"got {seeds!r}{_as_a_list(name, seeds)}"
        )
    return tuple(seeds)


def require_list(name: str, values: Any) -> tuple[Any, ...]:
    """The values as a tuple; a ValueError unless they are a list of different ones."""
    if (
        not isinstance(values, list | tuple)
        or not values
        or any(values.count(value) > 1 for value in values)
    ):
        raise ValueError(
            f"{name} must be a list of different values, got {values!r}{_as_a_list(name, values)}"
        )
    return tuple(values)


def _as_a_list(name: str, given: Any) -> str:
    """The cure where a single value was given for a list."""
    if isinstance(given, list | tuple):
        return ""
    return f"; a list has brackets and, in a command, quotes: --params '{name}=[{given}]'"


def require_group(name: str, value: Any, kind: type[T]) -> T:
    """`value` as the dataclass `kind`, from a dictionary of its fields.

    Raises:
        ValueError: if it is no dictionary, or has a key that is no field.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a group of parameters, got {value!r}")
    known = sorted(f.name for f in fields(kind))  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        raise ValueError(lacks(name, unknown, known))
    return kind(**value)


def with_changes(name: str, group: T, changes: Any) -> T:
    """A copy of the dataclass `group` with the fields that `changes` names, and so within it.

    Raises:
        ValueError: if `changes` is no dictionary, has a key that is no field, or a value that
            the dataclass refuses.
    """
    if not isinstance(changes, dict):
        raise ValueError(f"{name} must be a group of parameters, got {changes!r}")
    known = sorted(f.name for f in fields(group))  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in changes if key not in known)
    if unknown:
        raise ValueError(lacks(name, unknown, known))
    new = {}
    for key, value in changes.items():
        old = getattr(group, key)
        new[key] = with_changes(f"{name}.{key}", old, value) if is_dataclass(old) else value
    return replace(group, **new)  # type: ignore[type-var]
