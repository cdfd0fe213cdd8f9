"""Every op in plain PyTorch: the default on any device, and what the kernels are tested against."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._private import private
from . import pieces
from .coef import clip_coef_in, means_zeros, one_number
from .measure import each, each_row, empty_norm, total
from .rows import norm_of, widest
from .transforms import converted, is_known, is_transformed

foreach_mul_ = private("torch._foreach_mul_")
foreach_zero_ = private("torch._foreach_zero_")
foreach_clamp_min_ = private("torch._foreach_clamp_min_")
foreach_clamp_max_ = private("torch._foreach_clamp_max_")
foreach_unscale_ = private("torch._amp_foreach_non_finite_check_and_unscale_")


def norm(tensors: Sequence[Tensor], p: float, wide: bool = False) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device="cpu")
    dtype = widest(tensors[0].device) if wide else result_dtype(tensors)
    if p < 0 and not any(t.numel() for t in tensors):
        return torch.zeros((), dtype=dtype, device=tensors[0].device)
    return converted(total(tensors, p), dtype)


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
        values = each_row(tensors, p)
    else:
        values = each(tensors, p)
    if group is not None:
        members: list[list[int]] = [[] for _ in range(max(group, default=-1) + 1)]
        for index, g in enumerate(group):
            members[g].append(index)
        # Picked without a copy of indices to the device.
        every, empty = values.unbind(), values.new_full((), empty_norm(p))
        found = [norm_of(torch.stack([every[i] for i in m]), p) if m else empty for m in members]
        values = torch.stack(found) if found else values
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
    slots = sum(sizes) if group is None else max(group) + 1
    if coef.dim() and (coef.dim() != 1 or coef.numel() < slots):
        raise ValueError(
            f"coef: expected a 0-d tensor or one value for each of {slots} groups, "
            f"got shape {list(coef.shape)}"
        )
    _note_writes(tensors)
    if not coef.dim():
        _scale(tensors, coef)
    elif rows:
        found = list(zip(tensors, coef[:slots].split(sizes), strict=True))
        vectors = [pair for pair in found if pair[0].dim() < 2]
        if vectors:
            some, coefs = zip(*vectors, strict=True)
            _scale_each(some, torch.cat(coefs), range(len(some)))
        for tensor, coefs in found:
            if tensor.dim() > 1:
                _scale_rows(tensor, coefs)
    else:
        _scale_each(tensors, coef, range(slots) if group is None else group)


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    _note_writes(tensors)
    for some in _alike(tensors):
        # torch refuses a bound that overflows the dtype.
        limit = float(torch.tensor(bound, dtype=torch.float64, device="cpu").to(some[0].dtype))
        # Two calls for all, but for long tensors of the CPU, which two would read twice.
        apart = is_transformed()
        for tensor in [t for t in some if apart or (t.is_cpu and t.numel() >= pieces.SMALL)]:
            tensor.clamp_(-limit, limit)
        if short := [t for t in some if not apart and (not t.is_cpu or t.numel() < pieces.SMALL)]:
            foreach_clamp_min_(short, -limit)
            foreach_clamp_max_(short, limit)


def clip_norm_(
    tensors: Sequence[Tensor],
    max_norm: float | Tensor,
    p: float,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    max_norm = one_number(max_norm)
    total_norm, dtype = norm(tensors if norms is None else norms, p, True), result_dtype(tensors)
    if not tensors:
        return total_norm.to(dtype)
    device = tensors[0].device
    total_norm = total_norm.to(device, widest(device))
    _note_writes(tensors)
    _scale(tensors, clip_coef_in(dtype, total_norm, max_norm), False)
    return total_norm.to(dtype)


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


def _note_writes(tensors: Sequence[Tensor]) -> None:
    """Before any is written: torch finds out while it writes."""
    if not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, tensors)):
        raise RuntimeError(
            "a tensor made in inference mode cannot be changed in place outside of it; clone it"
        )
    if tensors:
        torch.autograd.graph.increment_version(tensors)


def _alike(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Lists of one dtype and device each."""
    if len({t.dtype for t in tensors}) == len({t.device for t in tensors}) == 1:
        return [list(tensors)]
    found = defaultdict(list)
    for tensor in tensors:
        found[tensor.dtype, tensor.device].append(tensor)
    return found.values()


