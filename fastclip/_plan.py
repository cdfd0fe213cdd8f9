"""Plans: how ranks that hold different gradients put one norm together.

A plan is made of the parameters alone, never of gradients, so that every rank takes part in the
same collectives in the same order whatever it holds. Only a few float64 numbers travel, but for
gradients that are not placed as their parameters: those are redistributed first.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import _mesh, _ops, _ranks
from ._reference import clip_coef, result_dtype


class Plan:
    """How the norm of a list of parameters, or of tensors, is put together.

    First every slot over its mesh dimensions. Then the slots with the same way beyond their meshes
    are one, and ranks with other parameters add theirs.
    """

    def __init__(self, items: Sequence[Tensor], asked: tuple[Any, ...]) -> None:
        self.asked = asked
        self.others = _ranks.by_key(asked)
        self.layouts = [_mesh.layout_of(item) for item in items]
        self.wide = result_dtype(items) == torch.float64
        self._lay_slots()
        every = [*self.others.values(), *self.groups.values()]
        self.device = (
            items[0].device if items else _ranks.device_of(every[0]) if every else _ranks.CPU
        )
        self._lay_steps()
        self.direct = _ops.extension is not None and not any(
            p.is_partial() for layout in self.layouts if layout for p in layout.placements
        )
        if self.direct:
            self.wrapped = _ops.extension.Wrapped(
                self.layouts, self.slot_of, _mesh.LAYOUT, _mesh.INNER
            )
        self.result_layout = _mesh.replicated(self.layouts, result_dtype(items))
        self.warned = False

    def _lay_slots(self) -> None:
        """`slots`, and for each item the index of its own."""
        self.groups: _ranks.Groups = {}
        meshes: dict[int, _mesh.Mesh] = {}
        found: dict[int, _mesh.Slot] = {id(None): _mesh.Slot(frozenset(), frozenset(self.others))}
        order: dict[_mesh.Slot, tuple] = {found[id(None)]: ()} if None in self.layouts else {}
        for position, layout in enumerate(self.layouts):
            if id(layout) in found:
                continue
            if id(layout.mesh) not in meshes:
                meshes[id(layout.mesh)] = mesh = _mesh.Mesh(layout.mesh, self.others, position)
                for key, group in mesh.groups.items():
                    known = self.groups.setdefault(key, group)
                    self.groups[key] = min(known, group, key=lambda g: g.group_name)
            slot, place = meshes[id(layout.mesh)].slot(layout.placements)
            found[id(layout)] = slot
            order[slot] = min(place, order.get(slot, place))
        # By what all ranks of a group agree on, for they send each other bare vectors.
        self.slots = sorted(order, key=order.__getitem__)
        index = {slot: i for i, slot in enumerate(self.slots)}
        self.slot_of = [index[found[id(layout)]] for layout in self.layouts]

    def _lay_steps(self) -> None:
        # Ranks with other parameters may have other slots, but all know every way there could be.
        sizes = range(len(self.others) + 1)
        ways = [frozenset(w) for n in sizes for w in itertools.combinations(self.others, n)]
        self.ways = [[i for i, s in enumerate(self.slots) if s.beyond == way] for way in ways]
        # See Note [order].
        groups = dict(sorted(self.groups.items(), key=lambda item: item[0]))
        self.within = self._steps(groups, [slot.within for slot in self.slots])
        self.beyond = self._steps(self.others, ways)
        self.all = self._steps(every := groups | self.others, [frozenset(every)])

    def _steps(
        self, groups: _ranks.Groups, sets: Sequence[frozenset[_ranks.Key]]
    ) -> list[_ranks.Step]:
        steps = []
        for key, group in groups.items():
            device = (
                None if self.device.type in _ranks.served_by(group) else _ranks.device_of(group)
            )
            if members := [i for i, some in enumerate(sets) if key in some]:
                steps.append(_ranks.Step(group, device, members))
        return steps

    def read(self, items: Sequence[Tensor], write: bool) -> Any:
        """What the extension reads at once; None where each item has to be looked at.

        Always None where `items` are others than the plan was made for.
        """
        if not self.direct:
            return None
        return self.wrapped.read_grads(items) if write else self.wrapped.take_tensors(items)

    def fits(self, items: Sequence[Tensor]) -> bool:
        """Whether this is the plan for `items`: their layouts are the very same objects."""
        return len(items) == len(self.layouts) and all(
            _mesh.layout_of(item) is known for item, known in zip(items, self.layouts, strict=True)
        )

    def local(self, position: int, item: Tensor, write: bool) -> tuple[Tensor, Tensor]:
        """The gradient of an item, or the item, placed as planned; and what of it is here."""
        name = f"the gradient of parameters[{position}]" if write else f"tensors[{position}]"
        tensor, layout = item.grad if write else item, self.layouts[position]
        if _mesh.is_dtensor(tensor) != (layout is not None):
            raise TypeError(
                f"{name}: expected a {type(item.data).__name__} as the parameter is, got a "
                f"{type(tensor).__name__}; make both DTensors of one mesh, or neither"
            )
        if layout is None:
            return tensor, tensor
        wrapper = _mesh.placed(tensor, layout)
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
                stacklevel=7,
            )
        self.warned = True


class MeshGrads:
    """The gradients of all ranks, with the verbs of the local ones."""

    def __init__(self, local: Any, plan: Plan) -> None:
        self.local, self.plan = local, plan

    def __len__(self) -> int:
        return len(self.local)

    def norm(self, p: float) -> Tensor:
        return self._result(self._norm(p))

    def scale_(self, coef: Tensor) -> None:
        self.local.scale_(coef)

    def clamp_(self, bound: float) -> None:
        self.local.clamp_(bound)

    def clip_norm_(self, max_norm: float | Tensor, p: float) -> Tensor:
        total_norm = self._norm(p)
        self.local.scale_(clip_coef(total_norm, max_norm))
        return self._result(total_norm)

    def agreed(self, total_norm: Tensor) -> Tensor:
        """`total_norm`, or NaN where that of any other rank is not finite."""
        bad = (~total_norm.isfinite()).double().reshape(1)
        for step in self.plan.all:
            bad = _ranks.all_reduce(step, bad, "MAX")
        return total_norm.masked_fill(bad[0] > 0, math.nan)

    @torch.no_grad()
    def _norm(self, p: float) -> Tensor:
        if not p > 0:
            raise ValueError(
                f"norm_type: expected an order > 0 for gradients spread over ranks, got {p}"
            )
        plan, norms = self.plan, self.local.norms(p)
        if missing := len(plan.slots) - len(norms):
            norms = torch.cat([norms, norms.new_zeros(missing)])
        parts = _ranks.as_parts(norms.to(plan.device), p)
        for step in plan.within:
            parts = _ranks.over(step, parts, p)
        if plan.beyond:
            parts = torch.stack([_ranks.added(_ranks.pick(parts, way), p) for way in plan.ways])
            for step in plan.beyond:
                parts = _ranks.over(step, parts, p)
        total_norm = _ranks.as_norm(_ranks.added(parts, p), p)
        return total_norm if plan.wide else total_norm.float()

    def _result(self, total_norm: Tensor) -> Tensor:
        layout = self.plan.result_layout
        return total_norm if layout is None else _mesh.as_replicated(total_norm, layout)


# The plan of a list, kept with the first of its parameters.
_plans = WeakTensorKeyDictionary()


def find(
    items: Sequence[Tensor], process_group: Any, walks: bool, write: bool
) -> tuple[Plan | None, Any]:
    """The plan for these parameters or tensors, and what the extension reads by it, if it `walks`.

    No plan where nothing is spread over ranks.

    Raises:
        TypeError: `process_group` is no group, mesh, or several.
        ValueError: a DTensor's mesh has some of the ranks of a group, and not all.
    """
    asked = _ranks.as_groups(process_group)
    if not (asked or any(map(_mesh.is_dtensor, items))):
        return None, None
    plan = _plans.get(items[0]) if items and isinstance(items[0], Tensor) else None
    if plan is not None and plan.asked == asked:
        if walks and (grads := plan.read(items, write)) is not None:
            return plan, grads
        if plan.fits(items):
            return plan, None
    if not all(isinstance(item, Tensor) for item in items):
        return None, None
    plan = Plan(items, asked)
    if items:
        _plans[items[0]] = plan
    return plan, plan.read(items, write) if walks else None
