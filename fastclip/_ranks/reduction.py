"""How the norms of spread gradients are put together: a pure function of where those are placed.

Every slot is added up over the dimensions of its mesh, then the sums of a label's slots over the
process groups that are asked for. Only these few float64 numbers travel.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .groups import Step, groups_of, reached, steps_beyond
from .mesh import Mesh, Slot, crossing, steps

# The process groups, or meshes, that are asked for, of each label.
Asked = Sequence[tuple[Any, ...]]
NONE: Asked = ((),)


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


@dataclass(frozen=True)
class Reduction:
    """What this rank does of it, as all other ranks of a step do.

    A label is the number of a norm. A slot is what counts to one norm and is spread over the same
    process groups.
    """

    kind: Kind
    # What is asked for of each label, as process groups.
    groups: list[list[Any]]
    slots: list[Slot]
    # Of each item its slot, and of each slot its label.
    slot_of: list[int]
    label_of: list[int]
    # Of each label how many slots there are, and which of them count beyond their meshes.
    counts: list[int]
    members: list[list[int]]
    # First over meshes, of slots, then over what is asked for, of labels.
    steps: list[Step]
    beyond: list[Step]
    # Why ranks cannot have one norm, if they cannot.
    crossing: str | None

    @cached_property
    def sends(self) -> bool:
        return bool(self.steps or self.beyond)

    @cached_property
    def tells_wide(self) -> bool:
        """Whether a step beyond is over a group on the CPU, where one more number can be read."""
        return any(len(self.counts) in step.members for step in self.beyond)

    @cached_property
    def open(self) -> list[bool]:
        """Of each step over meshes whether some label adds nothing to it."""
        every = set(range(len(self.counts)))
        return [{self.label_of[i] for i in step.members} != every for step in self.steps]

    @cached_property
    def is_flat(self) -> bool:
        """Whether every label has one slot, that counts beyond its mesh: all there is to it."""
        flat = [[i] for i in range(len(self.counts))]
        one_each = self.members == flat and len(self.slots) == len(flat)
        return self.kind is not Kind.COUNT and one_each

    @cached_property
    def line(self) -> list[Step] | None:
        """The steps over which one number is added up, if that is all there is to it."""
        is_line = self.is_flat and len(self.slots) == 1 and not self.beyond
        return [step for step in self.steps if step.members] if is_line else None


def reduction(
    layouts: Sequence[Any], asked: Asked, kind: Kind, labels: Sequence[int] | None = None
) -> Reduction:
    """Of items of these layouts, None for a plain one, and their labels: all 0 if not given.

    For EACH and ROWS the items are their own labels.

    Raises:
        ValueError: two groups that are asked for share more than this rank.
    """
    groups = list(map(groups_of, asked))
    if kind in (Kind.EACH, Kind.ROWS):
        labels, asked = range(len(layouts)), [()] * len(layouts)
    labels = [0] * len(layouts) if labels is None else labels
    # Items that share a slot if they are placed alike.
    owners = labels if kind is Kind.TOTAL else range(len(layouts))
    items = list(zip(owners, labels, layouts, strict=True))
    reaches = list(map(reached, asked))
    meshes: dict[int, Mesh] = {}
    for layout in layouts:
        if layout is not None and id(layout.mesh) not in meshes:
            meshes[id(layout.mesh)] = Mesh(layout.mesh)
    found = _slots(items, meshes, reaches, kind)
    ordered = _in_order(found)
    slots = [slot for _, slot in ordered]
    index = {pair: i for i, pair in enumerate(ordered)}
    label_of_owner = dict(zip(owners, labels, strict=True))
    label_of = [label_of_owner[owner] for owner, _ in ordered]
    counts = [0] * len(asked)
    members: list[list[int]] = [[] for _ in asked]
    for i, (label, slot) in enumerate(zip(label_of, slots, strict=True)):
        counts[label] += 1
        members[label] += [i] * slot.speaks
    return Reduction(
        kind=kind,
        groups=groups,
        slots=slots,
        slot_of=[index[owner, found[owner, id(layout)][0]] for owner, _, layout in items],
        label_of=label_of,
        counts=counts,
        members=members,
        steps=steps(meshes.values(), slots),
        beyond=steps_beyond(groups),
        crossing=_crossing(items, meshes, reaches),
    )


# An owner, its label and its layout.
Item = tuple[int, int, Any]
# Of a mesh, empty without one.
Place = tuple[tuple[int, ...], ...]


def _slots(
    items: list[Item], meshes: dict[int, Mesh], reaches: list[set[int]], kind: Kind
) -> dict[tuple[int, int], tuple[Slot, Place]]:
    """By owner and layout the slot, and the place of its mesh."""
    found: dict[tuple[int, int], tuple[Slot, Place]] = {}
    for owner, label, layout in items:
        if (owner, id(layout)) in found:
            continue
        if layout is None:
            found[owner, id(layout)] = Slot(frozenset(), (), True), ()
            continue
        mesh = meshes[id(layout.mesh)]
        rows = kind is Kind.ROWS and len(layout.shape) > 1
        slot = mesh.slot(layout.placements, rows, reaches[label])
        found[owner, id(layout)] = slot, mesh.place
    return found


def _in_order(found: dict[tuple[int, int], tuple[Slot, Place]]) -> list[tuple[int, Slot]]:
    """Owners and slots, in an order on which ranks agree, for they send each other bare vectors.

    Before all by what every rank of a mesh agrees on, so that all add up in the same order.
    """
    places: dict[Slot, Place] = {}
    for slot, place in found.values():
        places[slot] = min(place, places.get(slot, place))
    order = {slot: (sorted(o for o, _ in slot.groups), place) for slot, place in places.items()}
    pairs = {(owner, slot) for (owner, _), (slot, _) in found.items()}
    return sorted(pairs, key=lambda pair: (pair[0], order[pair[1]]))


def _crossing(items: list[Item], meshes: dict[int, Mesh], reaches: list[set[int]]) -> str | None:
    together: dict[int, dict[int, Mesh]] = {}
    for _, label, layout in items:
        if layout is not None:
            together.setdefault(label, {})[id(layout.mesh)] = meshes[id(layout.mesh)]
    each = (crossing(some.values(), reaches[label]) for label, some in together.items())
    return next(filter(None, each), None)
