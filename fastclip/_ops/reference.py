"""Every op in plain PyTorch: the default on any device, and what the kernels are tested against.

Exact at any size: tensors are measured in blocks, and everything above a block is float64.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .coef import clip_coef, means_zeros
from .transforms import converted, is_known, is_transformed

# A block is converted to float64 to be measured: 8 MB of it on a device. On the CPU torch divides
# a reduction of 32 Ki elements or more among its threads, and its bits depend on how many.
BLOCK = 1 << 20
CPU_BLOCK = 1 << 14


def norm(tensors: Sequence[Tensor], p: float, wide: bool = False) -> Tensor:
    dtype = torch.float64 if wide else result_dtype(tensors)
    if not tensors:
        return torch.zeros((), dtype=dtype, device="cpu")
    if p < 0 and not any(t.numel() for t in tensors):
        return torch.zeros((), dtype=dtype, device=tensors[0].device)
    return converted(norm_of(_tensor_norms(tensors, p), p), dtype)


def norms(
    tensors: Sequence[Tensor],
    p: float,
    group: Sequence[int] | None = None,
    wide: bool = False,
    rows: bool = False,
) -> Tensor:
    check_groups(len(tensors), group, rows)
    if not tensors:
        values = torch.zeros(0, dtype=torch.float64, device="cpu")
    elif rows:
        values = torch.cat([_row_norms(t, p).to(tensors[0].device) for t in tensors])
    else:
        values = _tensor_norms(tensors, p)
    if group is not None:
        members: list[list[int]] = [[] for _ in range(max(group, default=-1) + 1)]
        for index, g in enumerate(group):
            members[g].append(index)
        # Picked without a copy of indices to the device.
        every, empty = values.unbind(), values.new_full((), empty_norm(p))
        each = [norm_of(torch.stack([every[i] for i in m]), p) if m else empty for m in members]
        values = torch.stack(each) if each else values
    return values if wide else values.to(result_dtype(tensors))


def scale_(
    tensors: Sequence[Tensor],
    coef: Tensor,
    group: Sequence[int] | None = None,
    rows: bool = False,
) -> None:
    check_groups(len(tensors), group, rows)
    if not tensors:
        return
    sizes = [count_rows(t) if rows else 1 for t in tensors]
    coefs: Sequence[Tensor] = [coef] * len(tensors)
    if coef.dim():
        slots = sum(sizes) if group is None else max(group) + 1
        if coef.dim() != 1 or coef.numel() < slots:
            raise ValueError(
                f"coef: expected a 0-d tensor or one value for each of {slots} groups, "
                f"got shape {list(coef.shape)}"
            )
        coefs = coef[: sum(sizes)].split(sizes) if group is None else [coef[g] for g in group]
    torch.autograd.graph.increment_version(tensors)
    for tensor, value in zip(tensors, coefs, strict=True):
        # A device multiplies by 1 rather than wait.
        if is_known(value) and bool((value == 1).all()):
            continue
        per_row = value.numel() != 1
        value = value.view(-1, *[1] * (tensor.dim() - 1)) if per_row else value.reshape(())
        _multiply_(tensor, value.to(tensor.device))


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    if tensors:
        torch.autograd.graph.increment_version(tensors)
    for tensor in tensors:
        # torch refuses a bound that overflows the dtype.
        limit = float(torch.tensor(bound, dtype=torch.float64, device="cpu").to(tensor.dtype))
        tensor.clamp_(-limit, limit)


def clip_norm_(
    tensors: Sequence[Tensor],
    max_norm: float | Tensor,
    p: float,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    if isinstance(max_norm, Tensor) and max_norm.numel() != 1:
        raise ValueError(f"max_norm: expected a 0-d tensor, got shape {list(max_norm.shape)}")
    measured = tensors if norms is None else norms
    total_norm, dtype = norm(measured, p, True), result_dtype(tensors)
    if tensors:
        total_norm = total_norm.to(tensors[0].device)
    scale_(tensors, clip_coef(total_norm, max_norm, dtype == torch.float64))
    return total_norm.to(dtype)


def record_(rows: Tensor, steps: Tensor, row: Tensor) -> None:
    """Write `row` into the ring `rows`, of `steps` rows so far, and count it."""
    rows.index_copy_(0, steps.remainder(len(rows)), row.to(rows).view(1, -1))
    steps.add_(1)


def result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    wide = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return torch.float64 if wide else torch.float32


def count_rows(tensor: Tensor) -> int:
    """Slices along the first dimension of two or more; else the tensor is one."""
    return tensor.size(0) if tensor.dim() > 1 else 1


def check_groups(count: int, group: Sequence[int] | None, rows: bool) -> None:
    if group is None:
        return
    if rows:
        raise ValueError("group: expected none with rows=True, a row is its own")
    if len(group) != count:
        raise ValueError(f"group: expected one index per tensor, {count}, got {len(group)}")
    if min(group, default=0) < 0:
        raise ValueError(f"group: expected indices from 0, got {min(group)}")


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most a block; of whole rows where memory has gaps."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.permute(order)
    if dense.is_contiguous():
        dense = dense.view(-1)
    if tensor.numel():
        yield from dense.split(max(1, _block(tensor) * dense.size(0) // tensor.numel()))


def _block(tensor: Tensor) -> int:
    return CPU_BLOCK if tensor.device.type == "cpu" else BLOCK


def _tensor_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """The norm of each tensor in float64, 1-d, on the first tensor's device."""
    device = tensors[0].device
    # No norm of order p <= 0 is a norm of norms: there a tensor is one block.
    blocks = [list(_blocks(t)) if p > 0 else [t] * min(1, t.numel()) for t in tensors]
    norms = iter(_block_norms([b for of_tensor in blocks for b in of_tensor], p))
    empty = torch.full((), empty_norm(p), dtype=torch.float64, device=device)
    rows = []
    for of_tensor in blocks:
        row = [next(norms).to(device) for _ in of_tensor] or [empty]
        rows.append(norm_of(torch.stack(row), p) if len(row) > 1 else row[0])
    return torch.stack(rows)


