"""The curvature of a network's loss as an operator on its parameters, and the Hessian.

What a product costs in gradients of the loss, from `python -m benchmarks.ihvp_peers` on one CPU
thread in float32 (torch 2.15); in brackets what is spent once:

                                               WRN-10-1, batch 32   MLP 267k, batch 128
    Hessian                                      2.2 (1.2)            1.3 (2.2)
    Hessian, torch's own layers                  2.4 (1.5)            1.2 (1.9)
    Hessian, `torch.func.linearize`              2.4 (77)             1.2 (over 100)
    Hessian, a column of 16                      2.3 (1.3)            1.4 (1.0)
    Gauss-Newton                                 1.5 (1.0)            1.3 (1.4)
    Gauss-Newton, torch's own layers             2.2 (1.6)            1.1 (1.1)
    J v alone, `torch.func.linearize`            0.8 (29)             0.6 (22)
    Hessian, in the row space of the batch       none                 0.8 to 0.9, all included

So the graph is kept, with the convolutions and group norms of
`weighmatch.implicit.second_order`, unless a solver announces a thousand products or more. A block
of columns goes through one batched backward pass, which pays for small networks, where calls cost
more than arithmetic; with convolutions, where that is slower, the columns go one after another.
"""

import contextlib
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from weighmatch.implicit.evaluation import differentiable, evaluate, require_scalar
from weighmatch.implicit.flat import Parameters, unflatten
from weighmatch.implicit.memory import keep_freed_memory
from weighmatch.implicit.operators import LinearOperator, Restriction
from weighmatch.implicit.row_space import Points, RowSpaces, restrict
from weighmatch.implicit.second_order import CheapSecondOrder
from weighmatch.implicit.trees import leaves_of

T = TypeVar("T")

# Columns that go through one batched backward pass; each keeps activations of its own.
BLOCK = 16


