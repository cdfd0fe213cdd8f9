"""Norms in plain PyTorch.

On the CPU as many elements are summed in float32 as a lane of a vector unit has few of, and all
above is float64. A device with float64 sums in that from the first element on; one without it has
float32 alone. Where a power may not fit, elements are measured relative to the largest.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import pieces
from .pieces import block_of, blocks, flat_parts, floats, in_rows, put_together, rows_of_block
from .transforms import converted, is_known, is_transformed

# A norm as small may have lost squares that are no float32.
TINY = 1e-9


@functools.cache
def _widest(device_type: str) -> torch.dtype:
    try:
        # Fake tensors would say yes for any device.
        with _disable_current_modes():
            torch.zeros(1, dtype=torch.float64, device=device_type).add_(1)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def widest(device: torch.device) -> torch.dtype:
    """Float64, or float32 on a device that has none (Apple's, some of Intel's)."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else _widest(device.type)


def total(tensors: Sequence[Tensor], p: float) -> Tensor:
    """The norm of one or more tensors as one vector, 0-d, on the first tensor's device."""
    if p == 2 and _are_here(tensors):
        norm = _folded(torch.cat(_rows_of_all(tensors)).double(), p)
        value = float(norm)
        if TINY < value < math.inf or math.isnan(value):
            return norm
    return norm_of(each(tensors, p), p)


def each(tensors: Sequence[Tensor], p: float) -> Tensor:
    """The norm of each of one or more tensors, 1-d, on the first tensor's device."""
    if is_transformed() or p not in (1, 2, math.inf):
        return _exact(tensors, p)
    if not _are_here(tensors):
        return _on_devices(tensors, p)
    norms = _each_here(tensors, p)
    # Beyond float32 may be what is summed, and below it what is squared.
    lost = (norms.isinf() | (norms < TINY * (p == 2))).nonzero().flatten()
    if len(lost) and p != math.inf:
        norms[lost] = _exact([tensors[i] for i in lost.tolist()], p)
    return norms


def each_row(tensor: Tensor, p: float) -> Tensor:
    """The norm of each slice along the first dimension of two or more, 1-d; else of the tensor."""
    if tensor.dim() < 2:
        return each([tensor], p)
    if tensor.numel() > block_of(tensor) * len(tensor):
        return each(tensor.unbind(), p)
    rows = tensor.flatten(1)
    if not rows.numel():
        return torch.zeros(len(rows), dtype=widest(tensor.device), device=tensor.device)
    parts = rows.split(rows_of_block(rows))
    return torch.cat([_norms_of_rows(converted(part, widest(part.device)), p) for part in parts])


def empty_norm(p: float) -> float:
    """The norm of no elements: what adds nothing to that of others."""
    return math.inf if p < 0 else 0.0


def norm_of(values: Tensor, p: float) -> Tensor:
    """The p-norm of wide values, relative to their maximum where a power may overflow."""
    return _norms_of_rows(values[None], p)[0]


def _are_here(tensors: Sequence[Tensor]) -> bool:
    """Whether the host may look at all numbers."""
    return is_known(tensors[0]) and all(t.is_cpu for t in tensors)


def _each_here(tensors: Sequence[Tensor], p: float) -> Tensor:
    result = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    few: dict[torch.dtype, list[int]] = defaultdict(list)
    rows: dict[int, list[Tensor]] = {}
    for i, tensor in enumerate(tensors):
        size = tensor.numel()
        if size and (p == math.inf or size <= pieces.SHORT):
            few[tensor.dtype].append(i)
        elif size:
            parts = flat_parts(tensor)
            parts = floats(parts) if tensor.dtype in pieces.HALVES else parts
            rows[i] = [norm for part in parts for norm in _rows(part, p)]
    for dtype, index in few.items():
        # A maximum is exact in any dtype.
        sums = {1: torch.float64, 2: torch.promote_types(dtype, torch.float32)}.get(p)
        # Over gaps torch adds one after another, in no lanes.
        norms = torch._foreach_norm([tensors[i].contiguous() for i in index], p, dtype=sums)
        result[index] = torch.stack(norms).double()
    if rows:
        sums = torch.cat([row for some in rows.values() for row in some]).double() ** p
        lengths = torch.tensor([sum(map(len, some)) for some in rows.values()], device="cpu")
        result[list(rows)] = torch.segment_reduce(sums, "sum", lengths=lengths) ** (1 / p)
    return result


