"""How the norms of spread gradients are put together: a pure function of where those are placed.

Every slot is added up over the dimensions of its mesh, then the sums of a label's slots over the
process groups that are asked for. Only these few float64 numbers travel.
"""

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .failure import NUMBERS
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
    # Of each label how many slots there are, and which of them count beyond their meshes; after
    # those its flag, if it has one.
    counts: list[int]
    members: list[list[int]]
    # What is sent over meshes besides a part of each slot: see parts.py.
    beside: int
    # First over meshes, of slots; those that cut none are only for ranks to agree.
    steps: list[Step]
    # Then over what is asked for, of labels.
    beyond: list[Step]
    # Why ranks cannot have one norm, if they cannot.
    crossing: str | None

    @functools.cached_property
    def sends(self) -> bool:
        return bool(self.steps or self.beyond)

    @functools.cached_property
    def adding(self) -> list[Step]:
        """The steps over meshes that cut a slot."""
        return [step for step in self.steps if len(step.members) > self.beside]

    @functools.cached_property
    def is_flat(self) -> bool:
        """Whether every label has one slot, that counts beyond its mesh: all there is to it."""
        flat = [[i] for i in range(len(self.counts))]
        one_each = [some[:1] for some in self.members] == flat and len(self.slots) == len(flat)
        return self.kind is not Kind.COUNT and one_each

    @functools.cached_property
    def line(self) -> list[Step] | None:
        """The steps over which the part of one slot is added up, if that is all there is to it.

        Each of them sends it alone.
        """
        is_line = self.kind is Kind.TOTAL and self.is_flat and len(self.slots) == 1
        return self.adding if is_line and self.steps and not self.beyond else None


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
    reaches = list(map(reached, asked))
    places = _places(layouts, kind)
    slot_at = functools.cache(Place.slot)
    keys = list(zip(owners, places, strict=True))
    found = {k: slot_at(k[1], reaches[label]) for k, label in zip(keys, labels, strict=True)}
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
    flags = len(asked) if kind in (Kind.TOTAL, Kind.COUNT) else 0
    beside, over_meshes, beyond = _collectives(places, slots, groups, flags)
    for label in range(flags if beside else 0):
        members[label].append(len(slots) + label)
    return Reduction(
        kind=kind,
        groups=groups,
        slots=slots,
        slot_of=[index[key[0], found[key]] for key in keys],
        label_of=label_of,
        counts=counts,
        members=members,
        beside=beside,
        steps=over_meshes,
        beyond=beyond,
        crossing=_crossing(labels, places, reaches),
    )


class Place:
    """Where all items lie that have one mesh and placements; plain ones have none."""

    def __init__(self, mesh: Mesh | None, placements: Sequence[Any], rows: bool) -> None:
        self.mesh, self.placements, self.rows = mesh, placements, rows

    def slot(self, reach: frozenset[int]) -> Slot:
        if self.mesh is None:
            return Slot(frozenset(), 0, True)
        return self.mesh.slot(self.placements, self.rows, reach)


def _places(layouts: Sequence[Any], kind: Kind) -> list[Place]:
    """Of each item its place. There are few of them, and all beyond this counts by those."""
    plain = Place(None, (), False)
    meshes: dict[int, Mesh] = {}
    found: dict[Any, Place] = {}
    places = []
    for layout in layouts:
        if layout is None:
            places.append(plain)
            continue
        rows = kind is Kind.ROWS and len(layout.shape) > 1
        key = id(layout.mesh), layout.placements, rows
        if key not in found:
            if key[0] not in meshes:
                meshes[key[0]] = Mesh(layout.mesh, meshes.values())
            found[key] = Place(meshes[key[0]], layout.placements, rows)
        places.append(found[key])
    return places


def _collectives(
    places: Sequence[Place], slots: Sequence[Slot], groups: list[list[Any]], flags: int
) -> tuple[int, list[Step], list[Step]]:
    """How many numbers go beside slots; the steps over meshes, and beyond, with all members."""
    meshes = dict.fromkeys(place.mesh for place in places if place.mesh is not None)
    over_meshes, beyond = steps(meshes, slots), steps_beyond(groups)
    beside = flags + NUMBERS if over_meshes or beyond else 0
    for step in over_meshes:
        step.members.extend(range(len(slots), len(slots) + beside))
    for step in beyond:
        step.members.extend(range(len(groups), len(groups) + NUMBERS + 1))
    return beside, over_meshes, beyond


def _in_order(found: dict[tuple[int, Place], Slot]) -> list[tuple[int, Slot]]:
    """Owners and slots, in an order on which ranks agree, for they send each other bare vectors.

    Before all by what every rank of a mesh agrees on, so that all add up in the same order.
    """
    known: dict[Slot, tuple[Any, ...]] = {}
    for slot, place in {(slot, place) for (_, place), slot in found.items()}:
        mesh = place.mesh.known if place.mesh is not None else ()
        known[slot] = min(mesh, known.get(slot, mesh))
    # From the last step down: what the first steps take then often lies together, at the end.
    orders = {slot: sorted((o for o, _ in slot.groups), reverse=True) for slot in known}
    order = {slot: (orders[slot], mesh) for slot, mesh in known.items()}
    pairs = {(owner, slot) for (owner, _), slot in found.items()}
    return sorted(pairs, key=lambda pair: (pair[0], order[pair[1]]))


def _crossing(
    labels: Sequence[int], places: list[Place], reaches: list[frozenset[int]]
) -> str | None:
    together: dict[int, dict[Mesh, None]] = {}
    for label, place in dict.fromkeys(zip(labels, places, strict=True)):
        if place.mesh is not None:
            together.setdefault(label, {})[place.mesh] = None
    each = (crossing(some, reaches[label]) for label, some in together.items())
    return next(filter(None, each), None)