class ParameterOperator(LinearOperator):
    """An operator on the parameters of a network, given by a product on lists of tensors.

    Attributes:
        linearize_from: expected products from which `torch.func.linearize` pays for itself.

    Raises:
        TypeError: if `params` is not a mapping of names to tensors.
        ValueError: if it holds what derivatives cannot be taken in, or mixes frozen parameters
            with others; if the caller's function does not depend on it; if the function is
            recomputed in the backward pass with other parameters.
    """

    linearize_from = 1000
    # What messages call the caller's function.
    _name = "loss"

    def __init__(self, params: Parameters) -> None:
        self.params = leaves_of(params)
        self._leaves = list(self.params.values())
        size = sum(p.numel() for p in self._leaves)
        super().__init__(size, self._leaves[0].dtype, self._leaves[0].device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._tangent: Callable[[Parameters], Parameters | Tensor] | None = None
        self._points = Points(tuple(self._leaves), {})
        # Batched convolutions with a batch of cotangents are slower than one after another.
        self._batches = not any(p.ndim > 2 for p in self._leaves)

    def _linearize(self, function: Callable[[Parameters], Parameters | Tensor]) -> None:
        """Multiply by the derivative of `function`, traced once, if that is the same product.

        With dropout in train mode it would not be: every call of the trace draws a new mask.
        Buffers that a forward pass writes to cannot be traced at all, and torch 2.15 traces
        circular padding to a wrong product without a word.
        """
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(self.shape[0], generator=generator, dtype=self.dtype).to(self.device)
        expected = self._product(probe)
        try:
            with differentiable():
                self._tangent = _linearized(function, self.params)
            # Twice: a trace of torch 2.11 may change its own constants as it is called.
            products = torch.stack([self._product(probe), self._product(probe)])
            difference = torch.linalg.vector_norm(products - expected, dim=1).max()
            tolerance = torch.finfo(self.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected)
            equal = bool(difference <= tolerance)
        except RuntimeError:
            equal = False
        if not equal:
            self._tangent = None
            self.linearize_from = sys.maxsize  # nor again

    def _graph(
        self, function: Callable[[Parameters], Tensor], cotangent: Callable[[Tensor], Tensor | None]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Values of `function`, a cotangent for them, and its pullback with its graph.

        Layers whose inputs are data are written in the row spaces of these where that can be.
        """
        spaces = RowSpaces(self._leaves)
        call = self._on_leaves(function)
        try:
            value = evaluate(call, self._leaves, self._name, modes=[spaces])
            self._points = spaces.points()
            u = cotangent(value)
            gradient = self._points.gradient(value, u, self._name)
        except RuntimeError:  # a loss that is made of gradients, for example
            if not spaces.points().found:
                raise
            value = evaluate(call, self._leaves, self._name)
            self._points = Points(tuple(self._leaves), {})
            u = cotangent(value)
            gradient = self._points.gradient(value, u, self._name)
        if self._points.found:
            self.linearize_from = sys.maxsize  # a trace would take all of the inputs again
        return value, u, gradient

    def _cheaply(self, build: Callable[[], T], *, cotangent_only: bool = False) -> T:
        """What `build` gives, inside of `CheapSecondOrder` where that helps and can be."""
        with differentiable():
            if not self._batches:  # a batch of cotangents needs torch's own layers
                mode = CheapSecondOrder(cotangent_only=cotangent_only)
                # A loss that is made of gradients or of torch.func's transforms.
                with contextlib.suppress(RuntimeError), mode:
                    return build()
            return build()

    def _on_leaves(
        self, function: Callable[[Parameters], Tensor]
    ) -> Callable[[Sequence[Tensor]], Tensor]:
        names = list(self.params)
        return lambda leaves: function(dict(zip(names, leaves, strict=True)))

    @abstractmethod
    def _apply(self, pieces: Sequence[Tensor], batched: bool) -> Sequence[Tensor]:
        """The product, from and to tensors shaped as those of `_points`.

        With `batched`, all of them have a leading dimension of columns.
        """

    def _apply_whole(self, pieces: Sequence[Tensor], batched: bool) -> Sequence[Tensor]:
        """The same from and to tensors shaped as the parameters."""
        try:
            return self._points.out_of(self._apply(self._points.into(pieces), batched))
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            changed = error
        raise RuntimeError(
            f"parameters or data were changed in place since this {type(self).__name__} was made; "
            f"make a new one, or make it of copies"
        ) from changed

    def _product(self, vector: Tensor) -> Tensor:
        product = self._apply_whole(list(unflatten(vector, self.params).values()), batched=False)
        return torch.cat([piece.reshape(-1) for piece in product])

    def restricted(self, vector: Tensor) -> Restriction | None:
        """In the row spaces of layers whose inputs are data; None where there are none."""
        if not self._points.invariant:
            return None
        pieces = list(unflatten(vector, self.params).values())
        return restrict(self, self._points, pieces, partial(self._apply, batched=False))

    def _block_product(self, block: Tensor) -> Tensor:
        if not self._batches or block.shape[1] < 2:
            return super()._block_product(block)
        sizes = [p.numel() for p in self._leaves]
        columns = []
        for chunk in block.split(BLOCK, dim=1):
            count = chunk.shape[1]
            pieces = [
                piece.T.reshape(count, *leaf.shape)
                for piece, leaf in zip(chunk.split(sizes), self._leaves, strict=True)
            ]
            columns.append(rows_of(self._apply_whole(pieces, batched=True), self._leaves, count).T)
        return torch.cat(columns, dim=1)


class Hessian(ParameterOperator):
    """∇²L(θ) of `loss(params) -> scalar` (Pearlmutter, 1994).

    The gradient's graph is built once and kept, so that a product is one backward pass
    through it. It holds the activations for as long as the operator lives.
    """

    def __init__(self, loss: Callable[[Parameters], Tensor], params: Parameters) -> None:
        super().__init__(params)
        self._loss = loss
        gradient = self._cheaply(self._build)
        # A loss that is linear in a parameter has a gradient without a graph there.
        kept = [(i, g) for i, g in enumerate(gradient) if g.requires_grad]
        self._kept = [i for i, _ in kept]
        self._gradient = [g for _, g in kept]

    def _build(self) -> tuple[Tensor, ...]:
        def cotangent(value: Tensor) -> None:
            require_scalar(value, self._name)

        return self._graph(self._loss, cotangent)[2]

    def expect(self, products: int) -> None:
        if products >= self.linearize_from and not self._batches and self._tangent is None:
            self._linearize(torch.func.grad(self._loss))

    def _apply(self, pieces: Sequence[Tensor], batched: bool) -> Sequence[Tensor]:
        if not self._gradient:
            return [torch.zeros_like(piece) for piece in pieces]
        if self._tangent is not None and not batched:
            with torch.no_grad():
                product = self._tangent(dict(zip(self.params, pieces, strict=True)))
            assert isinstance(product, dict)
            return list(product.values())
        return torch.autograd.grad(
            self._gradient,
            self._points.tensors,
            [pieces[i] for i in self._kept],
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=batched,
        )


def rows_of(pieces: Sequence[Tensor], leaves: Sequence[Tensor], count: int) -> Tensor:
    """Tensors shaped as the parameters, with or without a leading `count`, as (count, P)."""
    # A zero that autograd made up for an unused parameter has no leading dimension.
    return torch.cat(
        [
            piece.reshape(-1, leaf.numel()).expand(count, -1)
            for piece, leaf in zip(pieces, leaves, strict=True)
        ],
        dim=1,
    )


def _linearized(
    function: Callable[[Parameters], Parameters | Tensor], params: Parameters
) -> Callable[[Parameters], Parameters | Tensor]:
    """The derivative of `function` at `params`, traced once."""
    point = {name: p.detach() for name, p in params.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of its own constants
        tangent: Callable[[Parameters], Parameters | Tensor] = torch.func.linearize(
            function, point
        )[1]
    return tangent
