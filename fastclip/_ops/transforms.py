"""Inside `torch.vmap`, `torch.func.grad` and the other transforms of functions.

There every op is its default, in plain PyTorch, which is all that a transform can take; so a norm
has its derivative, and a clip is differentiated as any function is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def is_differentiated() -> bool:
    """Whether autograd is to see what is done: outside of transforms norms are constants to it."""
    return is_transformed() and torch.is_grad_enabled()


def is_known(value: Tensor) -> bool:
    """Whether the host has it already: it is on the CPU, no fake, and not one of many in `vmap`."""
    is_here = value.device.type == "cpu" and not isinstance(value, FakeTensor)
    return is_here and not is_transformed()


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype: a copy if a derivative may need it after it was changed in place."""
    return tensor.to(dtype, copy=is_differentiated())


def refused(name: str) -> Callable[..., Any]:
    """What an op that keeps numbers from step to step is there: a transform may not see them."""

    def op(*args: Any) -> Any:
        raise RuntimeError(
            f"{name} keeps numbers of every step, which torch.vmap, torch.func.grad and other "
            "transforms of functions cannot; call it outside of them, or clip there by "
            "clip_grad_norm_ with a number or a tensor"
        )

    return op