def _scale(tensors: Sequence[Tensor], coef: Tensor, may_zero: bool = True) -> None:
    """By one coefficient, of the precision of each tensor, float32 for halves."""
    # A device multiplies by 1 rather than wait.
    if is_known(coef):
        if bool(coef == 1):
            return
        if may_zero and bool(means_zeros(coef)):
            foreach_zero_(tensors)
            return
    may_zero = may_zero and not is_known(coef)
    # The last ones to be measured are in the cache yet.
    for some in _alike(tensors[::-1]):
        here, wide = some[0].device, _wide(some[0])
        value = coef.to(here, wide)
        if is_transformed():
            for tensor in some:
                _multiply(tensor, value)
                tensor.masked_fill_(means_zeros(value) & may_zero, 0)
        elif some[0].dtype == wide or here.type == "cpu":
            # On the CPU a product with a 0-d float32 is taken in float32, also of halves.
            foreach_mul_(some, value)
        else:
            _scale_halves(some, value)
        if may_zero and not is_transformed():
            _zero_unless_kept(some, value)


def _zero_unless_kept(tensors: Sequence[Tensor], coef: Tensor) -> None:
    """Zeros where `coef` is -0.0: bits times 0, since a NaN times 0 is NaN."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    own, theirs = whole[coef.element_size()], whole[tensors[0].element_size()]
    # The bits of -0.0 are those of the least whole number.
    is_kept = coef.reshape(1).view(own) != torch.iinfo(own).min
    foreach_mul_([t.view(theirs) for t in tensors], is_kept.to(theirs)[0])


def _scale_each(tensors: Sequence[Tensor], coef: Tensor, slots: Sequence[int]) -> None:
    """Each by the coefficient of its slot."""
    if not is_known(coef) or not all(t.is_cpu for t in tensors):
        members = defaultdict(list)
        for tensor, slot in zip(tensors, slots, strict=True):
            members[slot].append(tensor)
        every = coef.unbind()
        for slot, some in members.items():
            _scale(some, every[slot])
        return
    numbers, zeros = coef.tolist(), means_zeros(coef).tolist()
    changed = [(t, slot) for t, slot in zip(tensors, slots, strict=True) if numbers[slot] != 1]
    alike = {t.dtype: t for t, _ in changed}
    values = {dtype: coef.to(_wide(t)).unbind() for dtype, t in alike.items()}
    if changed:
        foreach_mul_([t for t, _ in changed], [values[t.dtype][i] for t, i in changed])
    for tensor, slot in changed:
        if zeros[slot]:
            tensor.zero_()


def _scale_halves(tensors: list[Tensor], coef: Tensor) -> None:
    """By a float32, in one call where a device has one."""
    try:
        overflow = torch.zeros_like(coef).reshape(1)
        foreach_unscale_(tensors, overflow, coef)
    except NotImplementedError:
        for tensor in tensors:
            tensor.mul_(coef.reshape([1] * tensor.dim()))


def _scale_rows(tensor: Tensor, coefs: Tensor) -> None:
    """Each slice along the first dimension by its own coefficient."""
    if is_known(coefs) and bool((coefs == 1).all()):
        return
    coefs = coefs.to(tensor.device, _wide(tensor)).view(-1, *[1] * (tensor.dim() - 1))
    size = len(tensor)
    if tensor.dtype != coefs.dtype:
        # The copies stay in the cache.
        size = max(1, pieces.COPY * size // max(1, tensor.numel()))
    for start in range(0, len(tensor), max(1, size)):
        _multiply(tensor[start : start + size], coefs[start : start + size])
    zeros = means_zeros(coefs)
    if not is_known(coefs) or bool(zeros.any()):
        tensor.masked_fill_(zeros, 0)


def _multiply(tensor: Tensor, coef: Tensor) -> None:
    """Rounded once, in a dtype that `coef` has and `tensor` may not."""
    if tensor.dtype == coef.dtype:
        tensor.mul_(coef)
    else:
        tensor.copy_(tensor.to(coef.dtype) * coef)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
