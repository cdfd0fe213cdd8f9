"""Plans: how ranks that hold different gradients put one norm together.

A plan is made of the parameters alone, never of gradients, so that every rank takes part in the
same collectives in the same order whatever it holds. Only a few float64 numbers travel, but for
gradients that are not placed as their parameters: those are redistributed first.
"""

import enum
import operator
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _ops
from .groups import groups_of, reached, steps_beyond
from .mesh import (
    INNER,
    LAYOUT,
    Mesh,
    Slot,
    crossing,
    is_dtensor,
    layout_of,
    local_of,
    placed,
    steps,
)


class Kind(enum.IntEnum):
    """Which norms a plan is for: of all together, of each tensor, or of each row.

    COUNT is of all together by the norms of each tensor, as order 0 wants, which counts those.
    """

    TOTAL = 0
    EACH = 1
    ROWS = 2
    COUNT = 3

    @classmethod
    def of_order(cls, p: float) -> "Kind":
        return cls.COUNT if p == 0 else cls.TOTAL


# The process groups, or meshes, that are asked for, of each label.
Asked = Sequence[tuple[Any, ...]]
NONE: Asked = ((),)


class Plan:
    """How the norms of a list of parameters, or of tensors, are put together: one for each label.

    First every slot over the dimensions of its mesh, then the sums of a label's slots over the
    groups that it has `asked` for. Labels count from 0; for EACH and ROWS the items are their own.
    """

    def __init__(
        self,
        items: Sequence[Tensor],
        layouts: list[Any],
        asked: Asked,
        kind: Kind = Kind.TOTAL,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.kind, self.asked = kind, asked
        self.groups = list(map(groups_of, asked))
        if kind in (Kind.EACH, Kind.ROWS):
            labels, asked = range(len(items)), [()] * len(items)
        self.device = getattr(items[0], "device", None) if items else None
        reaches = list(map(reached, asked))
        self._lay(layouts, [0] * len(items) if labels is None else labels, reaches)
        # Of each label how many slots there are, and which of them count beyond their meshes.
        self.counts = [0] * len(asked)
        self.members: list[list[int]] = [[] for _ in asked]
        for i, (label, slot) in enumerate(zip(self.label_of, self.slots, strict=True)):
            self.counts[label] += 1
            self.members[label] += [i] * slot.mine
        self.beyond = steps_beyond(self.groups)
        self.sends = bool(self.steps or self.beyond)
        # The steps to which some label adds nothing.
        labels = set(range(len(asked)))
        self.open = [{self.label_of[i] for i in step.members} != labels for step in self.steps]
        # Every label has one slot, that counts beyond its mesh: all there is to its norm.
        flat = [[i] for i in range(len(asked))]
        one_each = self.members == flat and len(self.slots) == len(flat)
        self.is_flat = kind is not Kind.COUNT and one_each
        # Of ROWS, how many each item has here.
        self.sizes: list[int] | None = None
        dtensors = [layout for layout in layouts if layout]
        wide = (torch.float64, torch.complex128)
        self.wide = any(layout.tensor_meta.dtype in wide for layout in dtensors)
        one = len(dtensors) == len(layouts) > 0 and all(
            layout.mesh == layouts[0].mesh for layout in layouts
        )
        self.mesh = layouts[0].mesh if one else None
        self.direct = _ops.extension is not None and not any(
            p.is_partial() for layout in dtensors for p in layout.placements
        )
        self._watch(layouts)
        if self.direct:
            names = (LAYOUT, INNER)
            self.wrapped = _ops.extension.Wrapped(layouts, self.slot_of, *names)
        self.result_layouts: dict[torch.dtype, Any] = {}
        self.warned = False

    def _watch(self, layouts: list[Any]) -> None:
        # Addresses tell layouts apart as long as all are alive, and the plan is for them so long.
        self.addresses = list(map(id, layouts))
        # What watches them may not know the plan, which would then wait for the cycle collector.
        self._alive = alive = [True]
        self._watched = {
            id(layout): weakref.ref(layout, lambda _: alive.clear()) for layout in layouts if layout
        }

    def _lay(self, layouts: list[Any], labels: Sequence[int], reaches: list[set[int]]) -> None:
        """The slots, of each its label, for each item the index of its own, and the steps."""
        meshes: dict[int, Mesh] = {}
        together: dict[int, dict[int, Mesh]] = {}
        plain = Slot(frozenset(), (), True)
        # By label, or item, and layout.
        found: dict[tuple[int, int], Slot] = {}
        places: dict[Slot, tuple] = {plain: ()}
        owners = labels if self.kind is Kind.TOTAL else range(len(layouts))
        for owner, label, layout in zip(owners, labels, layouts, strict=True):
            if (owner, id(layout)) in found:
                continue
            if layout is None:
                found[owner, id(layout)] = plain
                continue
            if id(layout.mesh) not in meshes:
                meshes[id(layout.mesh)] = Mesh(layout.mesh)
            mesh = meshes[id(layout.mesh)]
            together.setdefault(label, {})[id(mesh)] = mesh
            rows = self.kind is Kind.ROWS and len(layout.shape) > 1
            found[owner, id(layout)] = slot = mesh.slot(layout.placements, rows, reaches[label])
            places[slot] = min(mesh.place, places.get(slot, mesh.place))
        # In an order on which ranks agree, for they send each other bare vectors; and before all by
        # what every rank of a mesh agrees on, so that all add up in the same order.
        order = {slot: (sorted(o for o, _ in slot.groups), place) for slot, place in places.items()}
        pairs = {(owner, slot) for (owner, _), slot in found.items()}
        slots = sorted(pairs, key=lambda one: (one[0], order[one[1]]))
        self.slots = [slot for _, slot in slots]
        index = {pair: i for i, pair in enumerate(slots)}
        self.slot_of = [
            index[owner, found[owner, id(layout)]]
            for owner, layout in zip(owners, layouts, strict=True)
        ]
        label_of = dict(zip(owners, labels, strict=True))
        self.label_of = [label_of[owner] for owner, _ in slots]
        self.steps = steps(meshes.values(), self.slots)
        each = (crossing(some.values(), reaches[label]) for label, some in together.items())
        self.crossing = next(filter(None, each), None)

    def read(self, items: Sequence[Tensor], write: bool) -> Any:
        """What the extension reads at once; None where each item has to be looked at.

        Always None where `items` are others than the plan was made for.
        """
        if not self.direct:
            return None
        return self.wrapped.read_grads(items) if write else self.wrapped.take_tensors(items)

    def is_for(self, asked: Asked) -> bool:
        if not self._alive or asked is self.asked:
            return bool(self._alive)
        # A slice of a mesh is a new object each time, with the groups of the last time.
        now = map(groups_of, asked)
        return [list(map(id, some)) for some in now] == [list(map(id, g)) for g in self.groups]

    def fits(self, layouts: Sequence[Any]) -> bool:
        """Whether this is the plan for items of these layouts: they are the very same objects."""
        return len(layouts) == len(self.addresses) and all(
            map(operator.eq, map(id, layouts), self.addresses)
        )

    def local(self, item: Tensor, tensor: Tensor, name: str, write: bool) -> tuple[Tensor, Tensor]:
        """`tensor`, the gradient of an item or the item, placed as planned; and what is here."""
        wrapper = placed(tensor, layout_of(item), name)
        if wrapper is not tensor:
            self._warn(f"{name} is placed {tensor.placements}, not {wrapper.placements}")
            if write:
                item.grad = wrapper
        return wrapper, local_of(wrapper)

    def _warn(self, what: str) -> None:
        if not self.warned:
            warnings.warn(
                f"{what}: it and others like it are redistributed at every call, one collective "
                "of the gradient's size each",
                stacklevel=11,
            )
        self.warned = True


# The plans of a list, kept with the layout of its first DTensor: a tensor that anything refers to
# weakly could no longer be swapped, as Module.to() swaps parameters.
_plans = tuple(WeakIdKeyDictionary() for _ in Kind)


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
    known = None if key is None else _plans[kind].get(key)
    plan, grads = follow(known, items, asked, at_once, write, kind)
    if key is not None and plan is not known:
        _plans[kind][key] = plan
    return plan, grads


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
    known = plan is not None and plan.is_for(asked)
    grads = plan.read(items, write) if known and at_once else None
    if grads is None:
        layouts = [layout_of(item) for item in items]
        if not (known and plan.fits(layouts)):
            plan = Plan(items, layouts, asked, kind, labels)
        grads = plan.read(items, write) if at_once else None
    if kind is Kind.ROWS:
        # A layout does not tell them: plain tensors have none.
        plan.sizes = [_ops.count_rows(local_of(item)) for item in items]
    return plan, grads
