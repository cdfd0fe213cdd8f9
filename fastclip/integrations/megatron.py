"""Megatron-core: what its `clip_grads` measures and scales with is ours."""

from functools import partial
from types import ModuleType

from .._redirect import Undo
from . import apex

MODULE = "megatron.core.optimizer.clip_grads"


def adapt(module: ModuleType) -> list[Undo]:
    """Two assignments, which a user of Megatron-core can make as well."""
    undo: list[Undo] = []
    for name, ours in (
        ("l2_norm_impl", apex.multi_tensor_l2norm),
        ("multi_tensor_scale_impl", apex.multi_tensor_scale),
    ):
        if hasattr(module, name):
            undo.append(partial(setattr, module, name, getattr(module, name)))
            setattr(module, name, ours)
    return undo
