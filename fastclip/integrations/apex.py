"""apex's multi-tensor functions by its own signatures.

`clip_grad_norm_` stands here for `apex.contrib.clip_grad`'s.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._gradients import take
from .._ranks import Kind
from ..clip import clip_grad_norm_

__all__ = [
    "clip_grad_norm_",
    "multi_tensor_applier",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
]


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag: Tensor, tensor_lists: Any, *args: Any
) -> Any:
    """Call one of the functions below, with what apex calls the size of a chunk."""
    return op(2048 * 32, noop_flag, tensor_lists, *args)


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
