"""Megatron-core: what its `clip_grads` measures and scales with is ours."""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from .._redirect import Undo
from .apex import multi_tensor_l2norm, scale_into

MODULE = "megatron.core.optimizer.clip_grads"


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """apex's, without the look for infinities: Megatron-core does not read that flag."""
    scale_into(*tensor_lists, scale=scale)


def adapt(module: ModuleType, wrap: Callable[..., Any]) -> list[Undo]:
    """Two assignments, which a user of Megatron-core can make as well."""
    undo: list[Undo] = []
    for name, ours in (
        ("l2_norm_impl", multi_tensor_l2norm),
        ("multi_tensor_scale_impl", multi_tensor_scale),
    ):
        if hasattr(module, name):
            undo.append(partial(setattr, module, name, getattr(module, name)))
            setattr(module, name, wrap(ours))
    return undo
