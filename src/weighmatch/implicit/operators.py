"""Curvature matrices as operators that are only ever multiplied, never stored.

Every operator is symmetric and acts on flat vectors (P,) or blocks (P, k).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from weighmatch.implicit.flat import Parameters, unflatten


class LinearOperator(ABC):
    """A symmetric (P, P) matrix C known by its products.

    Attributes:
        shape: (P, P).
        dtype: of the vectors that it takes and gives.
        device: where these lie.
        products: number of vectors multiplied so far; a block (P, k) counts k.
        positive_semidefinite: whether the construction rules out negative curvature.
    """

    positive_semidefinite = False

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device
        self.products = 0

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Multiply a vector (P,) or the columns of a block (P, k).

        Raises:
            ValueError: if the first dimension is not P or there are more than two.
        """
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.shape[0]:
            raise ValueError(
                f"{type(self).__name__} of shape {self.shape} cannot multiply a tensor of "
                f"shape {tuple(vectors.shape)}; give ({self.shape[0]},) or ({self.shape[0]}, k)"
            )
        if vectors.ndim == 1:
            self.products += 1
            return self._product(vectors)
        self.products += vectors.shape[1]
        return self._block_product(vectors)

    @abstractmethod
    def _product(self, vector: Tensor) -> Tensor:
        """C v for one vector (P,)."""

    def _block_product(self, block: Tensor) -> Tensor:
        columns = [self._product(column) for column in block.unbind(1)]
        return torch.stack(columns, dim=1) if columns else block.clone()

    def dense(self, block_size: int = 128) -> Tensor:
        """The matrix itself, (P, P), from P products in blocks; symmetrised."""
        size = self.shape[0]
        identity = torch.eye(size, dtype=self.dtype, device=self.device)
        matrix = torch.cat([self @ block for block in identity.split(block_size, dim=1)], dim=1)
        return (matrix + matrix.T) / 2


class Dense(LinearOperator):
    """A given symmetric matrix (P, P): for tests, teaching and small problems.

    Raises:
        ValueError: if `matrix` is not square or not symmetric to rounding.
    """

    def __init__(self, matrix: Tensor, *, positive_semidefinite: bool = False) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"Dense needs a square matrix, got shape {tuple(matrix.shape)}")
        tolerance = 1e3 * torch.finfo(matrix.dtype).eps * float(matrix.abs().max())
        if not bool((matrix - matrix.T).abs().max() <= tolerance):
            raise ValueError("Dense needs a symmetric matrix: give (A + A.T) / 2")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix
        self.positive_semidefinite = positive_semidefinite

    def _product(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def _block_product(self, block: Tensor) -> Tensor:
        return self.matrix @ block


class _ParameterOperator(LinearOperator):
    """An operator on the parameters of a network."""

    def __init__(self, params: Parameters) -> None:
        self.params = {k: p.detach().requires_grad_() for k, p in params.items()}
        first = next(iter(self.params.values()))
        size = sum(p.numel() for p in self.params.values())
        super().__init__(size, first.dtype, first.device)

    def _split(self, vector: Tensor) -> list[Tensor]:
        return list(unflatten(vector, self.params).values())


class Hessian(_ParameterOperator):
    """∇²L(θ) of `loss(params) -> scalar` (Pearlmutter, 1994).

    The gradient's graph is built once and kept, so that a product is one backward pass
    through it. It holds the activations for as long as the operator lives.
    """

    def __init__(self, loss: Callable[[Parameters], Tensor], params: Parameters) -> None:
        super().__init__(params)
        self._leaves = list(self.params.values())
        gradient = torch.autograd.grad(
            loss(self.params), self._leaves, create_graph=True, materialize_grads=True
        )
        # A loss that is linear in a parameter has a gradient without a graph there.
        kept = [(i, g) for i, g in enumerate(gradient) if g.requires_grad]
        self._kept = [i for i, _ in kept]
        self._gradient = [g for _, g in kept]

    def _product(self, vector: Tensor) -> Tensor:
        if not self._gradient:
            return torch.zeros_like(vector)
        pieces = self._split(vector)
        product = torch.autograd.grad(
            self._gradient,
            self._leaves,
            [pieces[i] for i in self._kept],
            retain_graph=True,
            materialize_grads=True,
        )
        return torch.cat([piece.reshape(-1) for piece in product])


class GaussNewton(_ParameterOperator):
    """Jᵀ H_z J, with J the Jacobian of the outputs z(θ) and H_z the Hessian of the loss in z.

    Positive semi-definite where `output_loss` is convex in the outputs, as cross-entropy is
    (Schraudolph, 2002; Martens, 2020). A product is J v by one backward pass
    through the graph of Jᵀu, one product with the small H_z, and one backward pass through the
    network; both graphs are kept.

    Args:
        outputs: `outputs(params) -> (B, C)`, for example logits.
        output_loss: `output_loss(outputs) -> scalar`, convex.
        params: where J is taken.
    """

    positive_semidefinite = True

    def __init__(
        self,
        outputs: Callable[[Parameters], Tensor],
        output_loss: Callable[[Tensor], Tensor],
        params: Parameters,
    ) -> None:
        super().__init__(params)
        self._outputs_of = outputs
        self._leaves = list(self.params.values())
        self._outputs = outputs(self.params)
        self._z = self._outputs.detach().requires_grad_()
        (self._output_gradient,) = torch.autograd.grad(
            output_loss(self._z), self._z, create_graph=True
        )
        # Jᵀu is linear in a dummy u; differentiating it in u gives J v by one backward pass.
        self._dummy = torch.zeros_like(self._outputs, requires_grad=True)
        self._pullback = torch.autograd.grad(
            self._outputs, self._leaves, self._dummy, create_graph=True, materialize_grads=True
        )

    def _product(self, vector: Tensor) -> Tensor:
        kept = [
            (g, v)
            for g, v in zip(self._pullback, self._split(vector), strict=True)
            if g.requires_grad
        ]
        (tangent,) = torch.autograd.grad(
            [g for g, _ in kept], self._dummy, [v for _, v in kept], retain_graph=True
        )
        (curved,) = torch.autograd.grad(self._output_gradient, self._z, tangent, retain_graph=True)
        pulled = torch.autograd.grad(
            self._outputs, self._leaves, curved, retain_graph=True, materialize_grads=True
        )
        return torch.cat([p.reshape(-1) for p in pulled])