def empty_norm(p: float) -> float:
    """The norm of no elements: what adds nothing to that of others."""
    return math.inf if p < 0 else 0.0


def _block_norms(blocks: list[Tensor], p: float) -> list[Tensor]:
    if is_transformed():
        return [norm_of(converted(b, torch.float64).flatten(), p) for b in blocks]
    if not (p in (1, 2) or math.isinf(p) or p <= 0):
        return [norm_of(b.abs().to(torch.float64).flatten(), p) for b in blocks]
    norms = torch._foreach_norm(blocks, p, dtype=torch.float64) if blocks else ()
    return [
        norm_of(b.flatten(), p) if b.dtype == torch.float64 and _overflowed(norm, p) else norm
        for b, norm in zip(blocks, norms, strict=True)
    ]


def _overflowed(norms: Tensor, p: float) -> bool:
    """Whether squares of float64 may have; asked where that does not wait for a device."""
    return p == 2 and is_known(norms) and bool(norms.isinf().any())


def norm_of(values: Tensor, p: float) -> Tensor:
    """The p-norm of float64 values, relative to their maximum where a power may overflow."""
    if p > 0 and len(values) > _block(values):
        values = torch.stack([norm_of(part, p) for part in values.split(_block(values))])
    return _norms_of_rows(values[None], p)[0]


def _multiply_(tensor: Tensor, coef: Tensor) -> None:
    """By one coefficient, or one for each row, of the tensor's dimension."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        tensor.mul_(coef.to(wide))
    elif coef.dim():
        size = _rows_of_block(tensor)
        for rows, coefs in zip(tensor.split(size), coef.split(size), strict=True):
            rows.copy_(rows.float() * coefs.to(wide))
    else:
        for block in _blocks(tensor):
            block.copy_(block.float() * coef.to(wide))
    zeros = means_zeros(coef)
    if not is_known(coef) or bool(zeros.any()):
        tensor.masked_fill_(zeros, 0)


def _rows_of_block(tensor: Tensor) -> int:
    return max(1, _block(tensor) * tensor.size(0) // max(1, tensor.numel()))


def _row_norms(tensor: Tensor, p: float) -> Tensor:
    if tensor.dim() < 2:
        return _tensor_norms([tensor], p)
    if tensor.numel() > _block(tensor) * len(tensor):
        return _tensor_norms(tensor.unbind(), p)
    rows = tensor.flatten(1)
    if not rows.numel():
        return torch.zeros(len(rows), dtype=torch.float64, device=tensor.device)
    each = [
        _norms_of_rows(converted(some, torch.float64), p)
        for some in rows.split(_rows_of_block(rows))
    ]
    return torch.cat(each)


def _norms_of_rows(rows: Tensor, p: float) -> Tensor:
    if p in (1, 2) or math.isinf(p) or p <= 0:
        norms = torch.linalg.vector_norm(rows, p, dim=1)
        if not _overflowed(norms, p):
            return norms
    most = rows.abs().amax(1)
    unit = most.where((most > 0) & most.isfinite(), 1)
    return unit * torch.linalg.vector_norm(rows / unit[:, None], p, dim=1)
