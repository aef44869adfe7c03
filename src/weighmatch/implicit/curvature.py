"""The curvature of a network's loss: Hessian, Gauss-Newton, empirical Fisher.

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

from weighmatch.implicit.flat import Parameters, unflatten
from weighmatch.implicit.memory import keep_freed_memory
from weighmatch.implicit.operators import LinearOperator, Restriction
from weighmatch.implicit.row_space import Points, RowSpaces, restrict
from weighmatch.implicit.second_order import CheapSecondOrder

T = TypeVar("T")

# Columns that go through one batched backward pass; each keeps activations of its own.
BLOCK = 16


class _ParameterOperator(LinearOperator):
    """An operator on the parameters of a network, given by a product on lists of tensors.

    Attributes:
        linearize_from: expected products from which `torch.func.linearize` pays for itself.
    """

    linearize_from = 1000

    def __init__(self, params: Parameters) -> None:
        self.params = {k: p.detach().requires_grad_() for k, p in params.items()}
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
        try:
            with spaces:
                value = function(self.params)
            self._points = spaces.points()
            u = cotangent(value)
            gradient = self._points.gradient(value, u)
        except RuntimeError:  # a forward pass that is done again, without the mode, in the backward
            if not spaces.points().found:
                raise
            value = function(self.params)
            self._points = Points(tuple(self._leaves), {})
            u = cotangent(value)
            gradient = self._points.gradient(value, u)
        if self._points.found:
            self.linearize_from = sys.maxsize  # a trace would take all of the inputs again
        return value, u, gradient

    def _cheaply(self, build: Callable[[], T], *, cotangent_only: bool = False) -> T:
        """What `build` gives, inside of `CheapSecondOrder` where that helps and can be."""
        if not self._batches:  # a batch of cotangents needs torch's own layers
            # A loss that is made of gradients or of torch.func's transforms.
            with contextlib.suppress(RuntimeError), CheapSecondOrder(cotangent_only=cotangent_only):
                return build()
        return build()

    @abstractmethod
    def _apply(self, pieces: Sequence[Tensor], batched: bool) -> Sequence[Tensor]:
        """The product, from and to tensors shaped as those of `_points`.

        With `batched`, all of them have a leading dimension of columns.
        """

    def _apply_whole(self, pieces: Sequence[Tensor], batched: bool) -> Sequence[Tensor]:
        """The same from and to tensors shaped as the parameters."""
        return self._points.out_of(self._apply(self._points.into(pieces), batched))

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
            columns.append(_rows(self._apply_whole(pieces, batched=True), self._leaves, count).T)
        return torch.cat(columns, dim=1)


class Hessian(_ParameterOperator):
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
        return self._graph(self._loss, lambda _: None)[2]

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


class _PulledBack(_ParameterOperator):
    """Jᵀ M J, with J the Jacobian of `outputs(params)` and M a small matrix on the outputs.

    J v is one backward pass through the graph of Jᵀu, which is linear in u; Jᵀw is one through
    the network. Both graphs are kept.
    """

    positive_semidefinite = True

    def __init__(self, outputs: Callable[[Parameters], Tensor], params: Parameters) -> None:
        super().__init__(params)
        self._outputs_of = outputs
        self._outputs, self._dummy, self._pullback = self._cheaply(self._build, cotangent_only=True)
        self._kept = [i for i, g in enumerate(self._pullback) if g.requires_grad]

    def _build(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        outputs, dummy, pullback = self._graph(
            self._outputs_of, lambda z: torch.zeros_like(z, requires_grad=True)
        )
        assert dummy is not None
        return outputs, dummy, pullback

    @abstractmethod
    def _middle(self, tangent: Tensor, batched: bool) -> Tensor:
        """M times a tensor shaped as the outputs."""

    def expect(self, products: int) -> None:
        # With convolutions the pullback is the faster one.
        if products >= self.linearize_from and self._batches and self._tangent is None:
            self._linearize(self._outputs_of)

    def _pulled_rows(self, cotangents: Tensor) -> Tensor:
        """Jᵀw for each row w of (k, *outputs.shape), as (k, P); counts k products."""
        self.products += len(cotangents)
        if self._batches:
            rows = [
                _rows(
                    self._points.out_of(self._pull(chunk, batched=True)), self._leaves, len(chunk)
                )
                for chunk in cotangents.split(BLOCK)
            ]
        else:
            rows = [
                _rows(self._points.out_of(self._pull(row, batched=False)), self._leaves, 1)
                for row in cotangents
            ]
        return torch.cat(rows)

    def _push(self, pieces: Sequence[Tensor], batched: bool) -> Tensor:
        """J v."""
        if self._tangent is not None and not batched:
            with torch.no_grad():
                pushed = self._tangent(dict(zip(self.params, pieces, strict=True)))
            assert isinstance(pushed, Tensor)
            return pushed
        (tangent,) = torch.autograd.grad(
            [self._pullback[i] for i in self._kept],
            self._dummy,
            [pieces[i] for i in self._kept],
            retain_graph=True,
            is_grads_batched=batched,
        )
        return tangent

    def _pull(self, cotangent: Tensor, batched: bool) -> Sequence[Tensor]:
        """Jᵀ w."""
        return torch.autograd.grad(
            self._outputs,
            self._points.tensors,
            cotangent,
            retain_graph=True,
            materialize_grads=True,
            is_grads_batched=batched,
        )

    def _apply(self, pieces: Sequence[Tensor], batched: bool) -> Sequence[Tensor]:
        return self._pull(self._middle(self._push(pieces, batched), batched), batched)


class GaussNewton(_PulledBack):
    """Jᵀ H_z J, with J the Jacobian of the outputs z(θ) and H_z the Hessian of the loss in z.

    Positive semi-definite where `output_loss` is convex in the outputs, as cross-entropy is
    (Schraudolph, 2002; Martens, 2020).

    Args:
        outputs: `outputs(params) -> (B, C)`, for example logits.
        output_loss: `output_loss(outputs) -> scalar`, convex.
        params: where J is taken.
    """

    def __init__(
        self,
        outputs: Callable[[Parameters], Tensor],
        output_loss: Callable[[Tensor], Tensor],
        params: Parameters,
    ) -> None:
        super().__init__(outputs, params)
        self._z = self._outputs.detach().requires_grad_()
        (self._output_gradient,) = torch.autograd.grad(
            output_loss(self._z), self._z, create_graph=True
        )

    def output_curvature(self) -> Tensor:
        """The blocks (B, C, C) of H_z, one an example.

        Raises:
            ValueError: if H_z has others, as it has where the loss is not a sum over examples.
        """
        columns = []
        for c in range(self._z.shape[1]):
            probe = torch.zeros_like(self._z)
            probe[:, c] = 1
            columns.append(self._middle(probe, batched=False))
        blocks = torch.stack(columns, dim=2)
        # Any vector that differs from example to example shows what the blocks leave out.
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(self._z.shape, generator=generator, dtype=self.dtype).to(self.device)
        image = self._middle(probe, batched=False)
        difference = float((torch.einsum("bij,bj->bi", blocks, probe) - image).norm())
        # Probabilities near 1 leave rounding that is large beside their own curvature.
        tolerance = torch.finfo(self.dtype).eps * (1e3 * float(blocks.norm()) + 10)
        if difference > tolerance:
            raise ValueError(
                "output_loss is not a sum over examples (its Hessian in the outputs couples "
                "them), so that there is no block an example; use a method that only multiplies"
            )
        return blocks

    def factor(self) -> tuple[Tensor, float]:
        """Jᵀ H_z^½, (P, BC): B·C vectors pulled back, where that is less than P.

        For a loss that is a sum over examples, so that H_z has a block an example.
        """
        count, classes = self._z.shape
        if count * classes >= self.shape[0]:
            return super().factor()
        eigenvalues, vectors = torch.linalg.eigh(self.output_curvature().double())
        roots = (vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(1)).to(self.dtype)
        rows = []
        # Column c of every example's root at once would mix the examples: one at a time.
        for example in range(count):
            cotangents = torch.zeros(classes, count, classes, dtype=self.dtype, device=self.device)
            cotangents[:, example] = roots[example].T
            rows.append(self._pulled_rows(cotangents))
        return torch.cat(rows).T, 0.0

    def network_outputs(self, params: Parameters) -> Tensor:
        """z(θ), (B, C), for methods that look into the network."""
        return self._outputs_of(params)

    def _middle(self, tangent: Tensor, batched: bool) -> Tensor:
        if not self._output_gradient.requires_grad:
            return torch.zeros_like(tangent)
        (curved,) = torch.autograd.grad(
            self._output_gradient, self._z, tangent, retain_graph=True, is_grads_batched=batched
        )
        return curved


class EmpiricalFisher(_PulledBack):
    """(1/B) Σ_i ∇ℓ_i ∇ℓ_iᵀ over the examples of a batch; rank at most B.

    It is not the Fisher, nor an approximation of the Hessian away from a good fit
    (Kunstner, Balles & Hennig, 2019).

    Args:
        example_losses: `example_losses(params) -> (B,)`.
        params: where the gradients are taken.
    """

    def __init__(self, example_losses: Callable[[Parameters], Tensor], params: Parameters) -> None:
        super().__init__(example_losses, params)
        if self._outputs.ndim != 1:
            raise ValueError(
                f"example_losses must give one loss an example, (B,); "
                f"got shape {tuple(self._outputs.shape)}"
            )

    def factor(self) -> tuple[Tensor, float]:
        """Fᵀ = the gradients of the examples over √B, (P, B): B vectors pulled back."""
        count = len(self._outputs)
        basis = torch.eye(count, dtype=self.dtype, device=self.device)
        return self._pulled_rows(basis).T / count**0.5, 0.0

    def _middle(self, tangent: Tensor, batched: bool) -> Tensor:
        return tangent / len(self._outputs)


def _rows(pieces: Sequence[Tensor], leaves: Sequence[Tensor], count: int) -> Tensor:
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
