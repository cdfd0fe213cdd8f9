"""Which ranks add up the norms of which gradients: a pure function of where gradients are placed.

A slot is a set of gradients of one group that are sharded over the same ranks. It has one number,
which is first added up over the dimensions of its mesh. All slots of a group are then added up
together, over the process groups that the caller passed. The collectives are in parts.py.
"""

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .failure import NUMBERS
from .groups import Step, group_steps, groups_of, reachable_ranks
from .mesh import Mesh, Slot, find_crossing, mesh_steps

# For each group of gradients, the process groups or meshes that the caller passed.
Asked = Sequence[tuple[Any, ...]]
NONE: Asked = ((),)


class Kind(enum.IntEnum):
    """Which norms a plan is for: of all tensors together (TOTAL), of each one, or of each row.

    COUNT is for one norm of order 0: the number of tensors with a nonzero norm.
    """

    TOTAL = 0
    EACH = 1
    ROWS = 2
    COUNT = 3

    @classmethod
    def of_order(cls, p: float) -> "Kind":
        return cls.COUNT if p == 0 else cls.TOTAL

    @property
    def is_each(self) -> bool:
        """Return whether each item has norms of its own."""
        return self in (Kind.EACH, Kind.ROWS)


@dataclass(frozen=True)
class Reduction:
    """The collectives that this rank takes part in; the other ranks in them plan the same ones.

    A group is a set of gradients with one norm. A slot holds the gradients of a group that are
    sharded over the same process groups.
    """

    kind: Kind
    # For each group, the process groups that the caller passed.
    process_groups: list[list[Any]]
    # The slot of each item, and the group of each slot.
    slot_of: list[int]
    group_of: list[int]
    # For each group, how many slots it has; and what this rank adds to sums over process groups:
    # the indices of some of these slots, then that of the group's flag, if there are flags.
    counts: list[int]
    members: list[list[int]]
    # How many values follow the parts of slots in sums over meshes: see parts.py.
    beside: int
    # First the sums of slots over meshes. A step in which no slot is sharded only lets ranks agree.
    mesh_steps: list[Step]
    # Then the sums of groups over the process groups that the caller passed.
    group_steps: list[Step]
    # The reason why the gradients of a group cannot share one norm; None if they can.
    crossing: str | None

    @functools.cached_property
    def sends(self) -> bool:
        return bool(self.mesh_steps or self.group_steps)

    @functools.cached_property
    def adding_steps(self) -> list[Step]:
        """Return the steps over meshes in which a slot is sharded."""
        return [step for step in self.mesh_steps if len(step.members) > self.beside]


def reduction(
    layouts: Sequence[Any], asked: Asked, kind: Kind, group_of: Sequence[int] | None = None
) -> Reduction:
    """Plan the sums for items with these layouts; the layout of a plain tensor is None.

    `group_of` is the group of each item, by default 0. For EACH and ROWS no process group is asked
    for, and each item has a slot of its own.

    Raises:
        ValueError: two process groups in `asked` have more than this rank in common.
    """
    process_groups = list(map(groups_of, asked))
    group_of = [0] * len(layouts) if group_of is None else group_of
    # An owner is a group (TOTAL) or an item. Items of one owner share a slot if placed alike.
    owners = group_of if kind is Kind.TOTAL else range(len(layouts))
    reaches = list(map(reachable_ranks, asked))
    places = _places(layouts, kind)
    slot_at = functools.cache(Place.slot)
    keys = list(zip(owners, places, strict=True))
    found = {k: slot_at(k[1], reaches[group]) for k, group in zip(keys, group_of, strict=True)}
    ordered = _in_order(found)
    slots = [slot for _, slot in ordered]
    index = {pair: i for i, pair in enumerate(ordered)}
    group_of_owner = dict(zip(owners, group_of, strict=True))
    group_of_slot = [group_of_owner[owner] for owner, _ in ordered]
    counts = [0] * len(asked)
    members: list[list[int]] = [[] for _ in asked]
    for i, (group, slot) in enumerate(zip(group_of_slot, slots, strict=True)):
        counts[group] += 1
        members[group] += [i] * slot.counts_for_mesh
    flags = 0 if kind is Kind.ROWS else len(asked)
    beside, mesh_steps, group_steps = _collectives(places, slots, process_groups, flags)
    for group in range(flags if beside else 0):
        members[group].append(len(slots) + group)
    return Reduction(
        kind=kind,
        process_groups=process_groups,
        slot_of=[index[key[0], found[key]] for key in keys],
        group_of=group_of_slot,
        counts=counts,
        members=members,
        beside=beside,
        mesh_steps=mesh_steps,
        group_steps=group_steps,
        crossing=None if kind.is_each else _find_crossing(group_of, places, reaches),
    )


class Place:
    """A mesh and placements, which many items may share; the mesh of plain items is None."""

    def __init__(self, mesh: Mesh | None, placements: Sequence[Any], rows: bool) -> None:
        self.mesh, self.placements, self.rows = mesh, placements, rows

    def slot(self, reach: frozenset[int]) -> Slot:
        if self.mesh is None:
            return Slot(frozenset(), 0, True)
        return self.mesh.slot(self.placements, self.rows, reach)


def _places(layouts: Sequence[Any], kind: Kind) -> list[Place]:
    """Return the place of each item; places are few, and a slot is computed once for each."""
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
    places: Sequence[Place], slots: Sequence[Slot], process_groups: list[list[Any]], flags: int
) -> tuple[int, list[Step], list[Step]]:
    """Return `beside`, the steps over meshes and the steps over process groups."""
    meshes = dict.fromkeys(place.mesh for place in places if place.mesh is not None)
    over_meshes, beyond = mesh_steps(meshes, slots), group_steps(process_groups)
    beside = flags + NUMBERS if over_meshes or beyond else 0
    for step in over_meshes:
        step.members.extend(range(len(slots), len(slots) + beside))
    for step in beyond:
        step.members.extend(range(len(process_groups), len(process_groups) + NUMBERS + 1))
    return beside, over_meshes, beyond


def _in_order(found: dict[tuple[int, Place], Slot]) -> list[tuple[int, Slot]]:
    """Return pairs of owner and slot in an order that ranks agree on, since ranks send no names.

    The order follows from facts that all ranks of a mesh know.
    """
    known: dict[Slot, tuple[Any, ...]] = {}
    for slot, place in {(slot, place) for (_, place), slot in found.items()}:
        mesh = place.mesh.known if place.mesh is not None else ()
        known[slot] = min(mesh, known.get(slot, mesh))
    # Slots are sorted by their last step: the members of first steps are then often consecutive.
    orders = {slot: sorted((o for o, _ in slot.groups), reverse=True) for slot in known}
    order = {slot: (orders[slot], mesh) for slot, mesh in known.items()}
    pairs = {(owner, slot) for (owner, _), slot in found.items()}
    return sorted(pairs, key=lambda pair: (pair[0], order[pair[1]]))


def _find_crossing(
    group_of: Sequence[int], places: list[Place], reaches: list[frozenset[int]]
) -> str | None:
    together: dict[int, dict[Mesh, None]] = {}
    for group, place in dict.fromkeys(zip(group_of, places, strict=True)):
        if place.mesh is not None:
            together.setdefault(group, {})[place.mesh] = None
    each = (find_crossing(some, reaches[group]) for group, some in together.items())
    return next(filter(None, each), None)
