"""The linear and convolution layers behind the outputs of a `GaussNewton`, as modules with hooks.

One evaluation of the outputs is looked at. A weight is a layer if all of its uses are calls of
`linear` or of `conv2d` with the same settings. A bias belongs to that layer if all of the weight's
calls have it and no other weight's has; any other is added outside of the module. What is used in
a second way, as the transposed weight of a tied autoencoder is, is no layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from weighmatch.implicit.evaluation import differentiable, reaches
from weighmatch.implicit.flat import Parameters
from weighmatch.implicit.gauss_newton import GaussNewton
from weighmatch.implicit.second_order import CONV2D


@dataclass
class _Uses:
    """All calls on one weight.

    Attributes:
        name: of the weight.
        settings: stride, padding, dilation and groups of each kind of call.
        biases: the ids of the biases that calls had; None for a call without.
        rows: the size of the first dimension of the inputs, summed over the calls.
    """

    name: str
    settings: set[tuple[Any, ...]] = field(default_factory=set)
    biases: set[int | None] = field(default_factory=set)
    rows: int = 0


class _Layers(nn.Module):
    """The layers of `source`; calls give H_z^½ᵀ z / √2.

    Attributes:
        examples: n, the rows of the outputs.
        classes: c, the columns.
        positions: names of the parameters in layers, in the order of `layer_parameters`.
        root: H_z^½ / √2, (n, c, c).
        shares: of the name of a module, what its covariance of inputs is to be multiplied by.
            curvlinops divides by n for every call, whatever the first dimension of the inputs.
    """

    def __init__(self, source: GaussNewton) -> None:
        super().__init__()
        self._source = source
        blocks = source.output_curvature()
        self.examples, self.classes = blocks.shape[:2]
        eigenvalues, vectors = torch.linalg.eigh(
            blocks.to(torch.promote_types(blocks.dtype, torch.float32))
        )
        # The squared error's own Hessian is 2I.
        scale = (eigenvalues.clamp_min(0) / 2).sqrt().unsqueeze(1)
        self.root = (vectors * scale).to(blocks.dtype)
        recorder = _Recorder(source.params)
        with recorder, torch.no_grad(), differentiable(grad=False):
            source.network_outputs(source.params)
        self._choose(recorder)

    def _choose(self, recorder: "_Recorder") -> None:
        """Make modules; drop those whose parameters the outputs still depend on besides."""
        params = self._source.params
        names = {id(p): name for name, p in params.items()}
        outside: set[str] = set()
        while True:
            made: dict[int, nn.Module] = {}
            self.positions: list[str] = []
            self.layer_parameters: list[nn.Parameter] = []
            self.shares: dict[str, float] = {}
            for key, uses in recorder.uses.items():
                if uses.name in outside or len(uses.settings) > 1:
                    continue
                bias = self._own_bias(uses, recorder, names)
                bias = None if bias in outside else bias
                own = None if bias is None else params[bias]
                layer = _module(params[uses.name], own, *uses.settings)
                self.shares[f"layers.{len(made)}"] = self.examples / uses.rows
                made[key] = layer
                self.positions.append(uses.name)
                self.layer_parameters.append(layer.weight)
                if bias is not None:
                    self.positions.append(bias)
                    self.layer_parameters.append(layer.bias)
            self.layers = nn.ModuleList(made.values())
            self._by_weight = made
            with torch.enable_grad():
                outputs = self(None)
            leaves = [params[name] for name in self.positions]
            again = {
                name
                for name, there in zip(self.positions, reaches(outputs, leaves), strict=True)
                if there
            }
            if not again:
                return
            outside |= again

    @staticmethod
    def _own_bias(uses: _Uses, recorder: "_Recorder", names: dict[int, str]) -> str | None:
        """The name of the bias that all calls on a weight have, and no other weight's calls."""
        if len(uses.biases) != 1:
            return None
        (bias,) = uses.biases
        if bias is None or bias not in names:
            return None
        sharing = [other for other in recorder.uses.values() if bias in other.biases]
        return names[bias] if len(sharing) == 1 and bias not in recorder.foreign else None

    @property
    def data(self) -> Iterable[tuple[Tensor, Tensor]]:
        """One batch; the inputs are already in the closure of the operator."""
        placeholder = torch.zeros(self.examples, 1, dtype=self.root.dtype, device=self.root.device)
        return [(placeholder, torch.zeros_like(self.root[:, 0]))]

    def forward(self, _: Tensor | None) -> Tensor:
        """H_z^½ᵀ z / √2, (n, c), through the modules."""
        with _Redirect(self._by_weight), differentiable(grad=torch.is_grad_enabled()):
            outputs = self._source.network_outputs(self._source.params)
        return torch.einsum("bc,bcd->bd", outputs, self.root)


def _call_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(CONV2D, args, strict=False)), **kwargs}


def _module(weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Any:
    layer: Any
    if weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        stride, padding, dilation = settings
        layer = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            tuple(weight.shape[2:]),  # type: ignore[arg-type]
            stride=stride,
            padding=padding,
            dilation=dilation,
            bias=bias is not None,
        )
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | str) else tuple(value)


class _Recorder(TorchFunctionMode):
    """Notes every call of `linear` or `conv2d` on a parameter."""

    def __init__(self, params: Parameters) -> None:
        super().__init__()
        self._by_id = {id(p): name for name, p in params.items()}
        self.uses: dict[int, _Uses] = {}
        # Biases of calls that cannot be a layer.
        self.foreign: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.linear, F.conv2d):
            self._record(_call_arguments(args, kwargs))
        return func(*args, **kwargs)

    def _record(self, call: dict[str, Any]) -> None:
        weight, bias, inputs = call["weight"], call.get("bias"), call["input"]
        name = self._by_id.get(id(weight))
        batched = inputs.ndim >= 2 if weight.ndim == 2 else inputs.ndim == 4
        if name is None or not batched or call.get("groups", 1) != 1:
            self.foreign.add(id(bias))
            return
        uses = self.uses.setdefault(id(weight), _Uses(name))
        settings = (call.get("stride", 1), call.get("padding", 0), call.get("dilation", 1))
        uses.settings.add(tuple(_plain(s) for s in settings))
        uses.biases.add(None if bias is None else id(bias))
        uses.rows += len(inputs)


class _Redirect(TorchFunctionMode):
    """Sends calls on a known weight through its module, so that the module's hooks run."""

    def __init__(self, layers: dict[int, Any]) -> None:
        super().__init__()
        self._modules_of = layers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.linear, F.conv2d):
            call = _call_arguments(args, kwargs)
            layer = self._modules_of.get(id(call["weight"]))
            if layer is not None:
                # A mode is off inside of its own handler, so the module's call is not caught.
                outputs, bias = layer(call["input"]), call.get("bias")
                if bias is None or layer.bias is not None:
                    return outputs
                return outputs + (bias if func is F.linear else bias.view(-1, 1, 1))
        return func(*args, **kwargs)
