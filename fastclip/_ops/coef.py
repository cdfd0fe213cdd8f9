"""The coefficient of a clip, in plain PyTorch: Note [coef] of csrc/formulas.h."""

import math

import torch
from torch import Tensor

from .rows import widest
from .transforms import is_known


def as_limit(max_norm: float | Tensor, device: torch.device) -> Tensor:
    """A threshold as a tensor: a number's is on the CPU, where every device reads it at no cost."""
    if isinstance(max_norm, Tensor):
        return max_norm
    if torch.compiler.is_compiling():
        # A constant would be compiled anew whenever it changes.
        return torch.ones((), dtype=widest(device), device=device) * max_norm
    return torch.full((), max_norm, dtype=torch.float64, device="cpu")


def clip_coef(total_norm: Tensor, max_norm: float | Tensor, wide: bool = True) -> Tensor:
    """Return min(1, max_norm / (total_norm + 1e-6)), of the norm's shape and dtype.

    An infinite threshold gives 1 for any norm; a NaN or negative one gives NaN. Not `wide`, it is
    computed in float32, where that holds the norm.
    """
    if not wide:
        near = total_norm.float()
        coef = clip_coef(near, max_norm)
        return coef.where(near <= torch.finfo(near.dtype).max, clip_coef(total_norm, max_norm))
    limit = as_limit(max_norm, total_norm.device)
    if limit.dim() == 0 and is_known(limit):
        number = float(limit)
        if not 0 <= number <= torch.finfo(total_norm.dtype).max:
            return torch.full_like(total_norm, 1 if number > 0 else math.nan)
        # A device divides a number of the CPU without a launch to bring it there.
        return ((limit.to(total_norm.dtype) + 0.0) / (total_norm + 1e-6)).clamp(max=1)
    limit = limit.to(total_norm)
    coef = ((limit + 0.0) / (total_norm + 1e-6)).clamp(max=1)
    return coef.where(limit >= 0, math.nan).masked_fill(limit == math.inf, 1)


def means_zeros(coef: Tensor) -> Tensor:
    """Where it is -0.0, a multiplier that no clip comes to."""
    return (coef == 0) & coef.signbit()
