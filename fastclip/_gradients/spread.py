"""Gradients measured by a `Plan` (see _ranks/plan.py): over ranks, in groups, or both."""

import functools
import zlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _ranks
from .._ops import clip_coef, empty_norm, is_host_readable
from .._ranks import NUMBERS, Failure, raise_if_failed
from .protocol import Gradients, GradientsHere

Method = TypeVar("Method", bound=Callable[..., Any])


def _outside_of_graphs(method: Method) -> Method:
    """Have torch.compile call a method without tracing it, unless the graph read the gradients."""
    untraced: Any = torch.compiler.disable(method)

    @functools.wraps(method)
    def call(self: "SpreadGrads", *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not self.is_in_graph:
            return untraced(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class SpreadGrads:
    """Gradients whose norms are those of all ranks together.

    Norms are plain tensors; `result` may return a DTensor. With `agree`, a norm that is not finite
    on one rank is not finite on any. If this rank cannot take part, `error` is the reason: `norms`
    announces it in the sums that other ranks wait for, then raises it. Which collectives run
    depends on the plan alone.

    If gradients are read in a graph of torch.compile, these methods are traced into it. They send
    the same numbers as outside of graphs, so some ranks may run compiled and others not. If another
    rank failed, a graph cannot raise; the norm is NaN instead.
    """

    def __init__(
        self,
        local: GradientsHere,
        plan: Any,
        agree: bool = False,
        error: Exception | None = None,
        is_in_graph: bool = False,
    ) -> None:
        self._local, self.plan, self.agree = local, plan, agree
        self.failure = None if error is None else Failure(error)
        self.reduction, self.is_in_graph = plan.reduction, is_in_graph
        # Set by `each_norms`, for plans of kind EACH that send anything: a number for each group,
        # infinite or NaN if a gradient of the group is so on any rank, else 0.
        self.flags = torch.empty(0, dtype=torch.float64, device="cpu")
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

    @_outside_of_graphs
    def result(self, norms: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        norms = norms.to(dtype or (torch.float64 if self.wide else torch.float32))
        found: Tensor = norms if norms.dim() else self.plan.result(norms)
        return found

    @_outside_of_graphs
    def norm(self, p: float) -> Tensor:
        return self.norms(p)[0]

    @_outside_of_graphs
    def each_norms(self, p: float, rows: bool = False) -> Tensor:
        """Return the norm of each item (plan of kind EACH) or row (ROWS); 0 if it has no grad."""
        return self.norms(p)

    @_outside_of_graphs
    def norms(self, p: float) -> Tensor:
        plan, reduction, order = self.plan, self.reduction, abs(p)
        sizes = None if plan.sizes is None else [*plan.sizes, *[1] * reduction.beside]
        parts = self._parts(p)
        for step in reduction.mesh_steps if self.agree else reduction.adding_steps:
            if self.agree and reduction.beside > NUMBERS:
                parts = _ranks.share_nonfinite(parts, reduction.counts, reduction.beside)
            parts = _ranks.all_reduce_members(step, parts, order, reduction.beside, sizes)
        if reduction.kind.is_each:
            last = min(reduction.beside, NUMBERS)
            sizes = [parts.numel() - reduction.beside, reduction.beside - last, last]
            norms, self.flags, numbers = parts.split(sizes)
        else:
            of = reduction
            norms, numbers = _ranks.combine_slots(parts, of.members, of.beside, order)
        if reduction.group_steps:
            # All ranks return float64 if any of them does.
            wide = norms.new_full((1,), self.wide)
            parts = torch.cat([norms, numbers, wide])
            for step in reduction.group_steps:
                parts = _ranks.all_reduce_members(step, parts, order, NUMBERS + 1)
            norms, numbers, wide = parts.split([norms.numel(), NUMBERS, 1])
            self.wide = bool(wide) if is_host_readable(wide) else self.wide
        if self.failure is not None:
            self.failure.announce()
        if reduction.sends:
            raise_if_failed(numbers)
        return _ranks.as_norms(norms, p)

    @_outside_of_graphs
    def scale_(self, coef: Tensor) -> None:
        """Multiply by one coefficient, or by one for each group."""
        groups = self.reduction.group_of
        if coef.dim() and groups and not self.reduction.kind.is_each:
            each = coef.unbind()
            coef = torch.stack([each[i] for i in groups])
        self.local.scale_(coef)

    @_outside_of_graphs
    def scale_each_(self, coefs: Tensor, rows: bool = False) -> None:
        if not rows:
            self.local.scale_(coefs)
            return
        if len(self.local) < len(self.reduction.group_of):
            each = coefs.split(self.plan.sizes)
            coefs = torch.cat([each[slot] for slot in self.local.groups()] or [coefs[:0]])
        self.local.scale_each_(coefs, True)

    @_outside_of_graphs
    def clamp_(self, bound: float) -> None:
        self.local.clamp_(bound)

    @_outside_of_graphs
    def clip_norm_(self, max_norm: float | Tensor, p: float, norm: Tensor | None = None) -> Tensor:
        norm = self.norm(p) if norm is None else norm
        # One op computes the coefficient and scales, if it returns the norm in the right dtype.
        if len(self.local) and self.wide == self.local.is_wide():
            clipped: Tensor = self.plan.result(self.local.clip_norm_(max_norm, p, norm))
            return clipped
        self.scale_(clip_coef(norm, max_norm, self.wide))
        return self.result(norm)

    def find_differing(self, texts: list[str]) -> int | None:
        """Return the index of the first text that ranks differ in; this waits for the device."""
        numbers = [zlib.crc32(text.encode()) for text in texts]
        steps = [*self.reduction.mesh_steps, *self.reduction.group_steps]
        return _ranks.find_differing(numbers, steps)

    def _parts(self, p: float) -> Tensor:
        """Return what _ranks/parts.py says ranks send: the slots' parts, then flags and numbers."""
        reduction = self.reduction
        if self.failure is None:
            try:
                parts = _ranks.as_parts(self._local_norms(p), p)
                return torch.constant_pad_nd(parts, (0, reduction.beside))
            except Exception as error:
                if not reduction.sends:
                    raise
                self.failure = Failure(error)
        count = len(reduction.group_of) if self.plan.sizes is None else sum(self.plan.sizes)
        return self.failure.parts(count + reduction.beside - NUMBERS, self.plan.device)

    def _local_norms(self, p: float) -> Tensor:
        """Return the norms of all slots, with `empty_norm` for slots without a gradient here."""
        plan, reduction, count = self.plan, self.reduction, len(self.reduction.group_of)
        rows = plan.sizes is not None
        # At order 0 `norms` counts the nonzero tensors; EACH needs each tensor's nonzero elements.
        if rows or (p == 0 and reduction.kind.is_each):
            norms = self.local.each_norms(p, rows)
            if len(self.local) == count:
                return norms
            sizes = plan.sizes or [1] * count
            each = [norms.new_zeros(size) for size in sizes]
            slots = self.local.groups()
            present = norms.split([sizes[slot] for slot in slots])
            for slot, some in zip(slots, present, strict=True):
                each[slot] = some
            return self._to_plan_device(torch.cat(each) if each else norms)
        norms = self.local.norms(p)
        if missing := count - norms.numel():
            norms = self._to_plan_device(norms)
            norms = torch.cat([norms, norms.new_full((missing,), empty_norm(p))])
        return norms

    def _to_plan_device(self, norms: Tensor) -> Tensor:
        here = len(self.local) or self.plan.device is None
        return norms if here else norms.to(self.plan.device)


def fail(grads: Gradients, error: Exception) -> None:
    """Raise the error; if other ranks wait for sums, store it instead: `norms` will announce it."""
    if not isinstance(grads, SpreadGrads) or not grads.reduction.sends:
        raise error
    grads.failure = grads.failure or Failure(error)


def each_norms_of(some: Iterable[Gradients], p: float, rows: bool) -> list[Tensor]:
    """Return `each_norms` of all; even if one raises, call the rest: other ranks wait for them."""
    found, errors = [], []
    for grads in some:
        try:
            found.append(grads.each_norms(p, rows))
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return found
