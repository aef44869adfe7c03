"""Inverse-Hessian-vector products and hypergradients. Needs torch alone."""

from weighmatch.implicit.conjugate_gradient import ConjugateGradient
from weighmatch.implicit.exact import Exact
from weighmatch.implicit.flat import Parameters, flatten, unflatten
from weighmatch.implicit.hypergradient import implicit_gradient, weight_gradient
from weighmatch.implicit.identity import Identity
from weighmatch.implicit.method import Method, Solution, State
from weighmatch.implicit.neumann import Neumann
from weighmatch.implicit.operators import Dense, GaussNewton, Hessian, LinearOperator
from weighmatch.implicit.spectrum import extreme_eigenvalues

__all__ = [
    "ConjugateGradient",
    "Dense",
    "Exact",
    "GaussNewton",
    "Hessian",
    "Identity",
    "LinearOperator",
    "Method",
    "Neumann",
    "Parameters",
    "Solution",
    "State",
    "extreme_eigenvalues",
    "flatten",
    "implicit_gradient",
    "unflatten",
    "weight_gradient",
]
