"""What a `state` carries from one solve to the next, and how it ages.

A sketch, a diagonal or the factors of a network describe the curvature that they were made from.
An entry therefore carries the settings and the operator's kind that it was made for, and is made
anew for any others. It also carries the residual that its method reached with it at first: where a
later solve with it is much worse, the curvature has moved on, and it is made anew.
"""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

from weighmatch.implicit.operators import LinearOperator

T = TypeVar("T")
State = MutableMapping[str, Any]

# A residual up to this one is good enough of a carried approximation, whatever a new one gives.
GOOD = 0.1
# Otherwise it may be so many times what it was when the approximation was new.
WORSE = 2.0


@dataclass
class Carried:
    """An entry of a state.

    Attributes:
        content: the sketch, diagonal or factors.
        settings: of the method and of the operator that it was made for.
        residual: what a solve with it reached when it was new; None: none has ended yet.
    """

    content: Any
    settings: tuple[Any, ...]
    residual: float | None = None

    def aged(self, residual: float) -> bool:
        """Whether a solve that ended with `residual` shows that the curvature has moved on."""
        if self.residual is None:
            return residual > 1
        # What is worse than zero, and worse than it was, is of no use to anybody.
        return residual > min(max(GOOD, WORSE * self.residual), max(1.0, 1.2 * self.residual))


def fingerprint(op: LinearOperator, *settings: Any) -> tuple[Any, ...]:
    """The settings, and the size, type and device of the operator."""
    return (*settings, op.shape[0], op.dtype, str(op.device))


def find(state: State | None, key: str, settings: tuple[Any, ...]) -> Carried | None:
    """The entry of `state` under `key` that was made for these `settings`; None: there is none."""
    entry = None if state is None else state.get(key)
    if isinstance(entry, Carried) and entry.settings == settings:
        return entry
    return None


def carry(state: State | None, key: str, settings: tuple[Any, ...], make: Callable[[], T]) -> T:
    """The content found in `state`, or what `make` gives, which `state` then carries."""
    entry = find(state, key, settings)
    if entry is not None:
        found: T = entry.content
        return found
    made = make()
    if state is not None and made is not None:
        state[key] = Carried(made, settings)
    return made
