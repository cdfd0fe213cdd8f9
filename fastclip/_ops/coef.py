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
    computed in float32.
    """
    dtype = total_norm.dtype if wide else torch.float32
    return clip_coef_in(dtype, total_norm, max_norm).to(total_norm.dtype)


def clip_coef_in(dtype: torch.dtype, total_norm: Tensor, max_norm: float | Tensor) -> Tensor:
    limit, eps = as_limit(max_norm, total_norm.device), 1e-6
    if dtype != total_norm.dtype:
        # A power of two rounds nothing, and brings norms beyond float32 into its range.
        unit = 2.0**-48
        total_norm, limit, eps = total_norm * unit, limit.to(total_norm.dtype) * unit, eps * unit
    norm = total_norm.to(dtype)
    if limit.dim() == 0 and is_known(limit):
        number = float(limit)
        if not 0 <= number <= torch.finfo(dtype).max:
            return torch.full_like(norm, 1 if number > 0 else math.nan)
        # A device divides a number of the CPU without a launch to bring it there.
        return ((limit.to(dtype) + 0.0) / (norm + eps)).clamp(max=1)
    limit = limit.to(norm)
    coef = ((limit + 0.0) / (norm + eps)).clamp(max=1)
    return coef.where(limit >= 0, math.nan).masked_fill(limit == math.inf, 1)


def means_zeros(coef: Tensor) -> Tensor:
    """Where it is -0.0, a multiplier that no clip comes to."""
    return (coef == 0) & coef.signbit()
