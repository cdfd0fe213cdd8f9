"""The ops in plain PyTorch: defaults on any device, and the reference in tests of kernels."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._private import private
from .coef import clip_coef_in, means_zeros, one_number
from .measure import BLOCK, each, each_row, empty_norm, norm_of, widest
from .transforms import is_host_readable, is_transformed

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
    return norm_of(each(tensors, p), p).to(dtype)


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
        # Python does the indexing, so no indices are copied to the device.
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
    groups = sum(sizes) if group is None else max(group) + 1
    if coef.dim() and (coef.dim() != 1 or coef.numel() < groups):
        raise ValueError(
            f"coef: expected a 0-d tensor or one value for each of {groups} groups, "
            f"got shape {list(coef.shape)}"
        )
    _note_writes(tensors)
    if not coef.dim():
        _scale(tensors, coef)
    elif rows:
        for tensor, coefs in zip(tensors, coef[:groups].split(sizes), strict=True):
            _scale_rows(tensor if tensor.dim() > 1 else tensor[None], coefs)
    else:
        members = defaultdict(list)
        for tensor, g in zip(tensors, range(groups) if group is None else group, strict=True):
            members[g].append(tensor)
        every = coef.unbind()
        for g, some in members.items():
            _scale(some, every[g])


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    _note_writes(tensors)
    for some in _by_dtype_and_device(tensors):
        # torch refuses a bound that overflows the dtype.
        limit = float(torch.tensor(bound, dtype=torch.float64, device="cpu").to(some[0].dtype))
        if some[0].is_cpu or is_transformed():
            for tensor in some:
                tensor.clamp_(-limit, limit)
        else:
            foreach_clamp_min_(some, -limit)
            foreach_clamp_max_(some, limit)


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
    dtypes = {t.dtype for t in tensors}
    return torch.float64 if dtypes & {torch.float64, torch.complex128} else torch.float32


def count_rows(tensor: Tensor) -> int:
    """Return the number of slices along dimension 0; 1 for a tensor of fewer than 2 dimensions."""
    return tensor.size(0) if tensor.dim() > 1 else 1


def check_groups(count: int, group: Sequence[int] | None, rows: bool) -> None:
    if group is None:
        return
    if rows:
        raise ValueError("group: expected None with rows=True, where each row is a group")
    if len(group) != count:
        raise ValueError(f"group: expected one index per tensor, {count}, got {len(group)}")
    if min(group, default=0) < 0:
        raise ValueError(f"group: expected indices from 0, got {min(group)}")


def _note_writes(tensors: Sequence[Tensor]) -> None:
    """Bump every version counter. If any tensor is not writable, raise before writing at all;
    torch would write some first."""
    if not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, tensors)):
        raise RuntimeError(
            "a tensor made in inference mode cannot be changed in place outside of it; clone it"
        )
    if tensors:
        torch.autograd.graph.increment_version(tensors)


def _by_dtype_and_device(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Return lists of tensors of the same dtype and device."""
    found = defaultdict(list)
    for tensor in tensors:
        found[tensor.dtype, tensor.device].append(tensor)
    return found.values()


def _scale(tensors: Sequence[Tensor], coef: Tensor, may_zero: bool = True) -> None:
    """Multiply by one coefficient, in the precision of each tensor but at least float32."""
    # A coefficient on a device is not read: to multiply by 1 is better than to wait for it.
    if is_host_readable(coef):
        if bool(coef == 1):
            return
        if may_zero and bool(means_zeros(coef)):
            foreach_zero_(tensors)
            return
        may_zero = False
    # In reverse: the tensors that were measured last are still in the cache.
    for some in _by_dtype_and_device(tensors[::-1]):
        value = coef.to(some[0].device, _wide(some[0]))
        _multiply(some, value)
        if may_zero and is_transformed():
            for tensor in some:
                tensor.masked_fill_(means_zeros(value), 0)
        elif may_zero:
            _zero_unless_kept(some, value)


def _multiply(tensors: list[Tensor], coef: Tensor) -> None:
    """Multiply tensors of one dtype by a float32 or float64, and round each product once."""
    # On the CPU a product with a 0-d float32 is computed in float32, also for half precision.
    if not is_transformed() and (tensors[0].dtype == coef.dtype or tensors[0].is_cpu):
        foreach_mul_(tensors, coef)
        return
    try:
        if is_transformed():
            raise NotImplementedError
        # On a GPU this is one launch for all tensors of half precision.
        foreach_unscale_(tensors, torch.zeros_like(coef).reshape(1), coef)
    except NotImplementedError:
        for tensor in tensors:
            # With as many dimensions as the tensor, the coefficient decides the product's dtype.
            tensor.mul_(coef.reshape([1] * tensor.dim()))


def _zero_unless_kept(tensors: Sequence[Tensor], coef: Tensor) -> None:
    """Write zeros if `coef` is -0.0 (Note [coef]): as integers, since 0 * NaN would stay NaN."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    own, theirs = whole[coef.element_size()], whole[tensors[0].element_size()]
    # The bits of -0.0 are those of the least integer.
    is_kept = coef.reshape(1).view(own) != torch.iinfo(own).min
    foreach_mul_([t.view(theirs) for t in tensors], is_kept.to(theirs)[0])


def _scale_rows(tensor: Tensor, coefs: Tensor) -> None:
    """Multiply each slice along the first dimension by its own coefficient."""
    if is_host_readable(coefs) and bool((coefs == 1).all()):
        return
    coefs = coefs.to(tensor.device, _wide(tensor)).view(-1, *[1] * (tensor.dim() - 1))
    # A few rows at once: on the CPU torch copies a half-precision tensor to float32 first.
    count = max(1, BLOCK * len(tensor) // max(1, tensor.numel()))
    for i in range(0, len(tensor), count):
        tensor[i : i + count].mul_(coefs[i : i + count])
    zeros = means_zeros(coefs)
    if not is_host_readable(coefs) or bool(zeros.any()):
        tensor.masked_fill_(zeros, 0)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
