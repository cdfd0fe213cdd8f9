"""Parts of norms: the numbers that ranks add up, and the collectives that add them.

All ranks of a step send one float64 vector of the same length and order:

    over a mesh           a part of each slot | a flag of each group | the numbers of failure.py
    over process groups   a part of each group | the numbers | whether a gradient is float64

Slots and groups are defined in `Reduction`. A flag is 0 unless its group's norm is infinite or NaN
on some rank; then the flag is, too.

To add an order of norms, add a case to `as_parts`, `add_parts`, `_reduce` and `as_norms`.
"""

import math

import torch
from torch import Tensor

from .._ops import is_host_readable, norm_of
from .._private import private
from . import groups
from .failure import NUMBERS
from .groups import Step

_traced_all_reduce = private("torch.distributed._functional_collectives.all_reduce")

# The version of the protocol: increase it whenever the numbers that ranks send change.
PROTOCOL = 2
# Norms of float32 gradients are from 2^-149 to 2^128. Up to this order their powers fit float64 and
# are added up; norms of higher orders are first divided by the largest.
MOST_ADDED = 6


def _adds(p: float) -> bool:
    return p <= MOST_ADDED


def as_parts(norms: Tensor, p: float) -> Tensor:
    """Return the parts of norms: their |p|-th powers if these fit float64, else the norms.

    For p < 0 the reciprocals are taken first: 1 / norm is the norm of order |p| of 1 / elements.
    """
    norms = norms.reciprocal() if p < 0 else norms
    return norms.pow(abs(p)) if p and _adds(abs(p)) else norms


def add_parts(parts: Tensor, p: float) -> Tensor:
    if p == 0:
        # The number of nonzero parts; NaN if one is NaN.
        return norm_of(parts, 0) + 0 * parts.sum()
    return parts.sum() if _adds(p) else norm_of(parts, p)


def as_norms(parts: Tensor, p: float) -> Tensor:
    norms = parts.pow(1 / abs(p)) if p and _adds(abs(p)) else parts
    return norms.reciprocal() if p < 0 else norms


def share_nonfinite(parts: Tensor, counts: list[int], beside: int) -> Tensor:
    """Make the flag of a group infinite or NaN if a part of its slots is.

    `counts` says how many slots each group has. The flags tell ranks that have other slots.
    """
    slots, flags, numbers = parts.split([parts.numel() - beside, len(counts), NUMBERS])
    if is_host_readable(parts) and math.isfinite(float(parts.sum())):
        return parts
    sums = torch.stack([some.sum() for some in slots.split(counts)]) + flags
    return torch.cat([slots, sums.where(~sums.isfinite(), 0), numbers])


def combine_slots(
    parts: Tensor, members: list[list[int]], beside: int, p: float
) -> tuple[Tensor, Tensor]:
    """Return the sum of each group's members, its flag among them; and the failure numbers."""
    last = min(beside, NUMBERS)
    slots, numbers = parts.split([parts.numel() - last, last])
    sums = [add_parts(_pick(slots, some), p) for some in members]
    return torch.stack(sums) if sums else slots, numbers


def _pick(parts: Tensor, members: list[int], sizes: list[int] | None = None) -> Tensor:
    """Return the parts of `members`; one 0 if there are none. No index is copied to the device."""
    if not members:
        return parts.new_zeros(1)
    first, end = members[0], members[-1] + 1
    if end - first == len(members):
        # They are consecutive.
        if sizes is not None:
            first, end = sum(sizes[:first]), sum(sizes[:end])
        return parts if end - first == parts.numel() else parts[first:end]
    each = parts.split(1 if sizes is None else sizes)
    return torch.cat([each[i] for i in members])


def all_reduce_members(
    step: Step, parts: Tensor, p: float, beside: int, sizes: list[int] | None = None
) -> Tensor:
    """Return `parts` with the members of a step summed over its ranks; may write to `parts`.

    Member i has `sizes[i]` parts. The last `beside` parts are flags and numbers, not norms.
    """
    reduced = _reduce(step, _pick(parts, step.members, sizes), p, beside)
    if reduced.numel() == parts.numel():
        return reduced
    each = list(parts.split(1 if sizes is None else sizes))
    present = reduced.split(1 if sizes is None else [sizes[i] for i in step.members])
    for i, some in zip(step.members, present, strict=True):
        each[i] = some
    return torch.cat(each)


def _reduce(step: Step, parts: Tensor, p: float, beside: int) -> Tensor:
    if _adds(p):
        return _all_reduce(step, parts, "SUM")
    most = _largest(step, parts)
    if math.isinf(p) or most.numel() == beside:
        return most
    norms, rest = most.split([most.numel() - beside, beside])
    # A division by the largest keeps the powers from overflowing.
    unit = norms.where((norms > 0) & norms.isfinite(), 1)
    powers = _all_reduce(step, (parts[: norms.numel()] / unit) ** p, "SUM")
    return torch.cat([(unit * powers ** (1 / p)).where(norms.isfinite(), norms), rest])


def _largest(step: Step, parts: Tensor) -> Tensor:
    """Return the largest of each part over ranks; NaN wins, which it may not in a MAX of floats.

    Viewed as integers, floats >= 0 keep their order, and NaN is the largest. The sign bit is
    cleared, because a NaN may have one.
    """
    whole = torch.int64 if parts.dtype == torch.float64 else torch.int32
    bits = parts.view(whole) & torch.iinfo(whole).max
    return _all_reduce(step, bits, "MAX").view(parts.dtype)


def _all_reduce(step: Step, values: Tensor, op: str) -> Tensor:
    if not torch.compiler.is_compiling():
        return groups.all_reduce(step, values, op)
    traced: Tensor = _traced_all_reduce(values, op.lower(), step.group)
    return traced
