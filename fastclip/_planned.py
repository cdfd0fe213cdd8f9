"""Gradients that are measured by a plan: over ranks, in groups, or both.

They have the verbs of the local ones. The compiler stays out.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import _mesh, _ranks
from ._ops import clip_coef
from ._plan import Kind, Plan


class PlannedGrads:
    """The gradients of all ranks. `norms` has one for each label, `norm` is that of the first."""

    def __init__(self, local: Any, plan: Plan) -> None:
        self.local, self.plan = local, plan

    def __len__(self) -> int:
        return len(self.local)

    @torch.compiler.disable
    def norm(self, p: float) -> Tensor:
        return self._result(self._norms(p)[0])

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
        slots = self.plan.slots
        if coef.dim() and not self.plan.is_flat:
            coef = torch.stack([coef[label] for label, _ in slots]) if slots else coef
        self.local.scale_(coef)

    @torch.compiler.disable
    def scale_each_(self, coefs: Tensor, rows: bool = False) -> None:
        if not rows:
            self.local.scale_(coefs)
            return
        if len(self.local) < len(self.plan.slots):
            each = coefs.split(self.plan.sizes)
            coefs = torch.cat([each[slot] for slot in self.local.slots()] or [coefs[:0]])
        self.local.scale_each_(coefs, True)

    @torch.compiler.disable
    def clamp_(self, bound: float) -> None:
        self.local.clamp_(bound)

    @torch.compiler.disable
    def clip_norm_(self, max_norm: float | Tensor, p: float) -> Tensor:
        total_norm = self._norms(p)[0]
        self.local.scale_(clip_coef(total_norm, max_norm))
        return self._result(total_norm)

    @torch.compiler.disable
    def agreed(self, norms: Tensor) -> Tensor:
        """`norms`, 0-d or one for each label; NaN where that of any other rank is not finite."""
        bad = (~norms.isfinite()).double().reshape(-1)
        for step in (*self.plan.all, *self.plan.beyond):
            bad = _ranks.all_reduce(step, bad, "MAX")
        return norms.masked_fill((bad > 0).view(norms.shape), math.nan)

    @torch.compiler.disable
    def added(self, counts: Tensor) -> Tensor:
        """Float64 counts, one for each item of an EACH plan, added up over ranks."""
        for step in self.plan.within:
            counts = _ranks.over(step, counts, 1)
        return counts

    def _norms(self, p: float) -> Tensor:
        plan, norms = self.plan, self._local_norms(p)
        ranks = bool(plan.within or plan.beyond)
        if ranks and not p > 0:
            raise ValueError(
                f"norm_type: expected an order > 0 for gradients spread over ranks, got {p}"
            )
        if ranks or not plan.is_flat:
            members = plan.members
            parts = _ranks.as_parts(norms, p)
            for step in plan.within:
                parts = _ranks.over(step, parts, p, plan.sizes)
            if plan.beyond:
                parts = _ranks.combined(parts, plan.mine, p)
                for step in plan.beyond:
                    parts = _ranks.over(step, parts, p)
                members = [[label] for label in range(len(members))]
            if not plan.is_flat:
                parts = _ranks.combined(parts, members, p)
            norms = _ranks.as_norm(parts, p)
        return norms if plan.wide or self.local.is_wide() else norms.float()

    def _local_norms(self, p: float) -> Tensor:
        """The norms of all slots in float64, with zeros for those that hold nothing here."""
        plan, count = self.plan, len(self.plan.slots)
        if plan.kind is Kind.ROWS:
            norms = self.local.each_norms(p, True, True)
            if len(self.local) == count:
                return norms
            each = [norms.new_zeros(size) for size in plan.sizes]
            slots = self.local.slots()
            present = norms.split([plan.sizes[slot] for slot in slots])
            for slot, some in zip(slots, present, strict=True):
                each[slot] = some
            return self._here(torch.cat(each) if each else norms)
        norms = self.local.norms(p)
        if missing := count - len(norms):
            norms = self._here(norms)
            norms = torch.cat([norms, norms.new_zeros(missing)])
        return norms

    def _here(self, norms: Tensor) -> Tensor:
        here = len(self.local) or self.plan.device is None
        return norms if here else norms.to(self.plan.device)

    def _result(self, total_norm: Tensor) -> Tensor:
        plan, dtype = self.plan, total_norm.dtype
        if plan.mesh is None:
            return total_norm
        if dtype not in plan.result_layouts:
            plan.result_layouts[dtype] = _mesh.replicated(plan.mesh, dtype)
        return _mesh.as_replicated(total_norm, plan.result_layouts[dtype])
