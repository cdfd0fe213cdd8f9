"""Parts of norms: what is added up, over slots and over ranks, to make norms of.

Float64, several packed in one vector, which every rank of a step sends in one length and order:

    over meshes     a part of each slot | a flag of each label | the numbers of failure.py
    beyond          a part of each label | the numbers | whether a gradient is float64

A flag is 0, or infinite or NaN if the label's norm is so on a rank.

Where there is one label, a step over a mesh that cuts only one slot sends the part of that alone,
because gloo takes twice as long for a second number. On the CPU that part has values for what would
stand beside it: see `_MOST`.

A new order of norms is a case of `as_parts`, `added`, `_reduced` (its collectives) and `as_norm`.
"""

import math

import torch
from torch import Tensor

from .._ops import is_known, norm_of
from .._private import private
from . import groups
from .failure import NUMBERS, mark_of, marked
from .groups import Step

_traced_all_reduce = private("torch.distributed._functional_collectives.all_reduce")

# The number of the protocol: another one whenever what ranks send each other changes.
PROTOCOL = 1
# Up to this order the power of a norm of float32 gradients, from 2^-149 to 2^128, fits float64, and
# powers are added up. Norms of higher orders are put together relative to the largest.
MOST_ADDED = 6
# Where the host can read a part that is sent alone, NaN says that a rank has failed, and what is
# infinite or NaN is sent as one of these. Finite parts end at the first; sums of 2^16 lie apart.
_MOST, _INFINITE, _NAN = 2.0**970, -(2.0**988), -(2.0**1007)


def _adds(p: float) -> bool:
    return p <= MOST_ADDED


def as_parts(norms: Tensor, p: float) -> Tensor:
    """What is added up instead of norms, as for an order of |p|: their powers, if they fit.

    A norm of a negative order is one over the norm of what is one over each element.
    """
    norms = norms.reciprocal() if p < 0 else norms
    return norms ** abs(p) if p and _adds(abs(p)) else norms


def added(parts: Tensor, p: float) -> Tensor:
    if p == 0:
        # How many are not 0, but NaN if one is.
        return norm_of(parts, 0) + 0 * parts.sum()
    return parts.sum() if _adds(p) else norm_of(parts, p)


def as_norm(parts: Tensor, p: float) -> Tensor:
    norms = parts ** (1 / abs(p)) if p and _adds(abs(p)) else parts
    return norms.reciprocal() if p < 0 else norms


def spoiled(parts: Tensor, counts: list[int], beside: int) -> Tensor:
    """The parts, `counts` slots of each label: if one of a label is not finite, no other is.

    Nor is its flag, which tells it to ranks that have other slots.
    """
    slots, flags, numbers = parts.split([len(parts) - beside, len(counts), NUMBERS])
    if is_known(parts) and math.isfinite(float(parts.sum())):
        return parts
    sums = torch.stack([some.sum() for some in slots.split(counts)]) + flags
    bad = sums.masked_fill(sums.isfinite(), 0)
    each = zip(slots.split(counts), bad.unbind(), strict=True)
    return torch.cat([*(some + one for some, one in each), flags + bad, numbers])


def combined(
    parts: Tensor, members: list[list[int]], beside: int, p: float
) -> tuple[Tensor, Tensor]:
    """Of each label its members added up, of which its flag is one; and the numbers."""
    numbers = parts[len(parts) - min(beside, NUMBERS) :]
    slots = parts[: len(parts) - len(numbers)]
    each = [added(pick(slots, some), p).reshape(1) for some in members]
    return each[0] if len(each) == 1 else torch.cat(each), numbers


def pick(parts: Tensor, members: list[int], sizes: list[int] | None = None) -> Tensor:
    """Those parts, or a zero for none, picked without a copy of indices to the device."""
    if not members:
        return parts.new_zeros(1)
    first, end = members[0], members[-1] + 1
    if end - first == len(members):
        # They lie together.
        if sizes is not None:
            first, end = sum(sizes[:first]), sum(sizes[:end])
        return parts[first:end]
    each = parts.split(1 if sizes is None else sizes)
    return torch.cat([each[i] for i in members])


def over_mesh(step: Step, parts: Tensor, p: float, beside: int, sizes: list[int] | None) -> Tensor:
    """As `over`, for a step over a mesh, which may send one part alone."""
    if sizes is None and beside <= 1 + NUMBERS and len(step.members) == 1 + beside:
        return _over_alone(step, parts, p)
    return over(step, parts, p, beside, sizes)


