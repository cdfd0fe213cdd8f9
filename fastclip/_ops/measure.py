"""Norms in plain PyTorch.

On the CPU as many elements are summed in float32 as a lane of a vector unit has few of, and all
above is float64. A device with float64 sums in that from the first element on; one without it has
float32 alone. Where a power may not fit, elements are measured relative to the largest.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from .transforms import converted, is_known, is_transformed

# Elements that are summed in float32, on the CPU. Their order is the same for any thread count.
ROW = 256
# Of tensors that are measured one by one, those for which one call is enough.
SHORT = 2 * ROW
# Elements of a copy that stays in the cache: halves as float32, or small tensors put together.
COPY = 1 << 20
# Tensors of fewer elements are put together, where that is less than a call for each.
SMALL = 1 << 13
HALVES = (torch.float16, torch.bfloat16)
# A norm as small may have lost squares that are no float32.
TINY = 1e-9
# A block is converted to float64 to be measured exactly: 8 MB of it on a device. On the CPU torch
# divides a reduction of 32 Ki elements or more among its threads, and its bits depend on how many.
BLOCK = 1 << 20
CPU_BLOCK = 1 << 14


@functools.cache
def _widest(device_type: str) -> torch.dtype:
    try:
        torch.zeros(1, dtype=torch.float64, device=device_type).add_(1)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def wide(device: torch.device) -> torch.dtype:
    """Float64, or float32 on a device that has none, which is asked once."""
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
    if tensor.numel() > _block(tensor) * len(tensor):
        return each(tensor.unbind(), p)
    rows = tensor.flatten(1)
    if not rows.numel():
        return torch.zeros(len(rows), dtype=wide(tensor.device), device=tensor.device)
    parts = rows.split(rows_of_block(rows))
    return torch.cat([_norms_of_rows(converted(part, wide(part.device)), p) for part in parts])


def empty_norm(p: float) -> float:
    """The norm of no elements: what adds nothing to that of others."""
    return math.inf if p < 0 else 0.0


def norm_of(values: Tensor, p: float) -> Tensor:
    """The p-norm of wide values, relative to their maximum where a power may overflow."""
    if p > 0 and len(values) > _block(values):
        values = torch.stack([norm_of(part, p) for part in values.split(_block(values))])
    return _norms_of_rows(values[None], p)[0]


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most a block; of whole rows where memory has gaps."""
    flat = _flat(tensor)
    if tensor.numel():
        yield from flat.split(max(1, _block(tensor) * flat.size(0) // tensor.numel()))


def rows_of_block(tensor: Tensor) -> int:
    return max(1, _block(tensor) * tensor.size(0) // max(1, tensor.numel()))


def _block(tensor: Tensor) -> int:
    return CPU_BLOCK if tensor.device.type == "cpu" else BLOCK


def _flat(tensor: Tensor) -> Tensor:
    """A view in the order of memory: 1-d, unless that has gaps."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    dense = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return dense.view(-1) if dense.is_contiguous() else dense


def _are_here(tensors: Sequence[Tensor]) -> bool:
    """Whether the host may look at all numbers."""
    return is_known(tensors[0]) and all(t.is_cpu for t in tensors)


def _each_here(tensors: Sequence[Tensor], p: float) -> Tensor:
    result = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    few: dict[torch.dtype, list[int]] = defaultdict(list)
    rows: dict[int, list[Tensor]] = {}
    for i, tensor in enumerate(tensors):
        size = tensor.numel()
        if size and (p == math.inf or size <= SHORT):
            few[tensor.dtype].append(i)
        elif size:
            parts = _flat_parts(tensor)
            parts = _floats(parts) if tensor.dtype in HALVES else parts
            rows[i] = [norm for part in parts for norm in _rows(part, p)]
    for dtype, index in few.items():
        # A maximum is exact in any dtype.
        sums = {1: torch.float64, 2: torch.promote_types(dtype, torch.float32)}.get(p)
        norms = torch._foreach_norm([tensors[i] for i in index], p, dtype=sums)
        result[index] = torch.stack(norms).double()
    if rows:
        sums = torch.cat([row for some in rows.values() for row in some]).double() ** p
        lengths = torch.tensor([sum(map(len, some)) for some in rows.values()], device="cpu")
        result[list(rows)] = torch.segment_reduce(sums, "sum", lengths=lengths) ** (1 / p)
    return result


def _on_devices(tensors: Sequence[Tensor], p: float) -> Tensor:
    """No wait, and no more calls of a device than torch makes."""
    device = tensors[0].device
    empty = torch.zeros((), dtype=wide(device), device=device)
    norms, places = [empty] * len(tensors), defaultdict(list)
    for i, tensor in enumerate(tensors):
        places[tensor.device].extend([i] * bool(tensor.numel()))
    for place, index in places.items():
        if index:
            found = torch._foreach_norm([tensors[i] for i in index], p, dtype=wide(place))
            for i, norm in zip(index, found, strict=True):
                norms[i] = norm.to(empty)
    return torch.stack(norms)


def _rows_of_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """2-norms of the rows of all together, in some order."""
    halves: list[Tensor] = []
    norms = [torch.zeros(1, device="cpu")]
    for part in _put_together(tensors):
        if part.dtype in HALVES:
            halves.append(part)
        else:
            norms += _rows(part, 2)
    return norms + [norm for part in _floats(halves) for norm in _rows(part, 2)]


def _put_together(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """All elements, 1-d: views, or copies of small tensors one after another."""
    small: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for tensor in tensors:
        size, dtype = tensor.numel(), tensor.dtype
        if size >= SMALL:
            yield from _flat_parts(tensor)
            continue
        small[dtype].append(tensor)
        sizes[dtype] += size
        if sizes[dtype] >= COPY:
            yield _flatten_dense_tensors(small.pop(dtype))
            sizes[dtype] = 0
    for some in small.values():
        yield _flatten_dense_tensors(some)


def _floats(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Half precision as float32, one after another in the same memory, until all are through."""
    copy: Tensor | None = None
    filled = 0
    for part in parts:
        copy = torch.empty(COPY, device="cpu") if copy is None else copy
        while len(part):
            some = part[: COPY - filled]
            copy[filled : filled + len(some)].copy_(some)
            part, filled = part[len(some) :], filled + len(some)
            if filled == COPY:
                yield copy
                filled = 0
    if filled:
        yield copy[:filled]


def _rows(part: Tensor, p: float) -> list[Tensor]:
    """Norms of rows of ROW elements, and of the rest."""
    whole = len(part) // ROW * ROW
    norms = []
    for rows in (part[:whole].view(-1, ROW), part[None, whole:]):
        if p == 2 and rows.numel():
            norms.append(torch.linalg.vector_norm(rows, 2, dim=1))
        elif rows.numel():
            norms += [some.abs().sum(1) for some in rows.split(COPY // ROW)]
    return norms


def _flat_parts(tensor: Tensor) -> list[Tensor]:
    flat = _flat(tensor)
    return [flat] if flat.dim() == 1 else [block.flatten() for block in blocks(tensor)]


def _folded(values: Tensor, p: float) -> Tensor:
    """The p-norm of wide values, by rows until one is left."""
    while len(values) > 1:
        whole = len(values) // ROW * ROW
        parts = values[:whole].view(-1, ROW), values[None, whole:]
        values = torch.cat([torch.linalg.vector_norm(r, p, dim=1) for r in parts if r.numel()])
    return values[0]


def _exact(tensors: Sequence[Tensor], p: float) -> Tensor:
    """In blocks of the widest dtype."""
    device = tensors[0].device
    # No norm of order p <= 0 is a norm of norms: there a tensor is one block.
    empty = torch.full((), empty_norm(p), dtype=wide(device), device=device)
    norms = []
    for tensor in tensors:
        parts = blocks(tensor) if p > 0 else [tensor] * min(1, tensor.numel())
        found = [norm_of(converted(b, wide(b.device)).flatten(), p).to(empty) for b in parts]
        norms.append(norm_of(torch.stack(found), p) if len(found) > 1 else (found or [empty])[0])
    return torch.stack(norms)


def _norms_of_rows(rows: Tensor, p: float) -> Tensor:
    if p in (1, 2) or math.isinf(p) or p <= 0:
        norms = torch.linalg.vector_norm(rows, p, dim=1)
        if not (p == 2 and is_known(norms) and bool(norms.isinf().any())):
            return norms
    most = rows.abs().amax(1)
    unit = most.where((most > 0) & most.isfinite(), 1)
    return unit * torch.linalg.vector_norm(rows / unit[:, None], p, dim=1)
