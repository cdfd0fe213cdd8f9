"""Inside `torch.vmap`, `torch.func.grad` and the other transforms of functions.

There every op is its default, in plain PyTorch, which is all that a transform can take; so a norm
has its derivative, and a clip is differentiated as any function is.
"""

import torch
from torch import Tensor

from .._private import private

is_active = private("torch._C._are_functorch_transforms_active")
_FakeTensor = private("torch._subclasses.FakeTensor")
_FunctionalTensor = private("torch._subclasses.functional_tensor.FunctionalTensor")
# What a mode, as FakeTensorMode, would make of the tensors in which others keep their numbers.
without_modes = private("torch.utils._python_dispatch._disable_current_modes")


def is_transformed() -> bool:
    # Where nothing tells, the ops raise in a transform.
    return bool(is_active and is_active())


def is_fake(tensor: Tensor) -> bool:
    """Whether it only stands for a tensor, in a graph or a mode."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    return isinstance(tensor, (_FakeTensor, _FunctionalTensor))


def is_differentiated() -> bool:
    """Whether autograd is to see what is done: outside of transforms norms are constants to it."""
    return is_transformed() and torch.is_grad_enabled()


def is_host_readable(value: Tensor) -> bool:
    """Whether the host has its numbers already, and so may ask for them."""
    # In a graph and in `vmap` it stands for many.
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return value.device.type == "cpu" and not is_fake(value)


def refuse_transforms(name: str) -> None:
    """Raise inside a transform, for what keeps numbers from step to step: it may not see them."""
    if is_transformed():
        raise RuntimeError(
            f"{name} keeps numbers of every step, which torch.vmap, torch.func.grad and other "
            "transforms of functions cannot; call it outside of them, or clip there by "
            "clip_grad_norm_ with a number or a tensor"
        )
