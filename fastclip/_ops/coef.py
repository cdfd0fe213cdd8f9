"""Coefficients: what a norm and a threshold come to, in plain PyTorch."""

import math

import torch
from torch import Tensor


def clip_coef(total_norm: Tensor, max_norm: float | Tensor, wide: bool = True) -> Tensor:
    """Return min(1, max_norm / (total_norm + 1e-6)), of the norm's shape and dtype.

    Not `wide`, it is that of the norm as a float32, where one holds it. An infinite threshold gives
    1 for any norm. A NaN or negative threshold, which only a tensor can bring here (the dispatcher
    may make a number of it), and a negative norm give NaN: loud, where a negative multiplier would
    silently reverse a step.
    """
    if not wide:
        near = total_norm.float()
        coef = clip_coef(near, max_norm).to(total_norm)
        return coef.where(near.isfinite(), clip_coef(total_norm, max_norm))
    if not isinstance(max_norm, Tensor):
        if not 0 <= max_norm <= torch.finfo(total_norm.dtype).max:
            return torch.full_like(total_norm, 1 if max_norm > 0 else math.nan)
        coef = torch.full_like(total_norm, max_norm + 0.0).div_(total_norm + 1e-6).clamp_max_(1)
        return coef.masked_fill_(total_norm < 0, math.nan)
    threshold = max_norm.to(total_norm)
    coef = ((threshold + 0.0) / (total_norm + 1e-6)).clamp(max=1)
    return coef.where((threshold >= 0) & (total_norm >= 0), math.nan).masked_fill(
        threshold == math.inf, 1
    )


def means_zeros(coef: Tensor) -> Tensor:
    """Where it is -0.0, a multiplier that no clip comes to."""
    return (coef == 0) & coef.signbit()
