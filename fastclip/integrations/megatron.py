"""Megatron-core: its `clip_grads` measures and scales gradients by fastclip's ops.

The two functions here have the signatures of those of apex that Megatron-core calls,
`multi_tensor_l2norm` and `multi_tensor_scale`. Megatron-core never reads what these write into
`noop_flag`, so the two here leave it as it is.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from .._gradients import take
from .._ops import widest
from .._redirect import Undo

MODULE = "megatron.core.optimizer.clip_grads"


def adapt(module: ModuleType, wrap: Callable[..., Any]) -> list[Undo]:
    """Assign fastclip's functions to the two names that `clip_grads` looks up at each call."""
    scale_by_megatron: Any = getattr(module, "multi_tensor_scale_impl", None)

    def multi_tensor_l2norm(
        chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], *_: Any
    ) -> tuple[Tensor, None]:
        """Return the norm of `tensor_lists[0]`, float32 of shape (1,); None for norms by tensor."""
        return take(tensor_lists[0]).norm(2.0).float().reshape(1), None

    def multi_tensor_scale(
        chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], scale: float
    ) -> None:
        """Multiply in place if both `tensor_lists` are one list, as those of `clip_grads` are."""
        grads, outs = tensor_lists
        if grads is not outs:
            scale_by_megatron(chunk_size, noop_flag, tensor_lists, scale)
        elif grads:
            like = grads[0]
            take(grads).scale_(like.new_tensor(scale, dtype=widest(like.device)))

    undo: list[Undo] = []
    for name, ours in (
        ("l2_norm_impl", multi_tensor_l2norm),
        ("multi_tensor_scale_impl", multi_tensor_scale),
    ):
        if hasattr(module, name):
            undo.append(partial(setattr, module, name, getattr(module, name)))
            setattr(module, name, wrap(ours))
    return undo
