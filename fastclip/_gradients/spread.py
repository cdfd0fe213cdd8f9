"""Gradients that are measured by a plan: over ranks, in groups, or both.

torch.compile leaves their verbs as they are: collectives and plans are no part of a graph.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _ranks
from .._ops import clip_coef, empty_norm, is_known
from .._ranks import Kind, Plan
from .protocol import GradientsHere


class SpreadGrads:
    """The gradients of all ranks. `norms` has one for each label, `norm` is that of the first.

    They are plain tensors; `result` may make a DTensor of one. If the ranks `agree`, a norm that is
    not finite on one is so on all. `error` is why this rank cannot take part: it tells the others
    in the collectives that it owes them, and is then raised.
    """

    def __init__(
        self,
        local: GradientsHere,
        plan: Plan,
        agree: bool = False,
        error: Exception | None = None,
    ) -> None:
        self._local, self.plan, self.agree, self.error = local, plan, agree, error
        self.reduction = plan.reduction
        self.wide = plan.wide or (error is None and local.is_wide())

    @property
    def local(self) -> GradientsHere:
        if self.error is not None:
            raise self.error
        return self._local

    def __len__(self) -> int:
        return len(self.local)

    def has(self, dtype: torch.dtype) -> bool:
        return self.error is None and self.local.has(dtype)

    def is_wide(self) -> bool:
        return self.wide

    @torch.compiler.disable
    def result(self, norms: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._as_result(norms, dtype)

    def _as_result(self, norms: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        norms = norms.to(dtype or (torch.float64 if self.wide else torch.float32))
        return norms if norms.dim() else self.plan.result(norms)

    @torch.compiler.disable
    def norm(self, p: float) -> Tensor:
        return self._norms(p)[0]

    @torch.compiler.disable
    def norms(self, p: float) -> Tensor:
        return self._norms(p)

    @torch.compiler.disable
    def each_norms(self, p: float, rows: bool = False) -> Tensor:
        """Of every item, or of its rows, by a plan for them; 0 where there is no gradient."""
        return self._norms(p)

    @torch.compiler.disable
    def scale_(self, coef: Tensor) -> None:
        """By one coefficient, or one for each label."""
        labels = self.reduction.label_of
        if coef.dim() and not self.reduction.is_flat:
            coef = torch.stack([coef[label] for label in labels]) if labels else coef
        self.local.scale_(coef)

    @torch.compiler.disable
    def scale_each_(self, coefs: Tensor, rows: bool = False) -> None:
        if not rows:
            self.local.scale_(coefs)
            return
        if len(self.local) < len(self.reduction.slots):
            each = coefs.split(self.plan.sizes)
            coefs = torch.cat([each[slot] for slot in self.local.slots()] or [coefs[:0]])
        self.local.scale_each_(coefs, True)

    @torch.compiler.disable
    def clamp_(self, bound: float) -> None:
        self.local.clamp_(bound)

    @torch.compiler.disable
    def clip_norm_(self, max_norm: float | Tensor, p: float, norm: Tensor | None = None) -> Tensor:
        if norm is None:
            return self.clip_by_(self._added(p), max_norm, p)
        self.local.scale_(clip_coef(norm, max_norm, self.wide))
        return self._as_result(norm)

    def clip_by_(self, parts: Tensor, max_norm: float | Tensor, p: float) -> Tensor:
        """By what all ranks have added up of the norm."""
        total_norm = self._clipped_by(parts, max_norm, p)
        if total_norm is not None:
            return self.plan.result(total_norm)
        norm = self._as_norms(parts, p)[0]
        self.local.scale_(clip_coef(norm, max_norm, self.wide))
        return self._as_result(norm)

    @torch.compiler.disable
    def added(self, counts: Tensor) -> Tensor:
        """Float64 counts, one for each item of an EACH plan, added up over ranks."""
        for step in self.reduction.steps:
            counts = _ranks.over(step, counts, 1) if step.members else counts
        return counts

    def check_same(self, names: list[str]) -> None:
        """Of groups: what ranks send each other is bare. Waits for the device.

        Raises:
            ValueError: they have other names on another rank; on all ranks.
        """
        number = zlib.crc32("\0".join(names).encode())
        if not _ranks.is_same(number, [*self.reduction.steps, *self.reduction.beyond]):
            raise ValueError(
                f"groups: expected the same on all ranks, in the same order, got {names} here and "
                "others elsewhere; a rank that holds nothing of a group gives it no params"
            )

    def _clipped_by(self, parts: Tensor, max_norm: float | Tensor, p: float) -> Tensor | None:
        """At once, where the extension has read the gradients and the host knows the norm."""
        at_once: Callable[..., Tensor | None] | None = getattr(self._local, "clip_by_sum_", None)
        if at_once is None or p not in (1, 2) or not isinstance(max_norm, float):
            return None
        return at_once(parts, max_norm, p, self.wide)

    def _norms(self, p: float) -> Tensor:
        return self._as_norms(self._added(p), p)

    def _added(self, p: float) -> Tensor:
        """What is made a norm, of each label, added up over ranks."""
        plan, reduction, order = self.plan, self.reduction, abs(p)
        parts = self._parts(p)
        for step, is_open in zip(reduction.steps, reduction.open, strict=True):
            if self.agree:
                parts = _ranks.spoiled(parts, reduction.counts, step if is_open else None)
            if step.members:
                parts = _ranks.over(step, parts, order, plan.sizes)
        if not reduction.is_flat:
            parts = _ranks.combined(parts, reduction.members, order)
            if self.error is not None:
                # Also for a label of which this rank has nothing to add.
                parts = torch.full_like(parts, -math.inf)
        if reduction.tells_wide:
            # With the norms goes whether a gradient is float64, for all to return the same dtype.
            parts = torch.constant_pad_nd(parts, (0, 1), self.wide)
        for step in reduction.beyond:
            parts = _ranks.over(step, parts, order)
        if self.error is not None:
            raise self.error
        return parts

    def _as_norms(self, parts: Tensor, p: float) -> Tensor:
        reduction = self.reduction
        if reduction.sends:
            _ranks.raise_if_told(parts)
        if reduction.tells_wide:
            parts, wide = parts[:-1], parts[-1]
            self.wide = bool(wide) if is_known(wide) else self.wide
        return _ranks.as_norm(parts, p)

    def _parts(self, p: float) -> Tensor:
        """What is added up, of all slots."""
        plan, reduction = self.plan, self.reduction
        if self.error is None:
            try:
                return _ranks.as_parts(self._local_norms(p), p)
            except (TypeError, ValueError, RuntimeError) as error:
                if not reduction.sends:
                    raise
                self.error = error
        count = len(reduction.slots) if plan.sizes is None else sum(plan.sizes)
        return _ranks.told(self.error, count, plan.device)

    def _local_norms(self, p: float) -> Tensor:
        """The norms of all slots; what adds nothing for those that hold nothing here."""
        plan, reduction, count = self.plan, self.reduction, len(self.reduction.slots)
        rows = reduction.kind is Kind.ROWS
        # Slots of order 0 count tensors, and here are the elements of each.
        if rows or (reduction.kind is Kind.EACH and p == 0):
            norms = self.local.each_norms(p, rows)
            if len(self.local) == count:
                return norms
            sizes = plan.sizes or [1] * count
            each = [norms.new_zeros(size) for size in sizes]
            slots = self.local.slots()
            present = norms.split([sizes[slot] for slot in slots])
            for slot, some in zip(slots, present, strict=True):
                each[slot] = some
            return self._here(torch.cat(each) if each else norms)
        norms = self.local.norms(p)
        if missing := count - len(norms):
            norms = self._here(norms)
            norms = torch.cat([norms, norms.new_full((missing,), empty_norm(p))])
        return norms

    def _here(self, norms: Tensor) -> Tensor:
        here = len(self.local) or self.plan.device is None
        return norms if here else norms.to(self.plan.device)


def clipped_by(plan: Plan, items: list[Tensor], max_norm: Any, p: Any) -> Tensor | None:
    """`clip_norm_` of the gradients of `items`, if their norm is one sum over ranks.

    None, and nothing is done, where anything has to be looked at.
    """
    line, numbers = plan.reduction.line, (int, float)
    is_usual = type(max_norm) in numbers and type(p) in numbers
    if line is None or not (is_usual and p in (1, 2) and (limit := float(max_norm)) >= 0):
        return None
    grads = plan.read(items, True)
    if not grads:
        return None
    part = _ranks.over_line(line, grads.part(p))
    total_norm = grads.clip_by_sum_(part, limit, p, plan.wide)
    if total_norm is not None:
        return plan.result(total_norm)
    return SpreadGrads(grads, plan).clip_by_(part, limit, p)
