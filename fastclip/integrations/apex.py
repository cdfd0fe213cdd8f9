"""apex's multi-tensor functions by its own signatures.

`clip_grad_norm_` stands here for `apex.contrib.clip_grad`'s.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._gradients import take
from .._ops import widest
from .._ranks import Kind
from ..clip import clip_grad_norm_ as clip_grad_norm_


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
        TypeError, ValueError: lists of other lengths or shapes, or a tensor of another dtype.

    Reference: `amp_C.multi_tensor_scale` of NVIDIA apex.
    """
    most = take(list(tensor_lists[0])).norm(math.inf)
    scale_into(*tensor_lists, scale=scale)
    noop_flag.masked_fill_(~most.isfinite().to(noop_flag.device), 1)


@torch.no_grad()
def scale_into(sources: Sequence[Tensor], outs: Sequence[Tensor], *, scale: float) -> None:
    """`multi_tensor_scale` without its flag."""
    if len(sources) != len(outs):
        raise ValueError(
            f"tensor_lists: expected two of one length, got {len(sources)} and {len(outs)} tensors"
        )
    both = list(zip(sources, outs, strict=True))
    for i, (source, out) in enumerate(both):
        if source.shape != out.shape or source.is_complex() != out.is_complex():
            raise ValueError(
                f"tensor_lists[1][{i}]: expected the shape of what is written into it, "
                f"{tuple(source.shape)} of {source.dtype}, got {tuple(out.shape)} of {out.dtype}"
            )
    take(list(sources))
    take(list(outs))
    if in_place := [out for source, out in both if source is out]:
        take(in_place).scale_(in_place[0].new_tensor(scale, dtype=widest(in_place[0].device)))
    for source, out in both:
        if source is not out:
            wide = torch.promote_types(source.dtype, out.dtype)
            out.copy_(source.to(wide) * scale)
