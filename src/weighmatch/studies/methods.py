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

# Colours of methods that have no row here (Tol, 2021).
ADDED_COLOURS = ("#6699CC", "#CC6677", "#DDCC77", "#88CCEE", "#004488", "#BBCC33", "#777700")
# Arguments of a solver that its budget sets.
LIMITS = ("max_products", "rank", "probes")


@dataclass(frozen=True)
class HypergradientMethod:
    """One way to a hypergradient.

    Attributes:
        name: what parameters and tables call it.
        label: what figures call it.
        colour: colour of its marks in figures, which no other method has.
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
        untrained: whether the study of meta-learning leaves it out.
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
    untrained: bool = False
    minor: bool = False

    @property
    def is_main(self) -> bool:
        """Whether the report shows it: an IHVP that both studies have and that is not minor."""
        return bool(self.solver) and self.name != "exact" and not (self.minor or self.untrained)

    def build(self, damping: float, budget: int, **more: Any) -> "Method":
        """The solver with its damping and its budget, and what it takes of further arguments."""
        solvers = _solvers()
        kind = solvers[self.solver]
        rank = max(1, budget - self.reserve)
        given = {**dict(zip(LIMITS, (budget, rank, rank), strict=True)), **more}
        # The studies show what the formulas give; the library hands back nothing worse than zero.
        given["shorten"] = False
        if self.preconditioner:
            sketch: Any = solvers[self.preconditioner]
            given["preconditioner"] = sketch(rank=max(1, budget // 2))
        taken = {f.name for f in fields(kind)}
        arguments = {name: value for name, value in given.items() if name in taken}
        return kind(damping=damping, **{**arguments, **self.settings})


def _row(
    name: str, label: str, look: str, solver: str = "", flags: str = "", **more: Any
) -> HypergradientMethod:
    """A row; its look is a colour and a marker, its flags are names of fields that are true."""
    colour, _, marker = look.partition(" ")
    more |= dict.fromkeys(flags.split(), True)
    return HypergradientMethod(name, label, colour, marker or "o", solver, **more)


_CG = "ConjugateGradient"
_PLAIN_SERIES, _EK_FAC = {"extrapolate": False}, {"eigenvalue_corrected": True}
# Colours: Okabe & Ito (2008), and for what is more than eight Tol (2021), muted and bright.
_ROWS = (
    _row("none", "no outer learning", "#BBBBBB x"),
    _row("identity", "identity (no curvature)", "#777777 s", "Identity"),
    _row("neumann", "Neumann series", "#E69F00", "Neumann", "budgeted", settings=_PLAIN_SERIES),
    _row(
        "neumann_extrapolated", "Neumann, extrapolated", "#D55E00", "Neumann", "budgeted untrained"
    ),
    _row("chebyshev", "Chebyshev", "#009E73", "Chebyshev", "budgeted"),
    _row("conjugate_gradient", "conjugate gradients", "#0072B2", _CG, "budgeted"),
    _row("minres", "MINRES", "#56B4E9", "MinRes", "budgeted minor"),
    _row("nystrom", "Nyström", "#CC79A7", "Nystrom", "budgeted", reserve=3),
    _row(
        "nystrom_plain",
        "Nyström, 1/δ outside",
        "#AA4499 ^",
        "Nystrom",
        "budgeted untrained minor",
        settings={"complement": "damping"},
        reserve=1,
    ),
    _row(
        "nystrom_cg",
        "CG, Nyström preconditioner",
        "#000000",
        _CG,
        "budgeted minor",
        preconditioner="Nystrom",
    ),
    _row("diagonal", "diagonal (Hutchinson)", "#999933", "Diagonal", "budgeted minor", reserve=1),
    _row(
        "woodbury_fisher",
        "empirical Fisher (Woodbury)",
        "#661100 D",
        "Woodbury",
        "minor",
        operator="fisher",
    ),
    _row("kfac", "K-FAC", "#117733 D", "KFAC", "minor", operator="factors"),
    _row(
        "ekfac",
        "EK-FAC",
        "#332288 D",
        "KFAC",
        "untrained minor",
        settings=_EK_FAC,
        operator="factors",
    ),
    _row(
        "gauss_newton_cg",
        "CG on the Gauss-Newton matrix",
        "#44AA99 ^",
        _CG,
        "budgeted untrained",
        operator="gauss_newton",
    ),
    _row("exact", "exact", "#882255 *", "Exact"),
    _row("unrolled", "unrolled differentiation", "#997700 ^", "", "budgeted"),
    _row("darts", "DARTS (finite difference)", "#EE99AA s", "", "minor"),
    _row("sama", "SAMA-like", "#994455 s", "", "minor"),
)
# Methods that parameters of the study of meta-learning name without further ado.
METHOD_NAMES = tuple(row.name for row in _ROWS if not row.untrained)


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
                f"{getattr(kind, 'colour', spare)} {getattr(kind, 'marker', 'P')}",
                kind.__name__,
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
        require_choice(
            parameter, name, tuple(row.name for row in all_methods() if not row.untrained)
        )


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
        _row(name, name.replace("_", " "), f"{ADDED_COLOURS[i % len(ADDED_COLOURS)]} P")
        for i, name in enumerate(lost)
    ]


def _solvers() -> "dict[str, type[Method]]":
    from weighmatch import implicit  # the whole of it: methods register themselves

    return implicit.Method.registry
