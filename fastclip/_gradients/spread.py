"""Gradients that are measured by a plan: over ranks, in groups, or both.

torch.compile leaves their verbs as they are: collectives and plans are no part of a graph.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _ranks
from .._ops import clip_coef, empty_norm, is_known
from .._ranks import NUMBERS, Failure, Kind, Plan, mark_of, raise_if_failed, raise_reason
from .protocol import Gradients, GradientsHere


class SpreadGrads:
    """The gradients of all ranks. `norms` has one for each label, `norm` is that of the first.

    They are plain tensors; `result` may make a DTensor of one. If the ranks `agree`, a norm that is
    not finite on one is so on all. `error` is why this rank cannot take part: it tells the others
    in the sums that it owes them, and is then raised. What is sent depends on the plan alone.
    """

    def __init__(
        self,
        local: GradientsHere,
        plan: Plan,
        agree: bool = False,
        error: Exception | None = None,
    ) -> None:
        self._local, self.plan, self.agree = local, plan, agree
        self.failure = None if error is None else Failure(error)
        self.reduction = plan.reduction
        self.wide = plan.wide or (error is None and local.is_wide())

    @property
    def local(self) -> GradientsHere:
        if self.failure is not None:
            raise self.failure.error
        return self._local

    def __len__(self) -> int:
        return len(self.local)

    def has(self, dtype: torch.dtype) -> bool:
        return self.failure is None and self.local.has(dtype)

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
        return self.clip_by_(self._norms(p)[0] if norm is None else norm, max_norm)

    def clip_by_(self, norm: Tensor, max_norm: float | Tensor) -> Tensor:
        """By the norm of all ranks."""
        at_once: Callable[..., Tensor] | None = getattr(self.local, "clip_by_known_", None)
        if at_once is not None and isinstance(max_norm, float) and is_known(norm):
            return self.plan.result(at_once(float(norm), max_norm, self.wide))
        self.local.scale_(clip_coef(norm, max_norm, self.wide))
        return self._as_result(norm)

    def find_differing(self, texts: list[str]) -> int | None:
        """The first of the texts that is another on some rank; waits for the device."""
        numbers = [zlib.crc32(text.encode()) for text in texts]
        return _ranks.find_differing(numbers, [*self.reduction.steps, *self.reduction.beyond])

    def _norms(self, p: float) -> Tensor:
        plan, reduction, order = self.plan, self.reduction, abs(p)
        if p in (1, 2) and reduction.line is not None and hasattr(self._local, "part"):
            norm = None if self.agree else _norm_of_line(self._local, reduction.line, p)
            if norm is not None:
                return torch.as_tensor(norm, dtype=torch.float64, device=plan.device).reshape(1)
        sizes = None if plan.sizes is None else [*plan.sizes, *[1] * reduction.beside]
        parts = self._parts(p)
        for step in reduction.steps if self.agree else reduction.adding:
            if self.agree and reduction.beside > NUMBERS:
                parts = _ranks.spoiled(parts, reduction.counts, reduction.beside)
            parts = _ranks.over_mesh(step, parts, order, reduction.beside, sizes)
        norms, numbers = self._combined(parts, p)
        if reduction.beyond:
            # For all to return the same dtype.
            wide = norms.new_full((1,), self.wide)
            parts = torch.cat([norms, numbers, wide])
            for step in reduction.beyond:
                parts = _ranks.over(step, parts, order, NUMBERS + 1)
            norms, numbers, wide = parts.split([len(norms), NUMBERS, 1])
            self.wide = bool(wide) if is_known(wide) else self.wide
        if self.failure is not None:
            self.failure.raise_()
        return self._as_norms(norms, numbers, p)

    def _combined(self, parts: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """The parts of each label, and the numbers beside them."""
        of = self.reduction
        if not of.is_flat:
            return _ranks.combined(parts, of.members, of.beside, abs(p))
        if not of.sends:
            return parts, parts[:0]
        norms, flags = parts[: -of.beside], parts[-of.beside : -NUMBERS]
        return norms + flags if len(flags) else norms, parts[-NUMBERS:]

    def _as_norms(self, parts: Tensor, numbers: Tensor, p: float) -> Tensor:
        if self.reduction.sends:
            raise_if_failed(numbers)
        return _ranks.as_norm(parts, p)

    def _parts(self, p: float) -> Tensor:
        """What is added up, of all slots, and what goes beside it."""
        reduction = self.reduction
        if self.failure is None:
            try:
                parts = _ranks.as_parts(self._local_norms(p), p)
                return torch.constant_pad_nd(parts, (0, reduction.beside))
            except Exception as error:
                if not reduction.sends:
                    raise
                self.failure = Failure(error)
        count = len(reduction.slots) if self.plan.sizes is None else sum(self.plan.sizes)
        return self.failure.parts(count + reduction.beside - NUMBERS, self.plan.device)

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


def fail(grads: Gradients, error: Exception) -> None:
    """Raise an error; of gradients over ranks, which are then told, when they are measured."""
    if not isinstance(grads, SpreadGrads) or not grads.reduction.sends:
        raise error
    grads.failure = grads.failure or Failure(error)


def each_norms_of(some: Iterable[Gradients], p: float, rows: bool) -> list[Tensor]:
    """`each_norms` of each of them. Ranks wait for all, also where some cannot be measured."""
    found, errors = [], []
    for grads in some:
        try:
            found.append(grads.each_norms(p, rows))
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return found


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
    norm = _norm_of_line(grads, line, p)
    if isinstance(norm, float):
        return plan.result(grads.clip_by_known_(norm, limit, plan.wide))
    return None if norm is None else SpreadGrads(grads, plan).clip_by_(norm[0], limit)


def _norm_of_line(grads: Any, line: Any, p: float) -> float | Tensor | None:
    """The norm of the only slot, a number if the host knows it.

    None, and nothing is sent, if it cannot be measured: the long road meets the error again, and
    tells the other ranks.
    """
    try:
        part, value = grads.part(p)
    except Exception:
        return None
    part, value = _ranks.over_line(line, part, value)
    if value is None:
        return _ranks.as_norm(part, p)
    if value != value and (mark := mark_of(part)):
        raise_reason(mark)
    return value if p == 1 else math.sqrt(value)
