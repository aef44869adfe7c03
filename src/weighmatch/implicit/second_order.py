"""Convolution and group norm with gradients that are cheap to differentiate once more.

A product with the Hessian is the derivative of the gradient, J v that of Jᵀu in u. torch's own
second derivatives are general: that of a convolution takes a convolution with a kernel as large
as the image for the weight, that of group norm is put together from some forty elementwise
operations, and for J v both also compute what nobody asked for. What is left here is, for a
convolution, two convolutions and one backward pass of it; for group norm, a closed form.
`python -m benchmarks.ihvp_peers` measures both against torch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
GROUP_NORM = ("input", "num_groups", "weight", "bias", "eps")


class ThirdDerivativeError(RuntimeError):
    """A graph of `CheapSecondOrder` was to be differentiated a third time."""


class CheapSecondOrder(TorchFunctionMode):
    """Inside of it, `conv2d` and `group_norm` build graphs that may be differentiated twice.

    A third derivative, as of a loss that is itself made of gradients, raises
    `ThirdDerivativeError`.

    Args:
        cotangent_only: the second derivative is in the cotangent alone, as J v needs it. A graph
            that is made so must not be differentiated twice in anything else: the answer would
            lack terms.
    """

    def __init__(self, *, cotangent_only: bool = False) -> None:
        super().__init__()
        self._cotangent_only = cotangent_only

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = None
        if func is F.conv2d:
            result = self._convolution(**dict(zip(CONV2D, args, strict=False)), **kwargs)
        elif func is F.group_norm:
            result = self._group_norm(**dict(zip(GROUP_NORM, args, strict=False)), **kwargs)
        return func(*args, **kwargs) if result is None else result

    def _convolution(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """None where torch's own is needed."""
        if input.ndim != 4 or input.dtype != weight.dtype or isinstance(padding, str):
            return None
        settings = (_pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups)
        y: Tensor = _Convolution.apply(input, weight, settings, self._cotangent_only)
        return y if bias is None else y + bias.view(-1, 1, 1)

    def _group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor | None:
        """None where torch's own is needed."""
        if weight is None or bias is None or input.dtype != weight.dtype:
            return None
        if input.dtype not in (torch.float32, torch.float64):
            return None
        settings = (num_groups, eps)
        y: Tensor = _GroupNorm.apply(input, weight, bias, settings, self._cotangent_only)
        return y


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _no_third_derivative() -> None:
    if torch.is_grad_enabled():
        raise ThirdDerivativeError("only two derivatives of a graph of CheapSecondOrder")


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, settings: Any, cotangent_only: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.cotangent_only = settings, cotangent_only
        y: Tensor = aten.convolution(x, weight, None, *settings)
        return y

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if ctx.cotangent_only:
            x, weight = x.detach(), weight.detach()
        return *_ConvolutionPullback.apply(u, x, weight, ctx.settings, needed), None, None


class _ConvolutionPullback(Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor, weight: Tensor, settings: Any, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(u, x, weight)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        gradients = aten.convolution_backward(u, x, weight, None, *settings, [*needed, False])
        return gradients[0], gradients[1]

    @staticmethod
    def backward(ctx: Any, to_x: Tensor | None, to_weight: Tensor | None) -> tuple[Any, ...]:
        """⟨to_x, wᵀ∗u⟩ + ⟨to_weight, x∗u⟩ is ⟨u, to_x∗w + x∗to_weight⟩."""
        _no_third_derivative()
        u, x, weight = ctx.saved_tensors
        in_u, in_x, in_weight = ctx.needs_input_grad[:3]
        pushed = None
        if in_u and to_x is not None:
            pushed = aten.convolution(to_x, weight, None, *ctx.settings)
        if in_u and to_weight is not None:
            more = aten.convolution(x, to_weight, None, *ctx.settings)
            pushed = more if pushed is None else pushed.add_(more)
        needed = [in_x and to_weight is not None, in_weight and to_x is not None, False]
        crossed = (None, None)
        if any(needed):
            # The derivative in x pulls u back through to_weight, that in the weight through to_x.
            crossed = aten.convolution_backward(
                u,
                x if to_x is None else to_x,
                weight if to_weight is None else to_weight,
                None,
                *ctx.settings,
                needed,
            )
        return pushed, crossed[0], crossed[1], None, None


class _GroupNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, settings: Any, cotangent_only: bool
    ) -> Tensor:
        groups, eps = settings
        n, channels = x.shape[:2]
        y, mean, scale = aten.native_group_norm(
            x.contiguous(), weight, bias, n, channels, x[0, 0].numel(), groups, eps
        )
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.groups, ctx.cotangent_only = groups, cotangent_only
        normed: Tensor = y
        return normed

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        if ctx.cotangent_only:
            x, weight = x.detach(), weight.detach()
        needed = ctx.needs_input_grad[:3]
        pulled = _GroupNormPullback.apply(u, x, weight, mean, scale, ctx.groups, needed)
        return *pulled, None, None


