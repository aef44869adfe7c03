"""Inverse-Hessian-vector products and hypergradients, on torch; K-FAC on curvlinops."""

from weighmatch.implicit.chebyshev import Chebyshev
from weighmatch.implicit.conjugate_gradient import ConjugateGradient
from weighmatch.implicit.curvature import Hessian
from weighmatch.implicit.diagonal import Diagonal
from weighmatch.implicit.exact import Exact
from weighmatch.implicit.finite_difference import darts_gradient, sama_gradient
from weighmatch.implicit.flat import Parameters, flatten, unflatten
from weighmatch.implicit.gauss_newton import EmpiricalFisher, GaussNewton
from weighmatch.implicit.hypergradient import implicit_gradient, weight_gradient
from weighmatch.implicit.identity import Identity
from weighmatch.implicit.kfac import KFAC
from weighmatch.implicit.method import Method, Solution, State
from weighmatch.implicit.minres import MinRes
from weighmatch.implicit.neumann import Neumann
from weighmatch.implicit.nystrom import Nystrom
from weighmatch.implicit.operators import Dense, LinearOperator, Summed
from weighmatch.implicit.spectrum import (
    asymmetry,
    extreme_eigenvalues,
    lower_bound,
    spectral_density,
)
from weighmatch.implicit.unrolled import unrolled_gradient
from weighmatch.implicit.woodbury import Woodbury

__all__ = [
    "KFAC",
    "Chebyshev",
    "ConjugateGradient",
    "Dense",
    "Diagonal",
    "EmpiricalFisher",
    "Exact",
    "GaussNewton",
    "Hessian",
    "Identity",
    "LinearOperator",
    "Method",
    "MinRes",
    "Neumann",
    "Nystrom",
    "Parameters",
    "Solution",
    "State",
    "Summed",
    "Woodbury",
    "asymmetry",
    "darts_gradient",
    "extreme_eigenvalues",
    "flatten",
    "implicit_gradient",
    "lower_bound",
    "sama_gradient",
    "spectral_density",
    "unflatten",
    "unrolled_gradient",
    "weight_gradient",
]