def _on_devices(tensors: Sequence[Tensor], p: float) -> Tensor:
    """No wait, and no more calls of a device than torch makes."""
    device = tensors[0].device
    empty = torch.zeros((), dtype=widest(device), device=device)
    norms, places = [empty] * len(tensors), defaultdict(list)
    for i, tensor in enumerate(tensors):
        places[tensor.device].extend([i] * bool(tensor.numel()))
    for place, index in places.items():
        if index:
            found = _measured([tensors[i] for i in index], p, widest(place))
            for i, norm in zip(index, found, strict=True):
                norms[i] = norm.to(empty)
    return torch.stack(norms)


def _measured(tensors: list[Tensor], p: float, dtype: torch.dtype) -> Sequence[Tensor]:
    if dtype == torch.float64 or p == math.inf:
        return torch._foreach_norm(tensors, p, dtype=dtype)
    # In float32 in two steps, so that no sum has many terms.
    long = {i: t for i, t in enumerate(tensors) if t.numel() > pieces.SMALL}
    # Over gaps a device may add one after another.
    short = [t.contiguous() for i, t in enumerate(tensors) if i not in long]
    norms = iter(torch._foreach_norm(short, p, dtype=dtype) if short else ())
    return [_in_steps(long[i], p) if i in long else next(norms) for i in range(len(tensors))]


def _in_steps(tensor: Tensor, p: float) -> Tensor:
    rows = [row for part in flat_parts(tensor) for row in _rows(part, p)]
    return _folded(torch.cat(rows), p)


def _rows_of_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """2-norms of the rows of all together, in some order."""
    halves: list[Tensor] = []
    norms = [torch.zeros(1, dtype=torch.float32, device="cpu")]
    for part in put_together(tensors):
        if part.dtype in pieces.HALVES:
            halves.append(part)
        else:
            norms += _rows(part, 2)
    return norms + [norm for part in floats(halves) for norm in _rows(part, 2)]


def _rows(part: Tensor, p: float) -> list[Tensor]:
    """Norms of rows of ROW elements, and of the rest."""
    dtype = torch.float32 if part.dtype in pieces.HALVES else None
    if p == 2:
        return [torch.linalg.vector_norm(r, 2, 1, dtype=dtype) for r in in_rows(part, pieces.ROW)]
    cached = [
        some for r in in_rows(part, pieces.ROW) for some in r.split(pieces.COPY // pieces.ROW)
    ]
    return [some.abs().sum(1, dtype=dtype) for some in cached]


def _folded(values: Tensor, p: float) -> Tensor:
    """The norm of order 1 or 2 of wide values, by rows until one is left."""
    while len(values) > 1:
        values = torch.cat(_rows(values, p))
    return values[0]


def _exact(tensors: Sequence[Tensor], p: float) -> Tensor:
    """In blocks of the widest dtype."""
    device = tensors[0].device
    # No norm of order p <= 0 is a norm of norms: there a tensor is one block.
    empty = torch.full((), empty_norm(p), dtype=widest(device), device=device)
    norms = []
    for tensor in tensors:
        parts = blocks(tensor) if p > 0 else [tensor] * min(1, tensor.numel())
        found = [norm_of(converted(b, widest(b.device)).flatten(), p).to(empty) for b in parts]
        norms.append(norm_of(torch.stack(found), p) if len(found) > 1 else (found or [empty])[0])
    return torch.stack(norms)


def _norms_of_rows(rows: Tensor, p: float) -> Tensor:
    """Of wide values. No sum has more terms than are exact, or than one thread adds."""
    size = pieces.ROW if rows.dtype == torch.float32 else block_of(rows)
    while p > 0 and rows.size(1) > size:
        whole = rows.size(1) // size * size
        cuts = [rows[:, :whole].reshape(-1, size), rows[:, whole:]]
        found = [_norms_of_short_rows(c, p).view(len(rows), -1) for c in cuts if c.size(1)]
        rows = torch.cat(found, 1)
    return _norms_of_short_rows(rows, p)


def _norms_of_short_rows(rows: Tensor, p: float) -> Tensor:
    if p in (1, 2) or math.isinf(p) or p <= 0:
        norms = torch.linalg.vector_norm(rows, p, dim=1)
        if not (p == 2 and is_known(norms) and bool(norms.isinf().any())):
            return norms
    most = rows.abs().amax(1)
    unit = most.where((most > 0) & most.isfinite(), 1)
    return unit * torch.linalg.vector_norm(rows / unit[:, None], p, dim=1)
