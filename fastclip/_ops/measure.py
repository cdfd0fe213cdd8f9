"""Norms in plain PyTorch, on any device.

A long tensor is cut into rows of a few elements. The norms of the rows then replace the tensor, and
are measured in the same way. On the CPU rows are summed in float32, which is exact enough for so
few elements, and their norms in float64. A GPU sums in float64, a device without it in float32.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .._private import private
from .transforms import is_differentiated, is_host_readable, is_transformed, without_modes

foreach_norm = private("torch._foreach_norm")

# The number of elements that may be added in float32.
ROW = 256
# The number of elements that one call may add in the widest dtype. On the CPU torch divides a sum
# of 32 Ki elements or more among its threads, and the bits of the sum depend on their number.
SHORT = 1 << 13
# The number of elements that are copied at once, to change the dtype or because memory has gaps.
BLOCK = 1 << 20
# If a norm is below this, the squares of its elements may underflow in float32.
TINY = 1e-9


@functools.cache
def _widest(device_type: str) -> torch.dtype:
    try:
        # Under FakeTensorMode this would succeed for any device.
        with without_modes():
            torch.zeros(1, dtype=torch.float64, device=device_type).add_(1)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has no float64 (Apple's, some of Intel's)."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else _widest(device.type)


def empty_norm(p: float) -> float:
    """Return the norm of an empty tensor, which changes no norm that it is combined with."""
    return math.inf if p < 0 else 0.0


def each(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the norm of each of one or more tensors, 1-d, on the first tensor's device."""
    measure = _each_at_once if p in (1, 2, math.inf) and not is_transformed() else _each_alone
    if len({t.device for t in tensors}) == 1:
        return measure(tensors, p)
    places: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        places[tensor.device, tensor.dtype].append(i)
    device = tensors[0].device
    norms: dict[int, Tensor] = {}
    for some in places.values():
        found = measure([tensors[i] for i in some], p).to(device, widest(device))
        norms |= zip(some, found.unbind(), strict=True)
    return torch.stack([norms[i] for i in range(len(tensors))])


