"""Curvature from the Jacobian of a network's outputs: Gauss-Newton and the empirical Fisher."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weighmatch.implicit.curvature import BLOCK, ParameterOperator, rows_of
from weighmatch.implicit.evaluation import differentiable, require_scalar
from weighmatch.implicit.flat import Parameters


class _PulledBack(ParameterOperator):
    """Jᵀ M J, with J the Jacobian of `outputs(params)` and M a small matrix on the outputs.

    J v is one backward pass through the graph of Jᵀu, which is linear in u; Jᵀw is one through
    the network. Both graphs are kept.
    """

    positive_semidefinite = True
    _name = "outputs"

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
                rows_of(
                    self._points.out_of(self._pull(chunk, batched=True)), self._leaves, len(chunk)
                )
                for chunk in cotangents.split(BLOCK)
            ]
        else:
            rows = [
                rows_of(self._points.out_of(self._pull(row, batched=False)), self._leaves, 1)
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
    (Schraudolph, 2002; Martens, 2020). Where it is not, as with negative weights on examples,
    `positive_semidefinite` says so, and no error bound is issued.

    Args:
        outputs: `outputs(params) -> (B, C)`, for example logits, or any other shape.
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
        with differentiable():
            value = output_loss(self._z)
            require_scalar(value, "output_loss")
            if not value.requires_grad:
                raise ValueError("output_loss does not depend on the outputs it is given")
            (self._output_gradient,) = torch.autograd.grad(value, self._z, create_graph=True)
        self._convex: bool | None = None
        self._blocks: Tensor | None = None

    @property
    def positive_semidefinite(self) -> bool:  # type: ignore[override]
        """Whether no block of H_z was seen to have negative curvature."""
        if self._convex is None:
            self._convex = self._looks_convex()
        return self._convex

    def _looks_convex(self) -> bool:
        """⟨u_i, (H_z u)_i⟩ ≥ 0 for every example i and some random u.

        That is certain to find negative weights on examples of a convex loss.
        """
        generator = torch.Generator().manual_seed(0)
        rows = self._z.reshape(len(self._z), -1) if self._z.ndim > 1 else self._z.reshape(-1, 1)
        for _ in range(2):
            probe = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
            probe = probe.to(self.device, self.dtype)
            image = self._middle(probe.view_as(self._z), batched=False).reshape(rows.shape)
            rounding = 1e2 * torch.finfo(self.dtype).eps * image.norm() * probe.norm()
            if bool(((probe * image).sum(dim=1) < -rounding / len(rows)).any()):
                return False
        return True

    def output_curvature(self) -> Tensor:
        """The blocks (n, c, c) of H_z, one an example.

        Outputs (B,) are B examples of one output each. Of (B, …, C) every position is an example
        where the loss is a sum over positions; else the whole of (…, C) belongs to one example.

        Raises:
            ValueError: if H_z has others, as it has where the loss is not a sum over examples.
        """
        if self._blocks is None:
            shapes = [(self._z.numel() // self._z.shape[-1], self._z.shape[-1])]
            if self._z.ndim < 2:
                shapes = [(self._z.numel(), 1)]
            elif self._z.ndim > 2:
                shapes.append((len(self._z), self._z[0].numel()))
            found = (self._blocks_of(*shape) for shape in shapes)
            self._blocks = next((blocks for blocks in found if blocks is not None), None)
        if self._blocks is None:
            raise ValueError(
                "output_loss is not a sum over examples (its Hessian in the outputs couples "
                "them), so that there is no block an example; use a method that only multiplies"
            )
        return self._blocks

    def _blocks_of(self, count: int, classes: int) -> Tensor | None:
        """Those of outputs reshaped to (count, classes); None where H_z has others."""
        columns = []
        for c in range(classes):
            probe = torch.zeros(count, classes, dtype=self.dtype, device=self.device)
            probe[:, c] = 1
            columns.append(self._curved_rows(probe))
        blocks = torch.stack(columns, dim=2)
        # Any vector that differs from example to example shows what the blocks leave out.
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(count, classes, generator=generator, dtype=self.dtype).to(self.device)
        image = self._curved_rows(probe)
        difference = float((torch.einsum("bij,bj->bi", blocks, probe) - image).norm())
        # Probabilities near 1 leave rounding that is large beside their own curvature.
        tolerance = torch.finfo(self.dtype).eps * (1e3 * float(blocks.norm()) + 10)
        # Where the curvature is not finite, no shape of the blocks is: the first one says so.
        return None if difference > tolerance else blocks

    def _curved_rows(self, rows: Tensor) -> Tensor:
        return self._middle(rows.view_as(self._z), batched=False).reshape(rows.shape)

    def factor(self) -> tuple[Tensor, float]:
        """Jᵀ H_z^½, (P, BC): B·C vectors pulled back, where that is less than P.

        For a loss that is a sum over examples, so that H_z has a block an example.
        """
        if self._z.numel() >= self.shape[0] or not self.positive_semidefinite:
            return super().factor()
        blocks = self.output_curvature()
        count, classes = blocks.shape[:2]
        if not bool(torch.isfinite(blocks).all()):
            return torch.full((self.shape[0], 1), torch.nan, dtype=self.dtype), 0.0
        eigenvalues, vectors = torch.linalg.eigh(blocks.double())
        roots = (vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(1)).to(self.dtype)
        rows = []
        # Column c of every example's root at once would mix the examples: one at a time.
        for example in range(count):
            cotangents = torch.zeros(classes, count, classes, dtype=self.dtype, device=self.device)
            cotangents[:, example] = roots[example].T
            rows.append(self._pulled_rows(cotangents.reshape(classes, *self._z.shape)))
        return torch.cat(rows).T, 0.0

    def network_outputs(self, params: Parameters) -> Tensor:
        """z(θ), (n, c) as the blocks are, for methods that look into the network."""
        return self._outputs_of(params).reshape(self.output_curvature().shape[:2])

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

    _name = "example_losses"

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
