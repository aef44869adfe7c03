"""The contract of a bilevel problem: what an implicit meta-learning (IML) run needs to know of it.

    min over φ of outer(θ*(φ)),   θ*(φ) = argmin over θ of
    inner(θ, φ) = data_loss(logits(θ, φ), φ) + ½ Σ_p decay_p(φ) θ_p²

A new problem is one module of this package with one subclass of `BilevelProblem`: the studies, the
configuration and the tests find it by its `name`.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from weighmatch.implicit import EmpiricalFisher, GaussNewton, Hessian, Parameters, flatten
from weighmatch.studies.closed_curvature import closed_matrix
from weighmatch.studies.digits import CLASSES, Digits, Size, require_images, scaled


class BilevelProblem(ABC):
    """A bilevel problem on digits.

    Args:
        digits: the images.
        size: network and regularisation.
        seed: seed of the initial parameters.

    Attributes:
        name: what parameters and tables call the problem.
        noisy: whether inner labels are wrong by `Size.label_noise`.
        outer_rate: learning rate of Adam on φ that suits it.
        initial: θ at the start of a training.
    """

    name: ClassVar[str]
    noisy: ClassVar[bool] = False
    outer_rate: ClassVar[float] = 0.1
    registry: ClassVar[dict[str, type["BilevelProblem"]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        BilevelProblem.registry[cls.name] = cls

    def __init__(self, digits: Digits, size: Size, seed: int) -> None:
        self.digits = digits
        self.size = size
        self.network = _network(size, seed).to(digits.inner.dtype)
        self.initial: Parameters = {
            name: p.detach().clone() for name, p in self.network.named_parameters()
        }
        names = list(self.initial)
        self._layers = list(zip(names[::2], names[1::2], strict=True))

    @property
    def examples(self) -> int:
        """Number of examples that mini-batches of the inner problem are drawn from."""
        return len(self.digits.inner_labels)

    @classmethod
    def draw(
        cls, images: NDArray[np.uint8], labels: NDArray[np.int64], size: Size, seed: int
    ) -> Digits:
        """Inner, outer and test images for one seed, and which inner labels are wrong.

        Args:
            images: (N, 1, 8, 8).
            labels: 0 to 9, (N,).
            size: how many images.
            seed: seed of everything drawn.

        Raises:
            ValueError: if there are not enough images.
        """
        rng = np.random.default_rng([seed, 6021])
        order = rng.permutation(len(images))
        needed = size.inner + size.outer + size.test
        require_images(cls.name, size, needed, len(order))
        inner, outer, test = np.split(order[:needed], [size.inner, size.inner + size.outer])
        wrong = torch.zeros(size.inner, dtype=torch.bool)
        if cls.noisy:
            picked = rng.permutation(size.inner)[: round(size.label_noise * size.inner)]
            wrong[torch.from_numpy(picked)] = True
        digits = scaled(images, labels, inner, wrong, outer, test)
        shift = torch.from_numpy(rng.integers(1, CLASSES, size.inner))
        given = torch.where(wrong, (digits.inner_labels + shift) % CLASSES, digits.inner_labels)
        return replace(digits, inner_labels=given)

    @abstractmethod
    def hyperparameters(self) -> Parameters:
        """φ at the start, names to tensors."""

    @abstractmethod
    def example_losses(
        self, logits: Tensor, hyper: Parameters, rows: Tensor | None = None
    ) -> Tensor:
        """Losses of the examples in `rows` (None: all), (B,); their mean is `data_loss`."""

    def inputs(self, hyper: Parameters, rows: Tensor | None = None) -> Tensor:
        """What the network is given, (B, 64)."""
        return self.digits.inner if rows is None else self.digits.inner[rows]

    def decay(self, hyper: Parameters) -> Parameters:
        """Coefficients of L2, shaped as θ or broadcast to it."""
        return {name: p.new_tensor(self.size.l2) for name, p in self.initial.items()}

    def forward(self, params: Parameters, inputs: Tensor) -> Tensor:
        """Logits, (B, 10)."""
        if self.size.normalised:
            z: Tensor = functional_call(self.network, params, (inputs,))
            return z
        # Spelled out: `functional_call` takes longer than the arithmetic of so small a network.
        *hidden, last = self._layers
        for weight, bias in hidden:
            inputs = torch.tanh(F.linear(inputs, params[weight], params[bias]))
        return F.linear(inputs, params[last[0]], params[last[1]])

    def logits(self, params: Parameters, hyper: Parameters, rows: Tensor | None = None) -> Tensor:
        return self.forward(params, self.inputs(hyper, rows))

    def data_loss(
        self, params: Parameters, hyper: Parameters, rows: Tensor | None = None
    ) -> Tensor:
        """The inner loss without L2."""
        return self.example_losses(self.logits(params, hyper, rows), hyper, rows).mean()

    def inner(self, params: Parameters, hyper: Parameters, rows: Tensor | None = None) -> Tensor:
        decay = self.decay(hyper)
        penalty = torch.stack([(decay[name] * p.square()).sum() for name, p in params.items()])
        return self.data_loss(params, hyper, rows) + penalty.sum() / 2

    def inner_gradient(
        self, params: Parameters, hyper: Parameters, rows: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The inner loss and its gradient in each parameter; L2's in closed form."""
        theta = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss = self.data_loss(theta, hyper, rows)
        slopes = torch.autograd.grad(loss, list(theta.values()))
        decay = self.decay(hyper)
        with torch.no_grad():
            pulls = [decay[name] * p for name, p in params.items()]
            penalty = sum((q * p).sum() for q, p in zip(pulls, params.values(), strict=True))
            whole = [s + q for s, q in zip(slopes, pulls, strict=True)]
        return loss.detach() + penalty / 2, whole

    def outer(self, params: Parameters) -> Tensor:
        return F.cross_entropy(self.forward(params, self.digits.outer), self.digits.outer_labels)

    def outer_accuracy(self, params: Parameters) -> float:
        return self._accuracy(params, self.digits.outer, self.digits.outer_labels)

    def test_accuracy(self, params: Parameters) -> float:
        return self._accuracy(params, self.digits.test, self.digits.test_labels)

    def _accuracy(self, params: Parameters, images: Tensor, labels: Tensor) -> float:
        with torch.no_grad():
            predicted = self.forward(params, images).argmax(1)
        return float((predicted == labels).double().mean())

    def hessian(self, params: Parameters, hyper: Parameters, rows: Tensor | None = None) -> Hessian:
        """The Hessian of the inner loss, L2 included."""
        return Hessian(lambda p: self.inner(p, hyper, rows), params)

    def gauss_newton(
        self, params: Parameters, hyper: Parameters, rows: Tensor | None = None
    ) -> GaussNewton:
        """The Gauss-Newton matrix of the inner loss.

        L2 is a squared output √d_p θ_p of its own, so that it is exact.
        """
        roots = self._root_decay(hyper)
        count = len(self.inputs(hyper, rows))

        def outputs(p: Parameters) -> Tensor:
            z = self.logits(p, hyper, rows)
            return torch.cat([z.reshape(-1), roots * flatten(p)])

        def output_loss(both: Tensor) -> Tensor:
            z = both[: count * CLASSES].view(count, CLASSES)
            squares = both[count * CLASSES :].square().sum()
            return self.example_losses(z, hyper, rows).mean() + squares / 2

        return GaussNewton(outputs, output_loss, params)

    def matrix(
        self,
        params: Parameters,
        hyper: Parameters,
        rows: Tensor | None = None,
        curvature: Literal["hessian", "gauss_newton"] = "hessian",
    ) -> Tensor:
        """`hessian` or `gauss_newton` themselves, (P, P), L2 included, in the dtype of θ.

        In closed form where nothing is normalised.
        """
        if self.size.normalised:
            known = self.hessian if curvature == "hessian" else self.gauss_newton
            return known(params, hyper, rows).dense()

        def loss(logits: Tensor) -> Tensor:
            return self.example_losses(logits, hyper, rows).mean()

        inputs = self.inputs(hyper, rows).detach()
        whole = closed_matrix(self._layers, params, inputs, loss, curvature == "hessian")
        return whole + torch.diag(self._root_decay(hyper).square())

    def layers(
        self, params: Parameters, hyper: Parameters, rows: Tensor | None = None
    ) -> GaussNewton:
        """The Gauss-Newton matrix of the data term, from logits (B, 10): K-FAC looks into it."""
        return GaussNewton(
            lambda p: self.logits(p, hyper, rows),
            lambda z: self.example_losses(z, hyper, rows).mean(),
            params,
        )

    def fisher(
        self, params: Parameters, hyper: Parameters, rows: Tensor | None = None
    ) -> EmpiricalFisher:
        """The empirical Fisher matrix of the data term."""
        return EmpiricalFisher(
            lambda p: self.example_losses(self.logits(p, hyper, rows), hyper, rows), params
        )

    def mean_decay(self, hyper: Parameters) -> float:
        """What methods that see the data term alone add to their damping."""
        return float(self._root_decay(hyper).square().mean())

    def _root_decay(self, hyper: Parameters) -> Tensor:
        decay = self.decay(hyper)
        whole = {name: decay[name].detach().expand_as(p) for name, p in self.initial.items()}
        return flatten(whole).sqrt()


def _network(size: Size, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not size.hidden:
            return nn.Sequential(nn.Linear(64, CLASSES))
        layers: list[nn.Module] = [nn.Linear(64, size.hidden), nn.Tanh()]
        if size.normalised:
            layers.insert(1, nn.BatchNorm1d(size.hidden))
        return nn.Sequential(*layers, nn.Linear(size.hidden, CLASSES))
