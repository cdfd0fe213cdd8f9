"""Parts of norms: what is added up, over slots and over ranks, to make norms of.

Float64, several packed in one vector; the ranks of a step have the same number of them in the same
order. A new order of norms is a case of `as_parts`, `added`, `_reduced` (its collectives) and
`as_norm`.
"""

import math

import torch
from torch import Tensor

from .._ops import norm_of
from . import groups
from .groups import Step


def as_parts(norms: Tensor, p: float) -> Tensor:
    """What is added up instead of norms, as for an order of |p|: for p = 2 the squares.

    A norm of a negative order is one over the norm of what is one over each element.
    """
    norms = norms.reciprocal() if p < 0 else norms
    return norms * norms if abs(p) == 2 else norms


def added(parts: Tensor, p: float) -> Tensor:
    if p in (1, 2):
        return parts.sum()
    return norm_of(parts, p).masked_fill((parts < 0).any(), -math.inf)


def as_norm(parts: Tensor, p: float) -> Tensor:
    # What a rank that cannot take part has sent is no norm.
    norms = parts.sqrt() if abs(p) == 2 else parts.where(parts >= 0, math.nan)
    return norms.reciprocal() if p < 0 else norms


def combined(parts: Tensor, members: list[list[int]], p: float) -> Tensor:
    """The parts of each list of members added up."""
    if len(members) == 1:
        return added(pick(parts, members[0]), p).reshape(1)
    return torch.stack([added(pick(parts, some), p) for some in members])


def spoiled(parts: Tensor, counts: list[int], step: Step | None) -> Tensor:
    """The parts, `counts` in each group: if one of a group is not finite, neither are the others.

    Nor if one is not on another rank of the `step`, if there is one.
    """
    if step is None and len(counts) == len(parts):
        return parts
    sums = torch.stack([some.sum() for some in parts.split(counts)])
    bad = sums.masked_fill(sums.isfinite(), 0)
    if step is not None:
        odd = (~sums.isfinite()).to(sums).masked_fill(sums.isneginf(), 2)
        theirs = groups.all_reduce(step, odd, "MAX")
        # What a rank has `told` goes on as that.
        bad = bad.masked_fill((theirs > 0) & (bad == 0), math.nan).masked_fill(
            theirs > 1, -math.inf
        )
    each = zip(parts.split(counts), bad.unbind(), strict=True)
    return torch.cat([some + one for some, one in each])


def pick(parts: Tensor, members: list[int], sizes: list[int] | None = None) -> Tensor:
    """Those parts, or a zero for none, picked without a copy of indices to the device."""
    if len(members) == len(parts if sizes is None else sizes) > 0:
        return parts
    each = parts.split(1 if sizes is None else sizes)
    return torch.cat([each[i] for i in members]) if members else parts.new_zeros(1)


def over(step: Step, parts: Tensor, p: float, sizes: list[int] | None = None) -> Tensor:
    """The parts, the members of the step added up over its ranks; `sizes`: parts to a member."""
    reduced = _reduced(step, pick(parts, step.members, sizes), p)
    if len(reduced) == len(parts):
        return reduced
    each = list(parts.split(1 if sizes is None else sizes))
    present = reduced.split(1 if sizes is None else [sizes[i] for i in step.members])
    for i, some in zip(step.members, present, strict=True):
        each[i] = some
    return torch.cat(each)


def over_line(line: list[Step], part: Tensor) -> Tensor:
    """One part, of order 1 or 2, added up over the ranks of each step."""
    for step in line:
        part = groups.all_reduce(step, part, "SUM")
    return part


def _reduced(step: Step, parts: Tensor, p: float) -> Tensor:
    if p in (0, 1, 2):
        return groups.all_reduce(step, parts, "SUM")
    # The maximum of a backend may lose a NaN, so that travels beside it, and so does what `told`.
    odd = parts.isnan().to(parts.dtype).masked_fill(parts < 0, 2)
    both = torch.cat([parts.masked_fill(odd > 0, 0), odd])
    most, odd = groups.all_reduce(step, both, "MAX").chunk(2)
    if not math.isinf(p):
        # Relative to the largest, for no power to overflow.
        unit = most.where((most > 0) & most.isfinite(), 1)
        most = unit * groups.all_reduce(step, (parts / unit) ** p, "SUM") ** (1 / p)
    return most.masked_fill(odd > 0, math.nan).masked_fill(odd > 1, -math.inf)