def over(
    step: Step, parts: Tensor, p: float, beside: int, sizes: list[int] | None = None
) -> Tensor:
    """The parts, which may be written, the members of the step added up over its ranks.

    `sizes`: parts to a member. The last `beside` of them are no norms.
    """
    picked = pick(parts, step.members, sizes)
    reduced = _reduced(step, picked, p, beside)
    if reduced is picked and _share_memory(picked, parts):
        return parts
    if len(reduced) == len(parts):
        return reduced
    each = list(parts.split(1 if sizes is None else sizes))
    present = reduced.split(1 if sizes is None else [sizes[i] for i in step.members])
    for i, some in zip(step.members, present, strict=True):
        each[i] = some
    return torch.cat(each)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def over_line(line: list[Step], part: Tensor, value: float | None) -> tuple[Tensor, float | None]:
    """A part that each step sends alone, of order 1 or 2, added up; and its value, if known."""
    if value is None and is_known(part):
        value = float(part)
    if value is not None and math.isnan(value):
        part = torch.full_like(part, math.nan)
    for step in line:
        if value is not None and value <= _MOST:
            part = groups.all_reduce(step, part, "SUM")
            value = float(part)
            if value >= 0:
                continue
            part = _decoded(part)
        else:
            part = _reduced_alone(step, part, 2)
        value = None if value is None else float(part)
    return part, value


def _over_alone(step: Step, parts: Tensor, p: float) -> Tensor:
    at = step.members[0]
    one, numbers = parts[at : at + 1], parts[-NUMBERS:]
    can_read = not torch.compiler.is_compiling() and is_known(parts)
    failures, marks = numbers.tolist() if can_read else (0, 0)
    if failures:
        one = marked(int(marks / failures))
    elif can_read and mark_of(one):
        # A NaN of a gradient may have bits of its own.
        one = torch.full_like(one, math.nan)
    reduced = _reduced_alone(step, one, p)
    if reduced is one and not failures and can_read:
        # In place, and no failure: that would be another tensor.
        return parts
    if can_read and not failures and (mark := mark_of(reduced)):
        numbers = torch.tensor([1, mark], dtype=parts.dtype, device="cpu")
    return torch.cat([parts[:at], reduced, parts[at + 1 : -NUMBERS], numbers])


def _reduced_alone(step: Step, part: Tensor, p: float) -> Tensor:
    """A failure is a NaN with a mark, in the sum as in the largest of all."""
    if not _adds(p):
        return _reduced(step, part, p, 0)
    if torch.compiler.is_compiling() or not is_known(part):
        return _decoded(_all_reduce(step, part, "SUM"))
    value = float(part)
    if not (value <= _MOST or mark_of(part)):
        part = torch.full_like(part, _NAN if math.isnan(value) else _INFINITE)
    part = _all_reduce(step, part, "SUM")
    return part if float(part) >= 0 else _decoded(part)


def _decoded(part: Tensor) -> Tensor:
    return part.where(~(part < _INFINITE / 2), math.inf).where(~(part < _NAN / 2), math.nan)


def _reduced(step: Step, parts: Tensor, p: float, beside: int) -> Tensor:
    if _adds(p):
        return _all_reduce(step, parts, "SUM")
    most = _largest(step, parts)
    if math.isinf(p) or len(most) == beside:
        return most
    norms, rest = most.split([len(most) - beside, beside])
    # Relative to the largest, for no power to overflow.
    unit = norms.where((norms > 0) & norms.isfinite(), 1)
    powers = _all_reduce(step, (parts[: len(norms)] / unit) ** p, "SUM")
    return torch.cat([(unit * powers ** (1 / p)).where(norms.isfinite(), norms), rest])


def _largest(step: Step, parts: Tensor) -> Tensor:
    """Of each part the largest, NaN above all: a backend's maximum of floats may lose that.

    As whole numbers the bits of floats >= 0 are in the order of the floats, and NaN comes last. The
    sign is that of a NaN.
    """
    whole = torch.int64 if parts.dtype == torch.float64 else torch.int32
    bits = parts.view(whole) & torch.iinfo(whole).max
    return _all_reduce(step, bits, "MAX").view(parts.dtype)


def _all_reduce(step: Step, values: Tensor, op: str) -> Tensor:
    if not torch.compiler.is_compiling():
        return groups.all_reduce(step, values, op)
    traced: Tensor = _traced_all_reduce(values, op.lower(), step.group)
    return traced
