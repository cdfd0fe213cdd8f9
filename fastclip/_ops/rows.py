"""Sums that stay exact: rows of few elements in the dtype they come in, all above in the widest."""

import functools
import math

import torch
from torch import Tensor

from . import pieces
from .pieces import block_of, in_float_rows, in_rows
from .transforms import is_known, without_modes


@functools.cache
def _widest(device_type: str) -> torch.dtype:
    try:
        # Fake tensors would say yes for any device.
        with without_modes():
            torch.zeros(1, dtype=torch.float64, device=device_type).add_(1)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def widest(device: torch.device) -> torch.dtype:
    """Float64, or float32 on a device that has none (Apple's, some of Intel's)."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else _widest(device.type)


def norm_of(values: Tensor, p: float) -> Tensor:
    """The p-norm of wide values, relative to their maximum where a power may overflow."""
    return norms_of_rows(values[None], p)[0]


def norms_in_rows(part: Tensor, p: float, copy: Tensor | None = None) -> list[Tensor]:
    """Norms of 1-d values by rows of ROW elements, and of the rest; of halves in a `copy`."""
    if copy is not None and part.dtype in pieces.HALVES:
        return [_norms_of_short_rows(r, p).flatten() for r in in_float_rows(part, copy)]
    # What is made of them on the way stays in the cache.
    parts = part.split(pieces.COPY) if p == 1 else [part]
    return [_norms_of_short_rows(r, p) for some in parts for r in in_rows(some, pieces.ROW)]


def norms_of_rows(rows: Tensor, p: float) -> Tensor:
    """No sum has more terms than float32 is exact for, or than one thread adds."""
    size = pieces.ROW if rows.dtype == torch.float32 else block_of(rows)
    if p <= 0 or rows.size(1) <= size:
        return _norms_of_short_rows(rows, p)
    whole = rows.size(1) // size * size
    found = [_norms_of_short_rows(rows[:, :whole].unflatten(1, (-1, size)), p)]
    if whole < rows.size(1):
        found.append(_norms_of_short_rows(rows[:, whole:], p)[:, None])
    return norms_of_rows(torch.cat(found, 1).to(widest(rows.device)), p)


def _norms_of_short_rows(rows: Tensor, p: float) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if p == 1 and dtype == torch.float32:
        # In lanes, which the norm of order 1 does not add in.
        return rows.abs().sum(-1, dtype=dtype)
    if p in (1, 2) or math.isinf(p) or p <= 0:
        norms: Tensor = torch.linalg.vector_norm(rows, p, dim=-1, dtype=dtype)
        exact = p == 2 and dtype == torch.float64 and is_known(norms)
        if not (exact and bool(norms.isinf().any())):
            return norms
    most = rows.abs().amax(-1)
    unit = most.where((most > 0) & most.isfinite(), 1)
    norms = torch.linalg.vector_norm(rows / unit[..., None], p, dim=-1)
    return unit * norms


def norms_of_segments(values: Tensor, lengths: list[int], p: float) -> Tensor:
    """Norms of order 1 or 2 of runs of values, one after another, in float64."""
    powers = values.double().abs() if p == 1 else values.double().square()
    cuts = torch.tensor(lengths, device="cpu")
    return torch.segment_reduce(powers, "sum", lengths=cuts, initial=0) ** (1 / p)