def each_row(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the norm of each slice along the first dimension, 1-d, on the first tensor's device.

    A tensor of fewer than two dimensions counts as one slice."""
    device = tensors[0].device
    found = [each([t], p) if t.dim() < 2 else norms_of_slices(_keep_values(t), p) for t in tensors]
    return torch.cat([norms.to(device, widest(device)) for norms in found])


def norm_of(values: Tensor, p: float) -> Tensor:
    """Return the norm of 1-d values, 0-d."""
    return norms_of_slices(values[None], p)[0]


def norms_of_slices(tensor: Tensor, p: float) -> Tensor:
    """Return the norm of each slice along the first of two or more dimensions, 1-d."""
    dtype = widest(tensor.device)
    if not tensor.numel():
        return torch.full((len(tensor),), empty_norm(p), dtype=dtype, device=tensor.device)
    if tensor.dim() == 2 and tensor.dtype == dtype and tensor.size(1) <= _most_terms(dtype):
        return _norms_of_rows(tensor, p)
    norms = _norms_of_pieces(tensor, p)
    # A norm of order 0 is a number of elements, and these numbers are added.
    return norms[:, 0] if norms.size(1) == 1 else norms_of_slices(norms, p or 1)


def _each_at_once(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the norms of tensors on one device, in one call after long ones were shortened."""
    dtype = widest(tensors[0].device)
    short = [t if 0 < t.numel() <= SHORT else _shorten(t, p, dtype) for t in tensors]
    # The largest element needs no wider dtype, to which whole tensors would be copied.
    found = foreach_norm(short, p, dtype=None if p == math.inf else dtype)
    norms = torch.stack(found).to(dtype)
    if is_host_readable(norms) and bool(norms.isinf().any()):
        # The squares of float64 elements may overflow, although their norm would not.
        for i in norms.isinf().nonzero().flatten().tolist():
            if short[i].dtype == torch.float64:
                norms[i] = norm_of(short[i].reshape(-1), p)
    return norms


def _shorten(tensor: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the same norm that one call may measure."""
    if not tensor.numel():
        return tensor.new_zeros(1)
    # Order inf adds nothing. A GPU sums in float64, with bits that do not depend on threads.
    may_add = p == math.inf or not (tensor.is_cpu or dtype == torch.float32)
    return tensor if may_add else _each_alone([tensor], p)


def _each_alone(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the norms of tensors on one device, one after the other."""
    norms = [norms_of_slices(_as_slices(_keep_values(t)), p) for t in tensors]
    return torch.stack([n[0] if len(n) == 1 else norm_of(n, p or 1) for n in norms])


def _most_terms(dtype: torch.dtype) -> int:
    """Return the number of elements that one sum in this dtype may have."""
    return ROW if dtype == torch.float32 else SHORT


def _keep_values(tensor: Tensor) -> Tensor:
    """Return the tensor; if autograd will need its elements after an in-place change, a copy."""
    return tensor.to(widest(tensor.device), copy=True) if is_differentiated() else tensor


def _as_slices(tensor: Tensor) -> Tensor:
    """Return a view as one slice, in memory order; as several slices if memory has gaps."""
    if tensor.is_contiguous():
        return tensor.view(1, -1)
    dense = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).squeeze()
    return dense.view(1, -1) if dense.is_contiguous() or dense.dim() < 2 else dense


def _norms_of_pieces(tensor: Tensor, p: float) -> Tensor:
    """Return the norms of the pieces of each slice: a matrix with a row for each slice."""
    if is_host_readable(tensor) and tensor.dtype != torch.float64 and p in (1, 2):
        norms = _norms_of_pieces_in(torch.float32, tensor, p)
        most = norms.amax(1)
        if not bool((most.isinf() | (most < TINY * (p == 2))).any()):
            return norms.double()
    return _norms_of_pieces_in(widest(tensor.device), tensor, p)


def _norms_of_pieces_in(dtype: torch.dtype, tensor: Tensor, p: float) -> Tensor:
    """Do as `_norms_of_pieces`, in `dtype`; at most BLOCK elements are copied at once."""
    size, found = _most_terms(dtype), []
    is_copied = tensor.dtype != dtype or p != 2 or not tensor.is_contiguous()
    at_once = BLOCK if is_copied else tensor.numel()
    # If the host waits for each copy, each new one overwrites the one before in the same memory.
    is_reused = tensor.dtype != dtype and is_host_readable(tensor)
    room = tensor.new_empty(min(BLOCK, tensor.numel()) if is_reused else 0, dtype=dtype)
    for slices in tensor.split(max(1, at_once * len(tensor) // tensor.numel())):
        norms = []
        for block in slices.flatten(1).split(at_once, 1):
            if is_reused:
                block = room[: block.numel()].view(block.shape).copy_(block)
            # Over gaps torch would add one element after the other.
            block = block.to(dtype).contiguous()
            whole = block.size(1) // size * size
            if whole:
                norms.append(_norms_of_rows(block[:, :whole].unflatten(1, (-1, size)), p))
            if whole < block.size(1):
                norms.append(_norms_of_rows(block[:, None, whole:], p))
        found.append(torch.cat(norms, 1))
    return torch.cat(found)


def _norms_of_rows(rows: Tensor, p: float) -> Tensor:
    """Return norms along the last dimension; divide by the largest element if a power overflows."""
    if p in (1, 2) or math.isinf(p) or p <= 0:
        # `vector_norm` of order 1 adds sequentially, which is less exact than `sum`.
        norms: Tensor = rows.abs().sum(-1) if p == 1 else torch.linalg.vector_norm(rows, p, dim=-1)
        if rows.dtype == torch.float32 or not (
            is_host_readable(norms) and bool(norms.isinf().any())
        ):
            return norms
    most = rows.abs().amax(-1)
    unit = most.where((most > 0) & most.isfinite(), 1)
    norms = torch.linalg.vector_norm(rows / unit[..., None], p, dim=-1)
    return unit * norms
