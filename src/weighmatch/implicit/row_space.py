"""A linear layer sees no more directions than its batch has rows.

Where the inputs X (n, d) of a layer z = XWᵀ + b are data and n < d, only the part of W in the row
space of X moves the loss: W = A Qᵀ + W⊥ with X = X Q Qᵀ, and every product with the curvature maps
that space to itself and its complement to zero. So the layer is differentiated in A, (m, n) for
the m outputs instead of (m, d), and a solver whose iterates are polynomials of C times g works on
the coordinates of g in that space, and on one more for the rest of g, which C does not see. In
exact arithmetic its iterates are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from weighmatch.implicit.evaluation import require_dependence
from weighmatch.implicit.operators import LinearOperator, Restriction

LINEAR = ("input", "weight", "bias")
_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
Apply = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class RowSpaces(TorchFunctionMode):
    """Inside of it, layers with constant inputs are written in the row spaces of these.

    Args:
        leaves: the parameters, as the loss takes them.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self._leaves = leaves
        # Of the number of a leaf: the coordinates A, zero, (m, n), and the basis Q, (d, n).
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._found and func in _GRADIENTS:
            # A gradient in the whole weight would miss what goes through its coordinates.
            raise RuntimeError("a loss that is made of gradients has no row spaces")
        if func is F.linear:
            result = self._linear(**dict(zip(LINEAR, args, strict=False)), **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """None where nothing is gained."""
        if not torch.is_grad_enabled():  # pseudo-labels, for example
            return None
        # Inside of vmap every example would get a basis of its own.
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(input)
        if wrapped or input.requires_grad or input.ndim != 2 or 2 * len(input) > input.shape[1]:
            return None
        if input.dtype != weight.dtype or input.dtype not in (torch.float32, torch.float64):
            return None
        number = next((i for i, leaf in enumerate(self._leaves) if leaf is weight), None)
        # A layer that is used twice has one row space a use.
        if number is None or number in self._found or not bool(torch.isfinite(input).all()):
            return None
        basis, coordinates = torch.linalg.qr(input.T)
        moved = weight.new_zeros(len(weight), len(input), requires_grad=True)
        self._found[number] = (moved, basis)
        z: Tensor = F.linear(input, weight.detach(), bias) + coordinates.T @ moved.T
        return z

    def points(self) -> "Points":
        """What to differentiate in, once the loss has been computed."""
        return Points(tuple(self._leaves), dict(self._found))


@dataclass
class Points:
    """The tensors that a graph is differentiated in, and the way from and to the parameters.

    Attributes:
        leaves: the parameters.
        found: of the number of a leaf, its coordinates A and basis Q.
        besides: numbers of the leaves with coordinates that the graph also uses otherwise, as a
            regulariser does.
    """

    leaves: tuple[Tensor, ...]
    found: dict[int, tuple[Tensor, Tensor]]
    besides: tuple[int, ...] = ()

    def gradient(
        self, value: Tensor, cotangent: Tensor | None = None, name: str = "loss"
    ) -> tuple[Tensor, ...]:
        """∇⟨value, cotangent⟩ in all points, with its graph; finds what is used besides.

        Raises:
            ValueError: if the value, called `name`, depends on none of them.
        """
        if not value.requires_grad:
            require_dependence([], name)
        found = tuple(self.found)
        points = [*self._points, *(self.leaves[i] for i in found)]
        gradients = torch.autograd.grad(
            value, points, cotangent, create_graph=True, allow_unused=True
        )
        require_dependence(gradients, name)
        kept = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self._points, gradients, strict=False)
        ]
        extra = dict(zip(found, gradients[len(self.leaves) :], strict=True))
        self.besides = tuple(i for i, g in extra.items() if g is not None)
        return *kept, *(g for g in extra.values() if g is not None)

    @property
    def _points(self) -> list[Tensor]:
        return [self.found[i][0] if i in self.found else leaf for i, leaf in enumerate(self.leaves)]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self._points, *(self.leaves[i] for i in self.besides)]

    def into(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """From tensors shaped as the parameters, with any leading dimension, to `tensors`."""
        inside = [p @ self.found[i][1] if i in self.found else p for i, p in enumerate(pieces)]
        return [*inside, *(pieces[i] for i in self.besides)]

    def out_of(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """The transpose of `into`."""
        count = len(self.leaves)
        whole = [
            p @ self.found[i][1].T if i in self.found else p for i, p in enumerate(pieces[:count])
        ]
        for i, piece in zip(self.besides, pieces[count:], strict=True):
            whole[i] = whole[i] + piece
        return whole

    @property
    def invariant(self) -> bool:
        """Whether there are row spaces, and the curvature maps what lies outside to zero."""
        return bool(self.found) and not self.besides


class _Inside(LinearOperator):
    """C on the coordinates of `Points` and on one direction more, which it maps to zero."""

    def __init__(self, whole: LinearOperator, shapes: Sequence[Tensor], apply: Apply) -> None:
        super().__init__(sum(s.numel() for s in shapes) + 1, whole.dtype, whole.device)
        self.positive_semidefinite = whole.positive_semidefinite
        self.smallest_eigenvalue = whole.smallest_eigenvalue
        self._whole, self._shapes, self._apply = whole, shapes, apply

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """All coordinates but the last, shaped as the points."""
        split = vector[:-1].split([s.numel() for s in self._shapes])
        return [piece.view_as(s) for piece, s in zip(split, self._shapes, strict=True)]

    def _product(self, vector: Tensor) -> Tensor:
        self._whole.products += 1
        product = self._apply(self.pieces(vector))
        return torch.cat([*(p.reshape(-1) for p in product), vector.new_zeros(1)])


def restrict(
    whole: LinearOperator, points: Points, pieces: Sequence[Tensor], apply: Apply
) -> Restriction:
    """`whole` on a space that holds the vector of `pieces`.

    Args:
        whole: whose products are counted.
        points: with `invariant`.
        pieces: the vector, shaped as the parameters.
        apply: the product from and to tensors shaped as the points.
    """
    inside = points.into(pieces)
    operator = _Inside(whole, points.tensors, apply)
    rest = [p - seen for p, seen in zip(pieces, points.out_of(inside), strict=True)]
    length = torch.stack([torch.linalg.vector_norm(r) for r in rest]).norm()
    scale = float(length) or 1.0

    def lift(vector: Tensor) -> Tensor:
        along = vector[-1] / scale
        lifted = points.out_of(operator.pieces(vector))
        return torch.cat([(p + along * r).reshape(-1) for p, r in zip(lifted, rest, strict=True)])

    coordinates = torch.cat([*(p.reshape(-1) for p in inside), length.reshape(1)])
    return Restriction(operator, coordinates, lift)
