"""Convolutions whose backward pass is differentiated in its cotangent alone.

J v is found by differentiating Jᵀu in u. torch's double backward of a convolution then also
computes the derivatives in the input and the weight, which nobody asked for: two convolutions
more, one of them with a kernel as large as the image. On a WRN-10-1 they were half of the time
of J v (0.7 instead of 1.5 gradients).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class LinearPullback(TorchFunctionMode):
    """Inside of it, `conv2d` builds a graph whose gradient is differentiable in the cotangent.

    A graph that is made so must not be differentiated twice in anything else: the answer would
    lack terms.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            x, weight, bias = call["input"], call["weight"], call.get("bias")
            padding = call.get("padding", 0)
            if x.ndim == 4 and not isinstance(padding, str):
                settings = (
                    _pair(call.get("stride", 1)),
                    _pair(padding),
                    _pair(call.get("dilation", 1)),
                    False,
                    [0, 0],
                    call.get("groups", 1),
                )
                y = _Convolution.apply(x, weight, settings)
                return y if bias is None else y + bias.view(-1, 1, 1)
        return func(*args, **kwargs)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, settings: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        y: Tensor = aten.convolution(x, weight, None, *settings)
        return y

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        return *_Pullback.apply(u, x.detach(), weight.detach(), ctx.settings, needed), None


class _Pullback(Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor, weight: Tensor, settings: Any, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        gradients = aten.convolution_backward(u, x, weight, None, *settings, [*needed, False])
        return gradients[0], gradients[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_x: Tensor | None, to_weight: Tensor | None) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        total = None
        if to_x is not None:
            total = aten.convolution(to_x, weight, None, *ctx.settings)
        if to_weight is not None:
            pushed = aten.convolution(x, to_weight, None, *ctx.settings)
            total = pushed if total is None else total.add_(pushed)
        return total, None, None, None, None
