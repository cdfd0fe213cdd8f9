"""Plans: what is kept of a list of parameters: its reduction, and how the extension reads it.

A plan is made of the parameters alone, never of gradients, so that every rank takes part in the
same collectives in the same order whatever it holds. Gradients that are not placed as their
parameters are redistributed first, each by a collective of its size.
"""

import functools
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._warnings import warn
from .groups import groups_of
from .mesh import (
    INNER,
    LAYOUT,
    PARTS,
    as_replicated,
    is_dtensor,
    layout_of,
    local_of,
    placed,
    replicated,
)
from .reduction import NONE, Asked, Kind, reduction


class Plan:
    """What is known of a list of parameters, or of tensors, as long as it has these layouts.

    It is for the very layouts of parameters, and goes with them. Those of tensors that are only
    measured may be new objects at each step: a plan for such keeps its own, to compare with.
    """

    def __init__(
        self,
        items: Sequence[Tensor],
        layouts: list[Any],
        asked: Asked,
        kind: Kind = Kind.TOTAL,
        labels: Sequence[int] | None = None,
        keeps: bool = False,
    ) -> None:
        self.asked = asked
        if keeps:
            # One for all that are equal: few are compared with many.
            known: dict[Any, Any] = {None: None}
            layouts = [known.setdefault(x and (id(x.mesh), x.placements), x) for x in layouts]
        self.reduction = reduction(layouts, asked, kind, labels)
        self.device = getattr(items[0], "device", None) if items else None
        # Of ROWS, how many each item has here.
        self.sizes: list[int] | None = None
        dtensors = [layout for layout in layouts if layout]
        wide = (torch.float64, torch.complex128)
        # Tensors say it themselves; of parameters this rank may have no gradients.
        self.wide = not keeps and any(layout.tensor_meta.dtype in wide for layout in dtensors)
        one = len(dtensors) == len(layouts) > 0 and all(
            layout.mesh == layouts[0].mesh for layout in layouts
        )
        # The only mesh, if there is one: of that is the result a DTensor.
        self.mesh = layouts[0].mesh if one else None
        self._result_layouts: dict[torch.dtype, Any] = {}
        self.direct = _ops.extension is not None and not any(
            p.is_partial() for layout in dtensors for p in layout.placements
        )
        if self.direct:
            of = self.reduction.slot_of
            self.wrapped = _ops.extension.Wrapped(layouts, of, LAYOUT, INNER, PARTS)
        self._kept = layouts if keeps else None
        self._watch([] if keeps else layouts)
        self.warned = False

    def _watch(self, layouts: list[Any]) -> None:
        # Addresses tell layouts apart as long as all are alive, and the plan is for them so long.
        self.addresses = list(map(id, layouts))
        # What watches them may not know the plan, which would then wait for the cycle collector.
        self._alive = alive = [True]
        self._watched = {
            id(layout): weakref.ref(layout, lambda _: alive.clear()) for layout in layouts if layout
        }

    def read(self, items: Sequence[Tensor], write: bool) -> Any:
        """What the extension reads at once; None where each item has to be looked at.

        Always None where `items` are others than the plan was made for.
        """
        if not self.direct:
            return None
        try:
            return self.wrapped.read_grads(items) if write else self.wrapped.take_tensors(items)
        except Exception:
            # Whoever looks at each meets it again, and tells the other ranks.
            return None

    def is_for(self, asked: Asked) -> bool:
        if not self._alive or asked is self.asked:
            return bool(self._alive)
        # A slice of a mesh is a new object each time, with the groups of the last time.
        now = map(groups_of, asked)
        return [list(map(id, some)) for some in now] == [
            list(map(id, g)) for g in self.reduction.groups
        ]

    def fits(self, layouts: Sequence[Any]) -> bool:
        """Whether this is the plan for items of these layouts."""
        if self._kept is not None:
            return len(layouts) == len(self._kept) and all(map(_is_equal, layouts, self._kept))
        return len(layouts) == len(self.addresses) and all(
            map(operator.eq, map(id, layouts), self.addresses)
        )

    def local(self, item: Tensor, tensor: Any, name: str, write: bool) -> tuple[Tensor, Tensor]:
        """`tensor`, the gradient of an item or the item, placed as planned; and what is here."""
        wrapper: Any = placed(tensor, layout_of(item), name)
        if wrapper is not tensor:
            self._warn(f"{name} is placed {tensor.placements}, not {wrapper.placements}")
            if write:
                item.grad = wrapper
        return wrapper, local_of(wrapper)

    def result(self, norm: Tensor) -> Tensor:
        """A 0-d norm as the caller gets it."""
        if self.mesh is None:
            return norm
        layout = self._result_layouts.get(norm.dtype)
        if layout is None:
            layout = self._result_layouts[norm.dtype] = replicated(self.mesh, norm.dtype)
        return as_replicated(norm, layout)

    def _warn(self, what: str) -> None:
        if not self.warned:
            warn(
                f"{what}: it and others like it are redistributed at every call, one collective "
                "of the gradient's size each"
            )
        self.warned = True


