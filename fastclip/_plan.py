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

from . import _mesh, _ops, _ranks
from ._reference import count_rows


class Kind(enum.IntEnum):
    """Which norms a plan is for: of all together, of each tensor, or of each row."""

    TOTAL = 0
    EACH = 1
    ROWS = 2


class Plan:
    """How the norms of a list of parameters, or of tensors, are put together: one for each label.

    First every slot over the dimensions of its mesh, then the sums of a label's slots over the
    groups `asked`. Labels count from 0; for EACH and ROWS the items are their own, and slots too.
    """

    def __init__(
        self,
        items: Sequence[Tensor],
        layouts: list[Any],
        asked: tuple[Any, ...],
        kind: Kind = Kind.TOTAL,
        labels: Sequence[int] | None = None,
        count: int = 1,
    ) -> None:
        self.asked, self.kind = asked, kind
        self.groups = _ranks.groups_of(asked)
        others = _ranks.by_key(self.groups)
        self.device = getattr(items[0], "device", None) if items else None
        if kind is not Kind.TOTAL:
            labels, count = range(len(items)), len(items)
        self._lay(layouts, [0] * len(items) if labels is None else labels)
        self.members: list[list[int]] = [[] for _ in range(count)]
        for i, (label, _) in enumerate(self.slots):
            self.members[label].append(i)
        self.mine = [[i for i in members if self.slots[i][1].mine] for members in self.members]
        every = list(range(len(self.members)))
        self.beyond = [
            _ranks.Step(group, _ranks.device_of(group), every) for group in others.values()
        ]
        # Every label has one slot, and that is all there is to its norm.
        self.is_flat = all(members == [i] for i, members in enumerate(self.members))
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
            names = (_mesh.LAYOUT, _mesh.INNER)
            self.wrapped = _ops.extension.Wrapped(layouts, self.slot_of, *names)
        self.result_layouts: dict[torch.dtype, Any] = {}
        self.warned = False

    def _watch(self, layouts: list[Any]) -> None:
        # Addresses tell layouts apart as long as all are alive, and the plan is `valid` so long.
        self.addresses = list(map(id, layouts))
        # What watches them may not know the plan, which would then wait for the cycle collector.
        self._alive = alive = [True]
        self._watched = {
            id(layout): weakref.ref(layout, lambda _: alive.clear()) for layout in layouts if layout
        }

    @property
    def valid(self) -> bool:
        return bool(self._alive)

    def _lay(self, layouts: list[Any], labels: Sequence[int]) -> None:
        """The slots, for each item the index of its own, and the steps over meshes."""
        groups: _ranks.Groups = {}
        meshes: dict[int, _mesh.Mesh] = {}
        reaches = list(map(_ranks.reached, self.asked))
        plain = _mesh.Slot(frozenset(), (), True)
        found: dict[tuple[int, int], tuple[int, _mesh.Slot]] = {}
        places: dict[_mesh.Slot, tuple] = {plain: ()}
        devices: dict[_ranks.Key, torch.device] = {}
        for label, layout in zip(labels, layouts, strict=True):
            if (label, id(layout)) in found:
                continue
            if layout is None:
                found[label, id(layout)] = label, plain
                continue
            if id(layout.mesh) not in meshes:
                meshes[id(layout.mesh)] = mesh = _mesh.Mesh(layout.mesh, reaches)
                for key, group in mesh.groups.items():
                    known = groups.setdefault(key, group)
                    groups[key] = min(known, group, key=lambda g: g.group_name)
                    devices[key] = _ranks.device_of(groups[key], layout.mesh.device_type)
            mesh = meshes[id(layout.mesh)]
            rows = self.kind is Kind.ROWS and len(layout.shape) > 1
            slot = mesh.slot(layout.placements, rows)
            found[label, id(layout)] = label, slot
            places[slot] = min(mesh.place, places.get(slot, mesh.place))
        # In an order on which ranks agree, for they send each other bare vectors; and before all by
        # what every rank of a mesh agrees on, so that all add up in the same order.
        order = {slot: (sorted(o for o, _ in slot.groups), place) for slot, place in places.items()}
        self.slots = sorted(set(found.values()), key=lambda one: (one[0], order[one[1]]))
        index = {slot: i for i, slot in enumerate(self.slots)}
        self.slot_of = [
            index[found[label, id(layout)]] for label, layout in zip(labels, layouts, strict=True)
        ]
        # See Note [order].
        steps = [
            _ranks.Step(groups[key], devices[key], self._spread_over(key)) for key in sorted(groups)
        ]
        self.within = [step for step in steps if step.members]
        self.all = [step._replace(members=[0]) for step in steps]

    def _spread_over(self, key: _ranks.Key) -> list[int]:
        return [i for i, (_, slot) in enumerate(self.slots) if key in slot.groups]

    def read(self, items: Sequence[Tensor], write: bool) -> Any:
        """What the extension reads at once; None where each item has to be looked at.

        Always None where `items` are others than the plan was made for.
        """
        if not self.direct:
            return None
        return self.wrapped.read_grads(items) if write else self.wrapped.take_tensors(items)

    def is_for(self, asked: tuple[Any, ...]) -> bool:
        if not self._alive or len(asked) != len(self.asked):
            return False
        # A slice of a mesh is a new object each time, with the groups of the last time.
        return all(map(operator.is_, asked, self.asked)) or (
            list(map(id, _ranks.groups_of(asked))) == list(map(id, self.groups))
        )

    def fits(self, layouts: Sequence[Any]) -> bool:
        """Whether this is the plan for items of these layouts: they are the very same objects."""
        return len(layouts) == len(self.addresses) and all(
            map(operator.eq, map(id, layouts), self.addresses)
        )

    def local(self, position: int, item: Tensor, write: bool) -> tuple[Tensor, Tensor]:
        """The gradient of an item, or the item, placed as planned; and what of it is here."""
        name = f"the gradient of parameters[{position}]" if write else f"tensors[{position}]"
        tensor, layout = item.grad if write else item, _mesh.layout_of(item)
        if layout is None and not _mesh.is_dtensor(tensor):
            return tensor, tensor
        both = layout is not None and _mesh.is_dtensor(tensor)
        wrapper = _mesh.placed(tensor, layout) if both else None
        if wrapper is None:
            raise TypeError(
                f"{name}: expected a {type(item.data).__name__} like the parameter, got a "
                f"{type(tensor).__name__}; make both DTensors of one mesh, or neither"
            )
        if wrapper is not tensor:
            self._warn(f"{name} is placed {tensor.placements}, not {wrapper.placements}")
            if write:
                item.grad = wrapper
        return wrapper, getattr(wrapper, _mesh.INNER)

    def _warn(self, what: str) -> None:
        if not self.warned:
            warnings.warn(
                f"{what}: it and others like it are redistributed at every call, one collective "
                "of the gradient's size each",
                stacklevel=9,
            )
        self.warned = True


