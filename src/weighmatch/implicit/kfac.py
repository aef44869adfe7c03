"""Kronecker-factored curvature (Martens & Grosse, 2015; Grosse & Martens, 2016), by curvlinops.

curvlinops takes a module and one of three losses. Here both are made from a `GaussNewton`: the
module of `weighmatch.implicit.layers`, and the squared error of outputs multiplied by a root of
H_z, whose Gauss-Newton matrix is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weighmatch.implicit.carried import carry, find, fingerprint
from weighmatch.implicit.exact import solve_symmetric
from weighmatch.implicit.flat import flatten, unflatten
from weighmatch.implicit.gauss_newton import GaussNewton
from weighmatch.implicit.layers import _Layers
from weighmatch.implicit.method import Iterate, Method, State
from weighmatch.implicit.operators import LinearOperator

Apply = Callable[[Tensor], Tensor]
# Parameters outside of linear and convolution layers form one exact block up to this size.
LARGEST_REST = 4096


@dataclass(frozen=True, kw_only=True)
class KFAC(Method):
    """One Kronecker product a layer, inverted with exact damping; nothing between layers.

    Linear and 2-D convolution layers that are called as `torch.nn.functional.linear` and
    `conv2d` (what `torch.nn` does) on a parameter itself are found by looking at one evaluation
    of the outputs; so is a weight that is used several times in the same way. All other
    parameters (norms, scales, embeddings, a weight that is used in two ways, a bias that two
    weights share) are one block of their own, taken exactly from one product each. An operator
    that is not a `GaussNewton` shows no layers: it is all "rest". Spends one product a class and
    one a rest parameter. As a preconditioner: `ConjugateGradient(preconditioner=KFAC())`.

    Attributes:
        eigenvalue_corrected: EK-FAC (George et al., 2018) instead of K-FAC.
        factors: the Gauss-Newton operator that the factors are taken from, where the system's
            own operator is another one, for example the Hessian. A `state` carries the factors
            from call to call, until a solve with them is much worse than it was with new ones.
        shorten: as in `Method`, but off: what K-FAC inverts exactly is the blocks of the layers.

    Raises:
        ValueError: from `solve`, if more than 4,096 parameters are outside of such layers.
    """

    approximate: ClassVar[bool] = True
    carries: ClassVar[str | None] = "kfac"
    shorten: bool = False
    eigenvalue_corrected: bool = False
    factors: GaussNewton | None = None

    def _iterate(self, op: LinearOperator, unit: Tensor, state: State | None) -> Iterate:
        source = self.factors or op
        finite = True
        if isinstance(source, GaussNewton):
            finite = bool(torch.isfinite(source.output_curvature()).all())
        if not finite:
            return Iterate(torch.zeros_like(unit), status="diverged", measured=1.0)
        apply = self._inverse(op, self.damping, state, positive=False)
        return Iterate(apply(unit))

    def preconditioner(
        self, op: LinearOperator, damping: float, state: State | None, affordable: int
    ) -> Apply:
        """M⁻¹ = (K-FAC + δI)⁻¹; its factors come before the budget's iterations, if need be.

        A larger damping of this method's own takes the place of δ: L2 in the loss of a Hessian
        system is not in the factors.

        Args:
            op: the curvature.
            damping: δ of the system.
            state: as in `solve`.
            affordable: products that may be spent; where the factors need more and the state
                has none, there is no preconditioning.
        """
        has_factors = find(state, "kfac", self._settings(op)) is not None
        if not has_factors and _Network.cost(self.factors or op) > affordable:
            return lambda r: r
        return self._inverse(op, max(damping, self.damping), state, positive=True)

    def _inverse(
        self, op: LinearOperator, damping: float, state: State | None, positive: bool
    ) -> Apply:
        def make() -> _Network:
            return _Network(self.factors or op, op, self.eigenvalue_corrected)

        return carry(state, "kfac", self._settings(op), make).inverse(damping, positive)

    def _settings(self, op: LinearOperator) -> tuple[Any, ...]:
        return fingerprint(op, self.eigenvalue_corrected, self.factors is None)


class _Network:
    """The layers behind an operator, their Kronecker factors, and the block of the rest."""

    def __init__(self, source: LinearOperator, op: LinearOperator, corrected: bool) -> None:
        self.size = op.shape[0]
        self._module: _Layers | None = None
        rest = torch.ones(self.size, dtype=torch.bool, device=op.device)
        if isinstance(source, GaussNewton):
            self._module = _Layers(source)
            op.products += self._module.classes
            seen = {
                name: torch.full_like(p, name in self._module.positions)
                for name, p in source.params.items()
            }
            rest = ~flatten(seen).bool()
        self._params = source.params if isinstance(source, GaussNewton) else {}
        self._corrected = corrected
        self._kronecker: Any = None
        self._rest = rest.nonzero().squeeze(1)
        count = len(self._rest)
        if count > LARGEST_REST:
            raise ValueError(
                f"{count} parameters lie outside of the linear and convolution layers that "
                f"KFAC can see{self._largest_outside()}, more than the {LARGEST_REST} it takes as "
                f"one exact block; leave them out of params, or take a method that only multiplies"
            )
        block = torch.zeros(count, count, dtype=op.dtype, device=op.device)
        for start in range(0, count, 64):  # (P, count) at once could be gigabytes
            columns = self._rest[start : start + 64]
            basis = torch.zeros(self.size, len(columns), dtype=op.dtype, device=op.device)
            basis[columns, torch.arange(len(columns), device=op.device)] = 1
            block[:, start : start + 64] = (op @ basis)[self._rest]
        self._block = (block + block.T) / 2

    def _largest_outside(self) -> str:
        """The name of the largest parameter outside, for the message."""
        inside = set() if self._module is None else set(self._module.positions)
        outside = {k: p.numel() for k, p in self._params.items() if k not in inside}
        return f" (most of them {max(outside, key=outside.__getitem__)!r})" if outside else ""

    @staticmethod
    def cost(source: LinearOperator) -> int:
        """Products that the factors of an operator will take."""
        if not isinstance(source, GaussNewton):
            return source.shape[0]
        layers = _Layers(source)
        seen = sum(source.params[name].numel() for name in layers.positions)
        return layers.classes + source.shape[0] - seen

    def inverse(self, damping: float, positive: bool) -> Apply:
        """(K-FAC + δI)⁻¹ on flat vectors."""
        kronecker = None
        if self._module is not None and self._module.positions:
            kronecker = self._kronecker_inverse(damping)

        def apply(vector: Tensor) -> Tensor:
            result = torch.zeros_like(vector)
            if kronecker is not None and self._module is not None:
                pieces = unflatten(vector, self._params)
                solved = kronecker @ [pieces[name] for name in self._module.positions]
                found = dict(zip(self._module.positions, solved, strict=True))
                result = flatten(
                    {k: found[k] if k in found else torch.zeros_like(p) for k, p in pieces.items()}
                ).to(vector.dtype)
            if len(self._rest):
                part = solve_symmetric(self._block, vector[self._rest], damping, positive).value
                result = result.index_copy(0, self._rest, part)
            return result

        return apply

    def _kronecker_inverse(self, damping: float) -> Any:
        from curvlinops import (
            EKFACLinearOperator,
            KFACInverseLinearOperator,
            KFACLinearOperator,
        )

        assert self._module is not None
        if self._kronecker is None:
            kind = EKFACLinearOperator if self._corrected else KFACLinearOperator
            self._kronecker = kind(
                self._module,
                nn.MSELoss(reduction="sum"),
                self._module.layer_parameters,
                self._module.data,
                fisher_type="type-2",
                check_deterministic=False,
                num_per_example_loss_terms=1,
                num_data=self._module.examples,
            )
            if not self._corrected:
                self._kronecker.compute_kronecker_factors()
                for name, part in self._module.shares.items():
                    self._kronecker._input_covariances[name].mul_(part)
        # Zero damping would divide by the zero eigenvalues that Kronecker factors often have.
        floor = torch.finfo(self._module.root.dtype).eps
        return KFACInverseLinearOperator(
            self._kronecker, damping=max(damping, floor), use_exact_damping=True
        )
