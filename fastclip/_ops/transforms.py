"""Inside `torch.vmap`, `torch.func.grad` and the other transforms of functions.

There every op is its default, in plain PyTorch, which is all that a transform can take; so a norm
has its derivative, and a clip is differentiated as any function is.
"""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def is_differentiated() -> bool:
    """Whether autograd is to see what is done: outside of transforms norms are constants to it."""
    return is_transformed() and torch.is_grad_enabled()


def is_known(value: Tensor) -> bool:
    """Whether the host has its numbers already, and so may ask for them."""
    # In a graph and in `vmap` it stands for many.
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return value.device.type == "cpu" and not isinstance(value, FakeTensor)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype: a copy if a derivative may need it after it was changed in place."""
    return tensor.to(dtype, copy=is_differentiated())


def refuse_transforms(name: str) -> None:
    """Raise inside a transform, for what keeps numbers from step to step: it may not see them."""
    if is_transformed():
        raise RuntimeError(
            f"{name} keeps numbers of every step, which torch.vmap, torch.func.grad and other "
            "transforms of functions cannot; call it outside of them, or clip there by "
            "clip_grad_norm_ with a number or a tensor"
        )
