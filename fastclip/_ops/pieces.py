"""Tensors cut into rows and blocks, or put together, to be measured and scaled."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._private import private

put_in_one = private("torch._utils._flatten_dense_tensors")

# Elements that are summed in float32, on the CPU. Their order is the same for any thread count.
ROW = 256
# Of tensors that are measured one by one, those for which one call is enough.
SHORT = 2 * ROW
# Elements of a copy that stays in the cache: halves as float32, or small tensors put together.
COPY = 1 << 21
# Tensors of fewer elements are put together, where that is less than a call for each.
SMALL = 1 << 13
HALVES = (torch.float16, torch.bfloat16)
# A block is converted to float64 to be measured exactly: 8 MB of it on a device. On the CPU torch
# divides a reduction of 32 Ki elements or more among its threads, and its bits depend on how many.
BLOCK = 1 << 20
CPU_BLOCK = 1 << 14


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most a block; of whole rows where memory has gaps."""
    flat = flat_of(tensor)
    if tensor.numel():
        yield from flat.split(max(1, block_of(tensor) * flat.size(0) // tensor.numel()))


def rows_of_block(tensor: Tensor) -> int:
    return max(1, block_of(tensor) * tensor.size(0) // max(1, tensor.numel()))


def block_of(tensor: Tensor) -> int:
    return CPU_BLOCK if tensor.device.type == "cpu" else BLOCK


def flat_of(tensor: Tensor) -> Tensor:
    """A view in the order of memory, 1-d unless that has gaps."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    dense = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return dense.view(-1) if dense.is_contiguous() else dense


def flat_parts(tensor: Tensor) -> list[Tensor]:
    """Its elements, 1-d without gaps: copies where it has them."""
    flat = flat_of(tensor)
    if flat.dim() == 1 and flat.is_contiguous():
        return [flat]
    return [block.flatten().contiguous() for block in blocks(tensor)]


def put_together(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """All elements, 1-d: views, or copies of small tensors one after another."""
    small: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for tensor in tensors:
        size, dtype = tensor.numel(), tensor.dtype
        if size >= SMALL:
            yield from flat_parts(tensor)
            continue
        small[dtype].append(tensor)
        sizes[dtype] += size
        if sizes[dtype] >= COPY:
            yield put_in_one(small.pop(dtype))
            sizes[dtype] = 0
    for some in small.values():
        yield put_in_one(some)


def room(tensors: Sequence[Tensor]) -> Tensor | None:
    """Memory for copies of half precision as float32: a line for each thread."""
    if not any(t.dtype in HALVES for t in tensors):
        return None
    threads = torch.get_num_threads()
    size = (COPY // (threads * ROW) + 1) * ROW
    return torch.empty(threads, size, dtype=torch.float32, device="cpu")


def in_floats(tensor: Tensor, copy: Tensor | None) -> Tensor:
    """As float32 or float64 without gaps: itself, or a copy."""
    if copy is None or tensor.dtype not in HALVES:
        return tensor.contiguous()
    return copy.view(-1)[: tensor.numel()].view(tensor.shape).copy_(tensor)


def in_float_rows(part: Tensor, copy: Tensor) -> Iterator[Tensor]:
    """1-d halves as rows of ROW float32, and the rest, in the same memory one after another.

    Each thread writes and reads a line of its own: what another has in its cache is far away.
    """
    for some in part.split(COPY):
        line = len(some) // (len(copy) * ROW) * ROW
        whole = line * len(copy)
        if line:
            lines = copy[:, :line].copy_(some[:whole].view(-1, line))
            yield lines.unflatten(1, (-1, ROW))
        if whole < len(some):
            yield from in_rows(in_floats(some[whole:], copy), ROW)


def in_rows(values: Tensor, size: int) -> list[Tensor]:
    """1-d values as rows of `size`, and the rest as one row."""
    rest = len(values) % size
    if not rest:
        return [values.reshape(-1, size)] if len(values) else []
    whole = len(values) - rest
    return [*in_rows(values[:whole], size), values[None, whole:]]
