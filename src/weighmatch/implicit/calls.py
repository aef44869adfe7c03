"""What a caller's function can be called with."""

import inspect
from collections.abc import Callable
from typing import Any


def takes_hyper(outer: Callable[..., Any]) -> bool:
    """Whether an outer loss is `outer(params, hyper)` rather than `outer(params)`.

    A second parameter with a default is for `hyper` only if it is called so: any other default
    is something that the caller has bound, as in `lambda p, x=x: …`, or may give himself, as in
    `outer(params, batch=None)`.
    """
    if not _binds(outer, 2):
        return False
    if not _binds(outer, 1):
        return True
    parameters = list(inspect.signature(outer).parameters.values())
    if len(parameters) < 2 or parameters[1].kind is inspect.Parameter.VAR_POSITIONAL:
        return True
    return parameters[1].name == "hyper"


def _binds(function: Callable[..., Any], count: int) -> bool:
    """Whether `function` can be called with `count` positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True