# The plans of parameters, by the address of their first DTensor's layout, each with the reference
# that takes it away when that layout dies: a tensor that anything refers to weakly could no longer
# be swapped, as Module.to() swaps parameters.
_plans: tuple[dict[int, tuple[Plan, Any]], ...] = tuple({} for _ in Kind)


@functools.lru_cache(maxsize=16)
def _last_plan(kind: Kind, count: int, mesh: int, placements: tuple[Any, ...]) -> list[Plan]:
    """Where the last plan lies for so many tensors of which the first DTensor is placed so.

    It keeps the mesh, whose address no other has meanwhile.
    """
    return []


def _is_equal(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return bool(one.mesh == other.mesh and one.placements == other.placements)


def is_spread(items: Sequence[Any]) -> bool:
    return any(map(is_dtensor, items))


def of_plain(items: Sequence[Tensor], asked: Asked) -> Plan:
    """For a list without DTensors, however long, of one label."""
    return Plan(items[:1], [None] * len(items[:1]), asked)


def find(
    items: Sequence[Tensor], asked: Asked, at_once: bool, write: bool, kind: Kind
) -> tuple[Plan, Any]:
    """The plan for these parameters or tensors, and what the extension reads by it `at_once`.

    Raises:
        ValueError: of several groups two share more than this rank.
    """
    key = next((layout_of(item) for item in items if is_dtensor(item)), None)
    if key is not None and not write and kind in (Kind.TOTAL, Kind.COUNT):
        last = _last_plan(kind, len(items), id(key.mesh), key.placements)
        plan, grads = follow(last[0] if last else None, items, asked, at_once, write, kind)
        last[:] = [plan]
        return plan, grads
    plans, address = _plans[kind], id(key)
    known, _ = plans.get(address, (None, None))
    plan, grads = follow(known, items, asked, at_once, write, kind)
    if key is not None and plan is not known:
        plans[address] = plan, weakref.ref(key, lambda _: plans.pop(address))
    return plan, grads


def planned(items: Sequence[Tensor]) -> Plan | None:
    """What `find` has made for a list that begins with a DTensor, of all together, if it still is.

    `read` tells whether the plan is for these items.
    """
    key = getattr(items[0], LAYOUT, None) if items else None
    plan, _ = _plans[Kind.TOTAL].get(id(key), (None, None))
    return plan if plan is not None and plan.is_for(NONE) else None


def follow(
    plan: Plan | None,
    items: Sequence[Tensor],
    asked: Asked,
    at_once: bool,
    write: bool,
    kind: Kind = Kind.TOTAL,
    labels: Sequence[int] | None = None,
) -> tuple[Plan, Any]:
    """As `find`, by the `plan` at hand, or a new one if that is not for these items any more."""
    if plan is not None and not plan.is_for(asked):
        plan = None
    grads = plan.read(items, write) if plan is not None and at_once else None
    if plan is None or grads is None:
        layouts = [layout_of(item) for item in items]
        if plan is None or not plan.fits(layouts):
            keeps = not write and kind in (Kind.TOTAL, Kind.COUNT)
            plan = Plan(items, layouts, asked, kind, labels, keeps)
        grads = plan.read(items, write) if at_once else None
    if kind is Kind.ROWS:
        # A layout does not tell them: plain tensors have none.
        plan.sizes = [_ops.count_rows(local_of(i)) if isinstance(i, Tensor) else 1 for i in items]
    return plan, grads
