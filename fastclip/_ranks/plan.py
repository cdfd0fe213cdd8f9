"""Plans, kept between calls: the `Reduction` of a list of parameters, and how C++ reads them.

A plan depends on the parameters alone, never on gradients, so that every rank takes part in the
same collectives in the same order, whichever gradients it has. A gradient whose placements differ
from its parameter's is redistributed first, in a collective of its size.
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
    place_as,
    replicated,
)
from .reduction import Asked, Kind, reduction


class Plan:
    """How to read and reduce a list of tensors; valid while these keep their layout objects."""

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
        # For kind ROWS, the number of rows that each item has on this rank.
        self.sizes: list[int] | None = None
        dtensors = [layout for layout in layouts if layout]
        wide = (torch.float64, torch.complex128)
        # Found from layouts, because this rank may have no gradients.
        self.wide = any(layout.tensor_meta.dtype in wide for layout in dtensors)
        one = len(dtensors) == len(layouts) > 0 and all(
            layout.mesh == layouts[0].mesh for layout in layouts
        )
        # The mesh, if all items are DTensors of one mesh: `result` then returns a DTensor.
        self.mesh = layouts[0].mesh if one else None
        self._result_layouts: dict[torch.dtype, Any] = {}
        self._wrapped: Any = None
        partial = any(p.is_partial() for layout in dtensors for p in layout.placements)
        if _ops.extension is not None and not partial:
            of = self.reduction.slot_of
            self._wrapped = _ops.extension.Wrapped(layouts, of, LAYOUT, INNER, FIELDS)
        # Layouts are compared by address, so the plan is valid only while all of them are alive.
        # Callbacks refer to `alive`: with the plan they would be a cycle, which only the GC ends.
        self._addresses = list(map(id, layouts))
        self._alive = alive = [True]
        self._watched = {
            id(layout): weakref.ref(layout, lambda _: alive.clear()) for layout in dtensors
        }
        self._has_warned = False

    def read(self, items: Sequence[Tensor], write: bool) -> Any:
        """Return the gradients as the extension reads them; None if Python has to read each item.

        The result is also None if the plan was made for other items.
        """
        if self._wrapped is None or _ops.extension is None:
            return None
        try:
            return self._wrapped.read_grads(items) if write else self._wrapped.take_tensors(items)
        except Exception:
            # `look` then raises the same error, which is announced to the other ranks.
            return None

    def is_for(self, asked: Asked) -> bool:
        if not self._alive or asked is self.asked:
            return bool(self._alive)
        # Each slicing of a mesh makes a new object, but with the same process groups.
        now, own = map(groups_of, asked), self.reduction.process_groups
        return [list(map(id, some)) for some in now] == [list(map(id, some)) for some in own]

    def fits(self, layouts: Sequence[Any]) -> bool:
        """Return whether the plan was made for these layouts."""
        return len(layouts) == len(self._addresses) and all(
            map(operator.eq, map(id, layouts), self._addresses)
        )

    def local(self, item: Tensor, tensor: Any, name: str, write: bool) -> tuple[Tensor, Tensor]:
        """Place `tensor`, `item` or its gradient, like `item`; return it and its local tensor."""
        wrapper: Any = place_as(tensor, layout_of(item), name)
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
        """Return a 0-d norm, as a DTensor if all items are DTensors of one mesh."""
        if self.mesh is None:
            return norm
        layout = self._result_layouts.get(norm.dtype)
        if layout is None:
            layout = self._result_layouts[norm.dtype] = replicated(self.mesh, norm.dtype)
        return as_replicated(norm, layout)


# The plans by the address of the first DTensor's layout, each with a weak reference that removes it
# when that layout dies. The reference is not to the tensor, because `torch.utils.swap_tensors`,
# which Module.to() may call, refuses tensors that have weak references.
_plans: tuple[dict[int, tuple[Plan, Any]], ...] = tuple({} for _ in Kind)


def is_spread(items: Sequence[Any]) -> bool:
    return any(map(is_dtensor, items))


def plan_of_plain(items: Sequence[Tensor], asked: Asked) -> Plan:
    """Return the plan for one group without DTensors; it is the same for any number of items."""
    return Plan(items[:1], [None] * len(items[:1]), asked)


def find_plan(items: Sequence[Tensor], asked: Asked, write: bool, kind: Kind) -> tuple[Plan, Any]:
    """Return a kept or new plan for these items, and the result of its `read`.

    Raises:
        ValueError: two of several process groups have more than this rank in common.
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
    """Do what `find_plan` does, with `plan` if it is for these items, else with a new one."""
    if plan is not None and not plan.is_for(asked):
        plan = None
    grads = None if plan is None else plan.read(items, write)
    if plan is None or grads is None:
        layouts = [layout_of(item) for item in items]
        if plan is None or not plan.fits(layouts):
            plan = Plan(items, layouts, asked, kind, group_of)
        grads = plan.read(items, write)
    if kind is Kind.ROWS:
        # Counted in each call: plain tensors have no layout by which a change would be noticed.
        plan.sizes = [_ops.count_rows(local_of(i)) if isinstance(i, Tensor) else 1 for i in items]
    return plan, grads
