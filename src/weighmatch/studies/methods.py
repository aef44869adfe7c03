"""Ways to a hypergradient: each is one row, which studies, parameters and figures read.

A new class of `weighmatch.implicit` (a `Method`, which registers itself) needs no row here:
`all_methods` makes one for it, from its attributes `label`, `colour` and `marker` where it has
them. Importing this module imports no torch; asking for a method that has no row here does.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from weighmatch.checks import require_choice

if TYPE_CHECKING:
    from weighmatch.implicit import Method

# Okabe & Ito (2008).
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
RED, SKY, GREY, BLACK = "#D55E00", "#56B4E9", "#999999", "#000000"
# Tol (2021), muted: colours of methods that have no row here.
ADDED_COLOURS = ("#332288", "#882255", "#999933", "#44AA99", "#661100", "#AA4499", "#DDCC77")
# Arguments of a solver that its budget sets.
LIMITS = ("max_products", "rank", "probes")


@dataclass(frozen=True)
class HypergradientMethod:
    """One way to a hypergradient.

    Attributes:
        name: what parameters and tables call it.
        label: what figures call it.
        colour: colour of its marks in figures.
        marker: matplotlib's sign for its marks.
        solver: name of the class of `weighmatch.implicit` that solves for v; "": the method is
            not an IHVP.
        settings: arguments of the solver.
        preconditioner: name of the class that preconditions the solver, if any; its rank is half
            of the budget.
        budgeted: whether a budget of products, or of unrolled steps, limits it.
        reserve: products of the budget that are not spent on the rank of a sketch, or on probes.
        operator: what it inverts: the "curvature" of the study, the same with the "factors" of
            its layers, or, of the data term alone, the "gauss_newton" matrix or the empirical
            "fisher".
        trains: whether the study of meta-learning has it.
        minor: whether figures with room for few methods leave it out.
    """

    name: str
    label: str
    colour: str
    marker: str = "o"
    solver: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    preconditioner: str = ""
    budgeted: bool = False
    reserve: int = 0
    operator: Literal["curvature", "factors", "gauss_newton", "fisher"] = "curvature"
    trains: bool = True
    minor: bool = False

    def build(self, damping: float, budget: int, **more: Any) -> "Method":
        """The solver with its damping and its budget, and what it takes of further arguments."""
        solvers = _solvers()
        kind = solvers[self.solver]
        rank = max(1, budget - self.reserve)
        given = {**dict(zip(LIMITS, (budget, rank, rank), strict=True)), **more}
        if self.preconditioner:
            kind_of_sketch: Any = solvers[self.preconditioner]
            given["preconditioner"] = kind_of_sketch(rank=max(1, budget // 2))
        taken = {f.name for f in fields(kind)}
        arguments = {name: value for name, value in given.items() if name in taken}
        return kind(damping=damping, **{**arguments, **self.settings})


def _row(name: str, label: str, colour: str, marker: str = "o", **more: Any) -> HypergradientMethod:
    return HypergradientMethod(name, label, colour, marker, **more)


_CG: dict[str, Any] = {"solver": "ConjugateGradient", "budgeted": True}
_NYSTROM: dict[str, Any] = {"solver": "Nystrom", "budgeted": True}
_ROWS = (
    _row("none", "no outer learning", GREY, "x"),
    _row("identity", "identity (no curvature)", GREY, "s", solver="Identity"),
    _row(
        "neumann",
        "Neumann series",
        ORANGE,
        solver="Neumann",
        budgeted=True,
        settings={"extrapolate": False},
    ),
    _row(
        "neumann_extrapolated",
        "Neumann, extrapolated",
        RED,
        solver="Neumann",
        budgeted=True,
        trains=False,
    ),
    _row("chebyshev", "Chebyshev", GREEN, solver="Chebyshev", budgeted=True),
    _row("conjugate_gradient", "conjugate gradients", BLUE, **_CG),
    _row("minres", "MINRES", SKY, solver="MinRes", budgeted=True, minor=True),
    _row("nystrom", "Nyström", PINK, **_NYSTROM, reserve=3),
    _row(
        "nystrom_plain",
        "Nyström, 1/δ outside",
        PINK,
        "^",
        **_NYSTROM,
        settings={"complement": "damping"},
        reserve=1,
        trains=False,
        minor=True,
    ),
    _row(
        "nystrom_cg",
        "CG, Nyström preconditioner",
        BLACK,
        **_CG,
        preconditioner="Nystrom",
        minor=True,
    ),
    _row("diagonal", "diagonal (Hutchinson)", GREY, solver="Diagonal", budgeted=True, reserve=1),
    _row(
        "woodbury_fisher",
        "empirical Fisher (Woodbury)",
        ORANGE,
        "D",
        solver="Woodbury",
        operator="fisher",
        minor=True,
    ),
    _row("kfac", "K-FAC", GREEN, "D", solver="KFAC", operator="factors", minor=True),
    _row(
        "ekfac",
        "EK-FAC",
        BLUE,
        "D",
        solver="KFAC",
        settings={"eigenvalue_corrected": True},
        operator="factors",
        trains=False,
        minor=True,
    ),
    _row(
        "gauss_newton_cg",
        "CG on the Gauss-Newton matrix",
        SKY,
        "^",
        **_CG,
        operator="gauss_newton",
        trains=False,
    ),
    _row("exact", "exact", RED, "*", solver="Exact"),
    _row("unrolled", "unrolled differentiation", GREEN, "^", budgeted=True),
    _row("darts", "DARTS (finite difference)", BLACK, "s", minor=True),
    _row("sama", "SAMA-like", RED, "s", minor=True),
)
# Methods that parameters of the study of meta-learning name without further ado.
METHOD_NAMES = tuple(row.name for row in _ROWS if row.trains)


def added_solvers() -> "tuple[type[Method], ...]":
    """Registered classes of IHVPs that have no row here."""
    used = {row.solver for row in _ROWS}
    return tuple(kind for name, kind in _solvers().items() if name not in used)


def all_methods() -> tuple[HypergradientMethod, ...]:
    """The rows here, and those of all other registered IHVPs; figures show them in this order."""
    added = []
    for number, kind in enumerate(added_solvers()):
        spare = ADDED_COLOURS[number % len(ADDED_COLOURS)]
        added.append(
            _row(
                re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower(),
                getattr(kind, "label", kind.__name__),
                getattr(kind, "colour", spare),
                getattr(kind, "marker", "P"),
                solver=kind.__name__,
                budgeted=any(f.name in LIMITS for f in fields(kind)),
                reserve=3,
            )
        )
    return (*_ROWS, *added)


def get_method(name: str) -> HypergradientMethod:
    """The method of that name; a name that no class stands behind gets a row for figures."""
    (row,) = get_methods([name])
    return row


def require_method(parameter: str, name: Any) -> None:
    """Raise a ValueError unless the study of meta-learning has a method of that name."""
    if name not in METHOD_NAMES:
        require_choice(parameter, name, tuple(row.name for row in all_methods() if row.trains))


def get_methods(names: Iterable[str]) -> list[HypergradientMethod]:
    """The methods of these names, each once, in the order of all methods.

    Names that no class stands behind any more come last, with rows for figures.
    """
    wanted = list(dict.fromkeys(names))
    known = {row.name: row for row in _ROWS}
    if any(name not in known for name in wanted):
        known = {row.name: row for row in all_methods()}
    lost = [name for name in wanted if name not in known]
    return [row for name, row in known.items() if name in wanted] + [
        _row(name, name.replace("_", " "), ADDED_COLOURS[i % len(ADDED_COLOURS)], "P")
        for i, name in enumerate(lost)
    ]


def _solvers() -> "dict[str, type[Method]]":
    from weighmatch.implicit import Method

    return Method.registry