class _GroupNormPullback(Function):
    """y = γ x̂ + β with x̂ = s (x − μ): u ↦ (s Π(γu), Σ u x̂, Σ u).

    Π takes off the mean and the part along x̂ within each group; it is symmetric.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        scale: Tensor,
        groups: int,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(u, x, weight, mean, scale)
        ctx.groups, ctx.constants = groups, None
        ctx.set_materialize_grads(False)
        n, channels = x.shape[:2]
        pulled = aten.native_group_norm_backward(
            u.contiguous(),
            x.contiguous(),
            mean,
            scale,
            weight,
            n,
            channels,
            x[0, 0].numel(),
            groups,
            list(needed),
        )
        return tuple(t if want else None for t, want in zip(pulled, needed, strict=True))

    @staticmethod
    def backward(
        ctx: Any, to_x: Tensor | None, to_weight: Tensor | None, to_bias: Tensor | None
    ) -> tuple[Any, ...]:
        """Of ⟨to_x, s Π(γu)⟩ + ⟨to_weight, Σ u x̂⟩ + ⟨to_bias, Σ u⟩.

        In u and in x that is a sum of u, to_x, x̂ and 1, with factors an image and channel.
        The first term, with U = γu and g = to_x, is size · s (mean(gU) − mean(g) mean(U) −
        mean(g x̂) mean(U x̂)); ∂s/∂x = −s² x̂ / size, and ∂mean(U x̂)/∂x = s ΠU / size.
        """
        _no_third_derivative()
        u, x, weight, mean, scale = ctx.saved_tensors
        in_u, in_x, in_weight = ctx.needs_input_grad[:3]
        n, channels = x.shape[:2]
        # Everything an image and channel is (n, groups, channels of a group, 1).
        shape = (n, ctx.groups, channels // ctx.groups, -1)
        s = scale.view(n, ctx.groups, 1, 1)
        size: int = x[0].numel() // ctx.groups
        weight = weight.view(1, *shape[1:])
        u = u.reshape(shape)
        if ctx.constants is None:  # the same for every product
            normal = x.reshape(shape).sub(mean.view_as(s)).mul_(s)
            ctx.constants = normal, _sum(u), _dot(u, normal)
        normal, u_sum, u_along = ctx.constants

        def mean_of(sums: Tensor) -> Tensor:
            return sums.sum(dim=2, keepdim=True) / size

        of_normal = of_one = u.new_zeros(n, *weight.shape[1:])
        from_u = from_x = from_weight = None
        x_of_u, x_of_normal, x_of_one = of_one, of_one, of_one
        if to_weight is not None:
            pull = to_weight.view_as(weight)
            of_normal = of_normal + pull
            x_of_u = s * pull + of_one
            x_of_normal = -s * mean_of(pull * u_along) + of_one
            x_of_one = -s * mean_of(pull * u_sum) + of_one
        if to_bias is not None:
            of_one = of_one + to_bias.view_as(weight)
        g = None if to_x is None else to_x.reshape(shape)
        if g is not None:
            g_sum, g_along, across = _sum(g), _dot(g, normal), None
            c, d = mean_of(g_sum), mean_of(g_along)
            of_normal = of_normal - weight * s * d
            of_one = of_one - weight * s * c
            if in_x or in_weight:
                across = _dot(u, g)
            if in_weight:
                projected = s * (across - c * u_sum - d * u_along)
                from_weight = projected.sum(dim=0).reshape(-1)
            if in_x:
                a, b = mean_of(weight * u_sum), mean_of(weight * u_along)
                e = mean_of(weight * across)
                x_of_u = x_of_u - s.square() * d * weight
                x_of_normal = x_of_normal - s.square() * (e - a * c - 3 * b * d)
                x_of_one = x_of_one + s.square() * (a * d + b * c)
        if in_u:
            from_u = torch.addcmul(of_one, normal, of_normal) if g is None else g * (weight * s)
            if g is not None:
                from_u = from_u.addcmul_(normal, of_normal).add_(of_one)
            from_u = from_u.view_as(x)
        if in_x:
            from_x = (u * x_of_u).addcmul_(normal, x_of_normal).add_(x_of_one)
            if g is not None:
                from_x = from_x.addcmul_(g, -s.square() * b)
            from_x = from_x.view_as(x)
        return from_u, from_x, from_weight, None, None, None, None


def _sum(t: Tensor) -> Tensor:
    return t.sum(dim=3, keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(3)  # type: ignore[no-any-return]
