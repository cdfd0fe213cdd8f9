"""Plans: what is kept of a list of parameters: its reduction, and how the extension reads it.

A plan is made of the parameters alone, never of gradients, so that every rank takes part in the
same collectives in the same order whatever it holds. Gradients that are not placed as their
parameters are redistributed first, each by a collective of its size.
"""

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
    FIELDS,
    INNER,
    LAYOUT,
    as_replicated,
    is_dtensor,
    layout_of,
    local_of,
    placed,
    replicated,
)
from .reduction import Asked, Kind, reduction


class Plan:
    """What is known of a list of parameters or tensors, as long as it has these very layouts."""

    def __init__(
        self,
        items: Sequence[Tensor],
        layouts: Sequence[Any],
        asked: Asked,
        kind: Kind = Kind.TOTAL,
        group_of: Sequence[int] | None = None,
    ) -> None:
        self.asked = asked
        self.reduction = reduction(layouts, asked, kind, group_of)
        self.device = getattr(items[0], "device", None) if items else None
        # Of ROWS, how many each item has here.
        self.sizes: list[int] | None = None
        dtensors = [layout for layout in layouts if layout]
        wide = (torch.float64, torch.complex128)
        # This rank may have no gradients.
        self.wide = any(layout.tensor_meta.dtype in wide for layout in dtensors)
        one = len(dtensors) == len(layouts) > 0 and all(
            layout.mesh == layouts[0].mesh for layout in layouts
        )
        # The only mesh, if there is one: of that is the result a DTensor.
        self.mesh = layouts[0].mesh if one else None
        self._result_layouts: dict[torch.dtype, Any] = {}
        self._wrapped: Any = None
        partial = any(p.is_partial() for layout in dtensors for p in layout.placements)
        if _ops.extension is not None and not partial:
            of = self.reduction.slot_of
            self._wrapped = _ops.extension.Wrapped(layouts, of, LAYOUT, INNER, FIELDS)
        # Addresses tell layouts apart as long as all are alive, and the plan is for them so long.
        # A callback that knew the plan would keep it until the cycle collector comes.
        self._addresses = list(map(id, layouts))
        self._alive = alive = [True]
        self._watched = {
            id(layout): weakref.ref(layout, lambda _: alive.clear()) for layout in dtensors
        }
        self._has_warned = False

    def read(self, items: Sequence[Tensor], write: bool) -> Any:
        """Have the extension read the items; None where Python has to look at each.

        Always None where `items` are others than the plan was made for.
        """
        if self._wrapped is None or _ops.extension is None:
            return None
        try:
            return self._wrapped.read_grads(items) if write else self._wrapped.take_tensors(items)
        except Exception:
            # Whoever looks at each meets it again, and tells the other ranks.
            return None

    def is_for(self, asked: Asked) -> bool:
        if not self._alive or asked is self.asked:
            return bool(self._alive)
        # A slice of a mesh is a new object each time, with the groups of the last time.
        now, own = map(groups_of, asked), self.reduction.process_groups
        return [list(map(id, some)) for some in now] == [list(map(id, some)) for some in own]

    def fits(self, layouts: Sequence[Any]) -> bool:
        """Whether this is the plan for items of these layouts."""
        return len(layouts) == len(self._addresses) and all(
            map(operator.eq, map(id, layouts), self._addresses)
        )

    def local(self, item: Tensor, tensor: Any, name: str, write: bool) -> tuple[Tensor, Tensor]:
        """`tensor`, the gradient of an item or the item, placed as planned; and what is here."""
        wrapper: Any = placed(tensor, layout_of(item), name)
        if wrapper is not tensor:
            if not self._has_warned:
                warn(
                    f"{name} is placed {tensor.placements}, not {wrapper.placements}: it and "
                    "others like it are redistributed at every call, one collective of the "
                    "gradient's size each"
                )
            self._has_warned = True
            if write:
                item.grad = wrapper
        return wrapper, local_of(wrapper)

    def result(self, norm: Tensor) -> Tensor:
        """Return a 0-d norm as the caller gets it; `PlanOfGraph.result` does so in a graph."""
        if self.mesh is None:
            return norm
        layout = self._result_layouts.get(norm.dtype)
        if layout is None:
            layout = self._result_layouts[norm.dtype] = replicated(self.mesh, norm.dtype)
        return as_replicated(norm, layout)


# The plans of lists, by the address of their first DTensor's layout, each with the reference that
# takes it away when that layout dies: a tensor that anything refers to weakly could no longer be
# swapped, as Module.to() swaps parameters.
_plans: tuple[dict[int, tuple[Plan, Any]], ...] = tuple({} for _ in Kind)


def is_spread(items: Sequence[Any]) -> bool:
    return any(map(is_dtensor, items))


def plan_of_plain(items: Sequence[Tensor], asked: Asked) -> Plan:
    """The plan for a list without DTensors, however long, of one group."""
    return Plan(items[:1], [None] * len(items[:1]), asked)


def find_plan(items: Sequence[Tensor], asked: Asked, write: bool, kind: Kind) -> tuple[Plan, Any]:
    """Find or make the plan for these parameters or tensors, and what the extension reads by it.

    Raises:
        ValueError: of several process groups two share more than this rank.
    """
    key = next((layout_of(item) for item in items if is_dtensor(item)), None)
    plans, address = _plans[kind], id(key)
    known, _ = plans.get(address, (None, None))
    plan, grads = follow(known, items, asked, write, kind)
    if key is not None and plan is not known:
        plans[address] = plan, weakref.ref(key, lambda _: plans.pop(address))
    return plan, grads


def follow(
    plan: Plan | None,
    items: Sequence[Tensor],
    asked: Asked,
    write: bool,
    kind: Kind = Kind.TOTAL,
    group_of: Sequence[int] | None = None,
) -> tuple[Plan, Any]:
    """As `find_plan`, by the `plan` at hand, or by a new one if that is for other items."""
    if plan is not None and not plan.is_for(asked):
        plan = None
    grads = None if plan is None else plan.read(items, write)
    if plan is None or grads is None:
        layouts = [layout_of(item) for item in items]
        if plan is None or not plan.fits(layouts):
            plan = Plan(items, layouts, asked, kind, group_of)
        grads = plan.read(items, write)
    if kind is Kind.ROWS:
        # A layout does not tell them: plain tensors have none.
        plan.sizes = [_ops.count_rows(local_of(i)) if isinstance(i, Tensor) else 1 for i in items]
    return plan, grads