# The plans of a list, kept with the layout of its first DTensor: a tensor that anything refers to
# weakly could no longer be swapped, as Module.to() swaps parameters.
_plans = tuple(WeakIdKeyDictionary() for _ in Kind)


def is_spread(items: Sequence[Any], process_group: Any) -> bool:
    return process_group is not None or any(map(_mesh.is_dtensor, items))


def find(
    items: Sequence[Tensor], process_group: Any, walks: bool, write: bool, kind: Kind
) -> tuple[Plan, Any]:
    """The plan for these parameters or tensors, and what the extension reads by it, if it `walks`.

    Raises:
        TypeError: `process_group` is no group, mesh, or several.
        ValueError: of several groups two share more than this rank.
    """
    asked = _ranks.as_groups(process_group)
    key = next((_mesh.layout_of(item) for item in items if _mesh.is_dtensor(item)), None)
    known = None if key is None else _plans[kind].get(key)
    plan, grads = follow(known, items, asked, walks, write, kind)
    if key is not None and plan is not known:
        _plans[kind][key] = plan
    return plan, grads


def follow(
    plan: Plan | None,
    items: Sequence[Tensor],
    asked: tuple[Any, ...],
    walks: bool,
    write: bool,
    kind: Kind = Kind.TOTAL,
    labels: Sequence[int] | None = None,
    count: int = 1,
) -> tuple[Plan, Any]:
    """As `find`, by the `plan` at hand, or a new one if that is not for these items any more."""
    known = plan is not None and plan.is_for(asked)
    grads = plan.read(items, write) if known and walks else None
    if grads is None:
        layouts = [_mesh.layout_of(item) for item in items]
        if not (known and plan.fits(layouts)):
            plan = Plan(items, layouts, asked, kind, labels, count)
        grads = plan.read(items, write) if walks else None
    if kind is Kind.ROWS:
        # A layout does not tell them: plain tensors have none.
        plan.sizes = [count_rows(_mesh.local_of(item)) for item in items]
    return plan, grads
