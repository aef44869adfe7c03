"""Curvature matrices as operators that are only ever multiplied, never stored.

Every operator is symmetric and acts on flat vectors (P,) or blocks (P, k).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_DENSE_SPECTRUM = 2048


class LinearOperator(ABC):
    """A symmetric (P, P) matrix C known by its products.

    Attributes:
        shape: (P, P).
        dtype: of the vectors that it takes and gives.
        device: where these lie.
        products: number of vectors multiplied so far; a block (P, k) counts k.
        positive_semidefinite: whether the construction rules out negative curvature.
        smallest_eigenvalue: a known lower bound on the spectrum, which error bounds rest on:
            0 where positive semi-definite, None where nothing is known. May be set, for example
            to what `lower_bound` of `weighmatch.implicit.spectrum` gives.

    Raises:
        ValueError: if `dtype` is not a real floating-point type.
    """

    positive_semidefinite = False

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"an operator must be real and floating-point, got {dtype}")
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device
        self.products = 0
        self._smallest_eigenvalue: float | None = None

    @property
    def smallest_eigenvalue(self) -> float | None:
        """A known lower bound on the spectrum; may be set."""
        if self._smallest_eigenvalue is None and self.positive_semidefinite:
            return 0.0
        return self._smallest_eigenvalue

    @smallest_eigenvalue.setter
    def smallest_eigenvalue(self, value: float | None) -> None:
        self._smallest_eigenvalue = value

    def expect(self, products: int) -> None:  # noqa: B027
        """Told by a solver how many single products may follow, before the first.

        An operator that knows a way to multiply that pays only for many prepares it here.
        """

    def restricted(self, vector: Tensor) -> "Restriction | None":
        """This operator on a smaller space that holds `vector`, (P,), and that C maps to itself.

        None where none is known.
        """
        return None

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

    def factor(self) -> tuple[Tensor, float]:
        """F, (P, n), with C ≈ F Fᵀ, and the smallest eigenvalue of what F leaves out (≤ 0).

        From the dense matrix: P products, O(P²) memory. Operators that are sums of n outer
        products know better.
        """
        matrix = self.dense()
        if not bool(torch.isfinite(matrix).all()):
            return torch.full_like(matrix, torch.nan), 0.0
        eigenvalues, vectors = torch.linalg.eigh(matrix.double())
        # A root would turn what is rounding in an eigenvalue into something that looks real.
        precision = max(torch.finfo(self.dtype).eps, len(matrix) * 2.3e-16)
        kept = eigenvalues > precision * eigenvalues.abs().max()
        factor = vectors[:, kept] * eigenvalues[kept].sqrt()
        return factor, min(0.0, float(eigenvalues[0]))

    def dense(self, block_size: int = 128) -> Tensor:
        """The matrix itself, (P, P), from P products in blocks; symmetrised."""
        size = self.shape[0]
        identity = torch.eye(size, dtype=self.dtype, device=self.device)
        matrix = torch.cat([self @ block for block in identity.split(block_size, dim=1)], dim=1)
        return (matrix + matrix.T) / 2


@dataclass(frozen=True)
class Restriction:
    """An operator on a space that it maps to itself.

    Attributes:
        operator: in an orthonormal basis of the space, (R, R); counts for the whole one too.
        vector: the coordinates of the vector that the space was made for, (R,).
        lift: from coordinates, (R,), to vectors, (P,).
    """

    operator: LinearOperator
    vector: Tensor
    lift: Callable[[Tensor], Tensor]


class Summed(LinearOperator):
    """The sum of operators of which each of several processes has one.

    Each product is added up over the processes. All of them have to multiply the same vectors in
    the same order, which a solver does that gets the same sums. A dot product of such vectors is
    the same in all processes and must not be added up.

    Args:
        op: the operator of this process.
        add: adds up a vector (P,) over all processes, to the same bits in each of them.
    """

    def __init__(self, op: LinearOperator, add: Callable[[Tensor], Tensor]) -> None:
        super().__init__(op.shape[0], op.dtype, op.device)
        self.positive_semidefinite = op.positive_semidefinite
        self._op, self._add = op, add

    def expect(self, products: int) -> None:
        self._op.expect(products)

    def _product(self, vector: Tensor) -> Tensor:
        return self._add(self._op @ vector)


class Dense(LinearOperator):
    """A given symmetric matrix (P, P): for tests, teaching and small problems.

    Raises:
        ValueError: if `matrix` is not square, real, floating-point, finite and symmetric to
            rounding.
    """

    def __init__(self, matrix: Tensor, *, positive_semidefinite: bool = False) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"Dense needs a square matrix, got shape {tuple(matrix.shape)}")
        if not matrix.is_floating_point():
            raise ValueError(f"Dense needs a real floating-point matrix, got {matrix.dtype}")
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("Dense needs finite entries: matrix holds NaN or Inf")
        tolerance = 1e3 * torch.finfo(matrix.dtype).eps * float(matrix.abs().max())
        if not bool((matrix - matrix.T).abs().max() <= tolerance):
            raise ValueError("Dense needs a symmetric matrix: give (A + A.T) / 2")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix
        self.positive_semidefinite = positive_semidefinite

    @property
    def smallest_eigenvalue(self) -> float | None:
        """Computed where the matrix is small enough, less what rounding may hide."""
        size = self.shape[0]
        if self._smallest_eigenvalue is None and size <= LARGEST_DENSE_SPECTRUM:
            if not bool(torch.isfinite(self.matrix).all()):
                return None
            eigenvalues = torch.linalg.eigvalsh(self.matrix.double())
            rounding = size * torch.finfo(torch.float64).eps * float(eigenvalues.abs().max())
            smallest = float(eigenvalues[0]) - rounding
            self._smallest_eigenvalue = (
                max(smallest, 0.0) if self.positive_semidefinite else smallest
            )
        return super().smallest_eigenvalue

    @smallest_eigenvalue.setter
    def smallest_eigenvalue(self, value: float | None) -> None:
        self._smallest_eigenvalue = value

    def _product(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def _block_product(self, block: Tensor) -> Tensor:
        return self.matrix @ block
