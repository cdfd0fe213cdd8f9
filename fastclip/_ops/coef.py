"""The coefficient of a clip, in plain PyTorch: Note [coef] of csrc/formulas.h."""

import math

import torch
from torch import Tensor

from .measure import widest
from .transforms import is_host_readable, is_transformed

# Added to a norm before a threshold is divided by it.
EPSILON = 1e-6


def as_limit(max_norm: float | Tensor, device: torch.device) -> Tensor:
    """Return a threshold as a tensor; a number as one on the CPU, which any op takes."""
    if isinstance(max_norm, Tensor):
        return max_norm
    if torch.compiler.is_compiling() or is_transformed():
        # A constant in a graph would cause a recompilation whenever it changes, and inside a
        # transform one cannot tell that a tensor is on the CPU.
        return torch.ones((), dtype=widest(device), device=device) * max_norm
    return torch.full((), max_norm, dtype=torch.float64, device="cpu")


def one_number(max_norm: float | Tensor) -> float | Tensor:
    if not isinstance(max_norm, Tensor):
        return max_norm
    if max_norm.numel() != 1:
        raise ValueError(f"max_norm: expected a 0-d tensor, got shape {list(max_norm.shape)}")
    return max_norm.reshape(())


def clip_coef(total_norm: Tensor, max_norm: float | Tensor, wide: bool = True) -> Tensor:
    """Return min(1, max_norm / (total_norm + 1e-6)), in the shape and dtype of `total_norm`.

    An infinite threshold gives 1 for any norm; a NaN or negative one gives NaN. If not `wide`, the
    coefficient is computed in float32.
    """
    dtype = total_norm.dtype if wide else torch.float32
    return clip_coef_in(dtype, total_norm, max_norm).to(total_norm.dtype)


def clip_coef_in(dtype: torch.dtype, total_norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """Return `clip_coef` computed in `dtype`, which is also the dtype of the result."""
    limit, unit = as_limit(max_norm, total_norm.device), 1.0
    number = float(limit.detach()) if limit.dim() == 0 and is_host_readable(limit) else None
    is_number = number is not None
    if number is not None and not 0 <= number < math.inf:
        return torch.full_like(total_norm, 1 if number > 0 else math.nan, dtype=dtype)
    # A factor of a power of two brings norms beyond float32 into its range without rounding. It
    # would round tiny thresholds, so these go without it and get coefficient 0 for such norms.
    if dtype != total_norm.dtype and (number is None or number > 2.0**-60):
        unit = 2.0**-48
    # A 0-d CPU tensor stays there: a device's division takes it as a scalar, without a copy.
    limit = limit.to(total_norm.dtype) if is_number else limit.to(total_norm)
    near = (limit * unit).clamp(max=torch.finfo(dtype).max).to(dtype)
    norm = (total_norm if unit == 1 else total_norm * unit).to(dtype)
    coef = ((near + 0.0) / (norm + EPSILON * unit)).clamp(max=1)
    if is_number:
        return coef
    return coef.where(limit >= 0, math.nan).masked_fill(limit == math.inf, 1)


# The coefficient that means "write zeros", as 0 * NaN is NaN. `clip_coef` never returns it.
ZEROS = -0.0


def means_zeros(coef: Tensor) -> Tensor:
    """Return a mask of the coefficients that are ZEROS."""
    return (coef == 0) & coef.signbit()
