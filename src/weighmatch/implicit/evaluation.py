"""How a caller's function is evaluated, so that its derivatives are right or an error says why not.

Some of torch's layers have no second derivative, or a wrong one: they are replaced by others that
compute the same. Recomputation in the backward pass may see other parameters than the forward pass
did, and a function may not look at its parameters at all: both are found and refused.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# What an error says while hooks on saved tensors, such as checkpointing's, are shut off.
_HOOKS = "weighmatch evaluates this function without hooks on saved tensors first"
_REENTRANT = (
    "{name} uses torch.utils.checkpoint with use_reentrant=True, which loses the derivatives of "
    "what its function closes over; give use_reentrant=False"
)
Call = Callable[[Sequence[Tensor]], Tensor]


@contextlib.contextmanager
def differentiable(grad: bool = True) -> Iterator[None]:
    """Inside of it every layer that torch.nn has can be differentiated twice, and forward.

    Attention takes the backend of plain matrix products, fused weight norms and embeddings are
    written out. With `grad` there are graphs whatever the caller's mode, `torch.no_grad()` too.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
            sdpa_kernel(SDPBackend.MATH),
            _WrittenOut(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _WrittenOut(TorchFunctionMode):
    """Replaces functions of torch by others of the same value that differentiate twice."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """G v/‖v‖; the second derivative of torch 2.15's fused kernel is not symmetric."""
    if dim == -1:
        norm = torch.linalg.vector_norm(v)
    else:
        others = [d for d in range(v.ndim) if d != dim % v.ndim]
        norm = torch.linalg.vector_norm(v, dim=others, keepdim=True)
    result: Tensor = v * (g / norm)
    return result


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """With a dense gradient: torch has no second derivatives of a sparse one."""
    return F.embedding(
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse=False
    )


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """As rows of an embedding and sums over them; the fused kernel has no second derivative."""
    if mode not in ("sum", "mean") or max_norm is not None:
        return F.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    if input.ndim == 2:
        bags, length = input.shape
        owner = torch.arange(bags, device=input.device).repeat_interleave(length)
    else:
        assert offsets is not None
        ends = offsets[1:] if include_last_offset else offsets
        bags = len(ends)
        starts = offsets[:-1] if include_last_offset else offsets
        owner = torch.searchsorted(
            starts.contiguous(), torch.arange(len(input), device=input.device), right=True
        )
        owner = owner - 1
    indices = input.reshape(-1)
    rows = F.embedding(indices, weight, padding_idx, None, 2.0, scale_grad_by_freq, sparse=False)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    count = torch.ones_like(indices, dtype=weight.dtype)
    if padding_idx is not None:
        count = (indices != padding_idx % len(weight)).to(weight.dtype)
        rows = rows * count.unsqueeze(1)
    total = weight.new_zeros(bags, weight.shape[1]).index_add(0, owner, rows)
    if mode == "sum":
        return total
    sizes = weight.new_zeros(bags).index_add(0, owner, count).clamp(min=1)
    return total / sizes.unsqueeze(1)


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch._weight_norm: _weight_norm,
}


def evaluate(call: Call, leaves: Sequence[Tensor], name: str, modes: Sequence[Any] = ()) -> Tensor:
    """The value of `call(leaves)`, with a graph that can be trusted.

    Args:
        call: the caller's function of tensors.
        leaves: these tensors, which require gradients.
        name: what messages call the function.
        modes: context managers that the first evaluation is inside of; where the function hooks
            saved tensors, as checkpointing does, it is evaluated again without them.

    Raises:
        ValueError: if the function checkpoints reentrantly, or checkpoints what would be
            recomputed with other parameters than those of the forward pass.
        TypeError: if it gives no tensor.
    """
    noise = torch.get_rng_state()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS))
            for mode in modes:
                stack.enter_context(mode)
            return _called(call, leaves, name)
    except RuntimeError as error:
        if _HOOKS not in str(error):
            raise
    torch.set_rng_state(noise)
    value = _called(call, leaves, name)
    _check_recomputation(call, leaves, name, value, noise)
    return value


def _called(call: Call, leaves: Sequence[Tensor], name: str) -> Tensor:
    with warnings.catch_warnings():
        # What torch's reentrant checkpointing says of inputs that are data.
        warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
        try:
            value = call(leaves)
        except UserWarning as warning:
            raise ValueError(_REENTRANT.format(name=name)) from warning
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must give a tensor, got a {type(value).__name__}")
    if any(type(node).__name__.startswith("CheckpointFunction") for node in _nodes(value)):
        raise ValueError(_REENTRANT.format(name=name))
    return value


def _nodes(value: Tensor) -> Iterator[Any]:
    """The graph behind a value."""
    found, seen = [value.grad_fn], {value.grad_fn}
    while found:
        node = found.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                found.append(following)


def reaches(value: Tensor, leaves: Sequence[Tensor]) -> list[bool]:
    """Which of the leaves the graph behind a value has."""
    present = {id(getattr(node, "variable", None)) for node in _nodes(value)}
    return [id(leaf) in present for leaf in leaves]


def _check_recomputation(
    call: Call, leaves: Sequence[Tensor], name: str, value: Tensor, noise: Tensor
) -> None:
    """Compare ⟨Jᵀw, u⟩, which recomputes, with ⟨w, J u⟩ in forward mode, which does not."""
    generator = torch.Generator().manual_seed(0)

    def like(t: Tensor) -> Tensor:
        drawn = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        return drawn.to(t.device, t.dtype)

    w, directions = like(value), [like(leaf) for leaf in leaves]
    pulled = torch.autograd.grad(
        value, list(leaves), w, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    backward = sum(float((g * u).sum()) for g, u in zip(pulled, directions, strict=True))
    size = sum(float((g * u).abs().sum()) for g, u in zip(pulled, directions, strict=True))
    after = torch.get_rng_state()
    torch.set_rng_state(noise)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(leaf.detach(), u)
            for leaf, u in zip(leaves, directions, strict=True)
        ]
        tangent = torch.autograd.forward_ad.unpack_dual(call(duals)).tangent
    torch.set_rng_state(after)
    forward = 0.0 if tangent is None else float((tangent * w).sum())
    tolerance = torch.finfo(value.dtype).eps ** 0.5 * (size + abs(forward))
    if not abs(forward - backward) <= tolerance:
        raise ValueError(
            f"{name} is recomputed with other parameters in the backward pass than in the forward "
            f"pass, as torch.utils.checkpoint does under functional_call; load the parameters "
            f"into the module first, or leave checkpointing out here"
        )


def require_dependence(gradients: Sequence[Tensor | None], name: str) -> None:
    """Refuse a function that does not look at the parameters that it is given."""
    if all(g is None for g in gradients):
        raise ValueError(
            f"{name} does not depend on the parameters it is given; call the module by "
            f"torch.func.functional_call(module, params, inputs)"
        )


def require_scalar(value: Tensor, name: str) -> None:
    """Refuse a loss of several numbers."""
    if value.numel() != 1:
        raise ValueError(f"{name} must give a scalar, got shape {tuple(value.shape)}")
