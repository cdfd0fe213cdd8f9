"""Norms in plain PyTorch.

On the CPU as many elements are summed in float32 as a lane of a vector unit has few of, and all
above is float64. A device with float64 sums in that from the first element on; one without it has
float32 alone. Where a power may not fit, elements are measured relative to the largest.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .._private import private
from . import pieces
from .pieces import (
    block_of,
    blocks,
    flat_parts,
    in_floats,
    put_together,
    room,
    rows_of_block,
)
from .rows import norm_of, norms_in_rows, norms_of_rows, norms_of_segments, widest
from .transforms import converted, is_known, is_transformed

foreach_norm = private("torch._foreach_norm")

# A norm as small may have lost squares that are no float32.
TINY = 1e-9


def total(tensors: Sequence[Tensor], p: float) -> Tensor:
    """The norm of one or more tensors as one vector, 0-d, on the first tensor's device."""
    if p == 2 and _are_here(tensors):
        norm = norm_of(torch.cat(_rows_of_all(tensors)).double(), p)
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
    if p == math.inf:
        return _largest(tensors)
    return _found_again(_each_here(tensors, p), tensors, p)


def each_row(tensors: Sequence[Tensor], p: float) -> Tensor:
    """The norm of each slice along the first dimension of two or more, 1-d; else of the tensor."""
    device = tensors[0].device
    vectors = [t for t in tensors if t.dim() < 2]
    found = iter(each(vectors, p).split(1) if vectors else ())
    copy = room(tensors) if _are_here(tensors) else None
    norms = [next(found) if t.dim() < 2 else _each_slice(t, p, copy) for t in tensors]
    return torch.cat([n.to(device, widest(device)) for n in norms])


def empty_norm(p: float) -> float:
    """The norm of no elements: what adds nothing to that of others."""
    return math.inf if p < 0 else 0.0


def _are_here(tensors: Sequence[Tensor]) -> bool:
    """Whether the host may look at all numbers."""
    return is_known(tensors[0]) and all(t.is_cpu for t in tensors)


def _found_again(norms: Tensor, tensors: Sequence[Tensor] | Tensor, p: float) -> Tensor:
    # Beyond float32 may be what is summed, and below it what is squared.
    lost = (norms.isinf() | (norms < TINY * (p == 2))).nonzero().flatten()
    if len(lost):
        norms[lost] = _exact([tensors[i] for i in lost.tolist()], p)
    return norms


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    norms = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    full = [i for i, t in enumerate(tensors) if t.numel()]
    if full:
        most = foreach_norm([tensors[i] for i in full], math.inf)
        norms[full] = torch.stack(most).double()
    return norms


def _each_here(tensors: Sequence[Tensor], p: float) -> Tensor:
    short: list[int] = []
    long: list[int] = []
    for i, tensor in enumerate(tensors):
        (short if tensor.numel() <= pieces.SHORT else long).append(i)
    found = []
    at_once = max(1, pieces.COPY // pieces.SHORT)
    for i in range(0, len(short), at_once):
        some = [tensors[j] for j in short[i : i + at_once]]
        found.append(norms_of_segments(pieces.put_in_one(some), [*map(Tensor.numel, some)], p))
    if long:
        copy = room([tensors[i] for i in long])
        rows = [_rows_of_one(tensors[i], p, copy) for i in long]
        lengths = [sum(map(len, some)) for some in rows]
        found.append(norms_of_segments(torch.cat([r for some in rows for r in some]), lengths, p))
    norms = torch.empty(len(tensors), dtype=torch.float64, device="cpu")
    norms[short + long] = torch.cat(found)
    return norms


def _rows_of_one(tensor: Tensor, p: float, copy: Tensor | None) -> list[Tensor]:
    return [norm for part in flat_parts(tensor) for norm in norms_in_rows(part, p, copy)]


def _each_slice(tensor: Tensor, p: float, copy: Tensor | None) -> Tensor:
    if tensor.numel() > block_of(tensor) * len(tensor):
        return each(tensor.unbind(), p)
    rows, wide = tensor.flatten(1), widest(tensor.device)
    if not rows.numel():
        return torch.full((len(rows),), empty_norm(p), dtype=wide, device=tensor.device)
    if not _are_here([tensor]) or p not in (1, 2):
        parts = rows.split(rows_of_block(rows))
        return torch.cat([norms_of_rows(converted(part, wide), p) for part in parts])
    found = [
        norms_of_rows(in_floats(part, copy), p)
        for part in rows.split(max(1, pieces.COPY // rows.size(1)))
    ]
    return _found_again(torch.cat(found).double(), rows, p)


def _on_devices(tensors: Sequence[Tensor], p: float) -> Tensor:
    """No wait, and no more calls of a device than torch makes."""
    device, places = tensors[0].device, defaultdict(list)
    for i, tensor in enumerate(tensors):
        places[tensor.device].extend([i] * bool(tensor.numel()))
    norms: dict[int, Tensor] = {}
    for place, index in places.items():
        if index:
            found = _measured([tensors[i] for i in index], p, widest(place))
            norms |= zip(index, (norm.to(device, widest(device)) for norm in found), strict=True)
    if len(norms) < len(tensors):
        empty = torch.zeros((), dtype=widest(device), device=device)
        norms = {i: norms.get(i, empty) for i in range(len(tensors))}
    return torch.stack([norms[i] for i in range(len(tensors))])


def _measured(tensors: list[Tensor], p: float, dtype: torch.dtype) -> Sequence[Tensor]:
    if dtype == torch.float64 or p == math.inf:
        found: Sequence[Tensor] = foreach_norm(tensors, p, dtype=dtype)
        return found
    # In float32 in two steps, so that no sum has many terms.
    long = {i: t for i, t in enumerate(tensors) if t.numel() > pieces.SMALL}
    # Over gaps a device may add one after another.
    short = [t.contiguous() for i, t in enumerate(tensors) if i not in long]
    norms = iter(foreach_norm(short, p, dtype=dtype) if short else ())
    return [_in_steps(long[i], p) if i in long else next(norms) for i in range(len(tensors))]


def _in_steps(tensor: Tensor, p: float) -> Tensor:
    rows = [row for part in flat_parts(tensor) for row in norms_in_rows(part, p)]
    return norm_of(torch.cat(rows), p)


def _rows_of_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """2-norms of the rows of all together, in some order."""
    norms, copy = [torch.zeros(1, dtype=torch.float32, device="cpu")], room(tensors)
    for part in put_together(tensors):
        norms += norms_in_rows(part, 2, copy)
    return norms


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
