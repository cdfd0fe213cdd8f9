"""apex's multi-tensor functions by its own signatures, and Megatron-core, which clips with them.

    from megatron.core.optimizer import clip_grads
    clip_grads.l2_norm_impl = fastclip.integrations.apex.multi_tensor_l2norm
    clip_grads.multi_tensor_scale_impl = fastclip.integrations.apex.multi_tensor_scale

is what `fastclip.patch()` does. `clip_grad_norm_` stands here for `apex.contrib.clip_grad`'s.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._gradients import take
from .._ranks import Kind
from .._redirect import Undo
from ..clip import clip_grad_norm_

__all__ = [
    "clip_grad_norm_",
    "multi_tensor_applier",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
]
MODULE = "megatron.core.optimizer.clip_grads"


class MultiTensorApply:
    """What apex calls its functions with: `multi_tensor_applier(op, noop_flag, lists, *args)`."""

    available = True

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(
        self, op: Callable[..., Any], noop_flag: Tensor, tensor_lists: Any, *args: Any
    ) -> Any:
        return op(self.chunk_size, noop_flag, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)


def multi_tensor_l2norm(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    per_tensor: bool = False,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """Return the 2-norm of the tensors of `tensor_lists[0]`, and of each.

    Args:
        chunk_size: not needed here.
        noop_flag: one number, made 1 if the norm is infinite or NaN; else left as it is.
        tensor_lists: one list of n tensors, of any shapes and floating dtypes.
        per_tensor: whether to measure each.

    Returns:
        Two float32 tensors on the device of the flag: 1-d of 1; 1-d of n, or of 0.

    Raises:
        TypeError: a tensor of another dtype.

    Reference: `amp_C.multi_tensor_l2norm` of NVIDIA apex.
    """
    (tensors,) = tensor_lists
    norm = take(list(tensors)).norm(2.0).to(noop_flag.device)
    noop_flag.masked_fill_(~norm.isfinite(), 1)
    each = take(list(tensors), kind=Kind.EACH).each_norms(2.0) if per_tensor else norm.new_empty(0)
    return norm.float().reshape(1), each.float().to(noop_flag.device)


@torch.no_grad()
def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """Write the tensors of `tensor_lists[0]`, times `scale`, into those of `tensor_lists[1]`.

    Args:
        chunk_size: not needed here.
        noop_flag: one number, made 1 if an element read is infinite or NaN; else left as it is.
        tensor_lists: two lists of n tensors, of equal shapes and any floating dtypes; they may be
            the same tensors.
        scale: a number.

    Raises:
        TypeError, ValueError: lists of other lengths, or a tensor of another dtype.

    Reference: `amp_C.multi_tensor_scale` of NVIDIA apex.
    """
    sources, outs = map(list, tensor_lists)
    if len(sources) != len(outs):
        raise ValueError(
            f"tensor_lists: expected two of one length, got {len(sources)} and {len(outs)} tensors"
        )
    most = take(sources).norm(math.inf)
    noop_flag.masked_fill_(~most.isfinite().to(noop_flag.device), 1)
    both = list(zip(sources, outs, strict=True))
    take([out for source, out in both if source is out]).scale_(most.new_tensor(scale))
    for source, out in both:
        if source is not out:
            wide = torch.promote_types(source.dtype, out.dtype)
            out.copy_(source.to(wide) * scale)


def adapt(module: ModuleType) -> list[Undo]:
    """Replace what Megatron-core's `clip_grads` measures and scales with."""
    undo: list[Undo] = []
    for name, ours in (
        ("l2_norm_impl", multi_tensor_l2norm),
        ("multi_tensor_scale_impl", multi_tensor_scale),
    ):
        if hasattr(module, name):
            undo.append(partial(setattr, module, name, getattr(module, name)))
            setattr(module, name, ours)
    return undo
