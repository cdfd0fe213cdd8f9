"""What the host can read in transforms such as `torch.vmap`, in graphs and under modes.

Inside a transform every op runs its default in plain PyTorch: a transform can trace nothing else.
So norms have derivatives, and a clip can be differentiated like any function.
"""

import torch
from torch import Tensor

from .._private import private

is_active = private("torch._C._are_functorch_transforms_active")
_FakeTensor = private("torch._subclasses.FakeTensor")
_FunctionalTensor = private("torch._subclasses.functional_tensor.FunctionalTensor")
# For tensors whose values the host needs: a mode such as FakeTensorMode would make them fake.
without_modes = private("torch.utils._python_dispatch._disable_current_modes")


def is_transformed() -> bool:
    # If this torch lacks the private function, the ops raise in a transform.
    return bool(is_active and is_active())


def is_fake(tensor: Tensor) -> bool:
    """Return whether this only stands for a tensor, without values, as in a graph or a mode."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    return isinstance(tensor, (_FakeTensor, _FunctionalTensor))


def is_differentiated() -> bool:
    """Return whether autograd is to record the ops; outside of transforms it never does."""
    return is_transformed() and torch.is_grad_enabled()


def is_host_readable(value: Tensor) -> bool:
    """Return whether the host can read the values of a tensor without waiting for a device."""
    # In a graph or a transform one tensor stands for many.
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return value.device.type == "cpu" and not is_fake(value)


def refuse_transforms(name: str) -> None:
    """Raise inside a transform, where `name` could not keep numbers from step to step."""
    if is_transformed():
        raise RuntimeError(
            f"{name} keeps numbers of every step, which torch.vmap, torch.func.grad and other "
            "transforms of functions do not allow; call it outside of them, or use "
            "clip_grad_norm_ with a number or a tensor there"
        )
