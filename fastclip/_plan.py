"""Plans: how ranks that hold different gradients put one norm together.

A plan is made of the parameters alone, never of gradients, so that every rank takes part in the
same collectives in the same order whatever it holds. Only a few float64 numbers travel, but for
gradients that are not placed as their parameters: those are redistributed first.
"""

import math
import operator
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import _mesh, _ops, _ranks
from ._reference import clip_coef


class Plan:
    """How the norm of a list of parameters, or of tensors, is put together.

    First every slot over the dimensions of its mesh, then the sum of all over the groups `asked`.
    """

    def __init__(self, items: Sequence[Tensor], layouts: list[Any], asked: tuple[Any, ...]) -> None:
        self.asked = asked
        self.others = _ranks.by_key(asked)
        self.device = getattr(items[0], "device", None) if items else None
        self._lay(layouts)
        self.mine = [i for i, slot in enumerate(self.slots) if slot.mine]
        self.beyond = [
            _ranks.Step(group, _ranks.device_of(group), [0]) for group in self.others.values()
        ]
        dtensors = [layout for layout in layouts if layout]
        self.wide = any(layout.tensor_meta.dtype == torch.float64 for layout in dtensors)
        one = len(dtensors) == len(layouts) > 0 and all(
            layout.mesh == layouts[0].mesh for layout in layouts
        )
        self.mesh = layouts[0].mesh if one else None
        self.direct = _ops.extension is not None and not any(
            p.is_partial() for layout in dtensors for p in layout.placements
        )
        # Addresses tell layouts apart as long as all are alive, and the plan is `valid` so long.
        self.addresses = list(map(id, layouts))
        self.valid = True
        self._watched = {id(layout): weakref.ref(layout, self._expire) for layout in dtensors}
        if self.direct:
            names = (_mesh.LAYOUT, _mesh.INNER)
            self.wrapped = _ops.extension.Wrapped(layouts, self.slot_of, *names)
        self.result_layouts: dict[torch.dtype, Any] = {}
        self.warned = False

    def _expire(self, layout: Any) -> None:
        self.valid = False

    def _lay(self, layouts: list[Any]) -> None:
        """The slots, for each item the index of its own, and the steps over meshes."""
        groups: _ranks.Groups = {}
        meshes: dict[int, _mesh.Mesh] = {}
        plain = _mesh.Slot(frozenset(), True)
        found: dict[int, _mesh.Slot] = {id(None): plain}
        places: dict[_mesh.Slot, tuple] = {plain: ()}
        devices: dict[_ranks.Key, torch.device] = {}
        for layout in layouts:
            if id(layout) in found:
                continue
            if id(layout.mesh) not in meshes:
                meshes[id(layout.mesh)] = mesh = _mesh.Mesh(layout.mesh, self.others)
                for key, group in mesh.groups.items():
                    known = groups.setdefault(key, group)
                    groups[key] = min(known, group, key=lambda g: g.group_name)
                    devices[key] = _ranks.device_of(groups[key], layout.mesh.device_type)
            mesh = meshes[id(layout.mesh)]
            found[id(layout)] = slot = mesh.slot(layout.placements)
            places[slot] = min(mesh.place, places.get(slot, mesh.place))
        # In an order on which ranks agree, for they send each other bare vectors; and before all by
        # what every rank of a mesh agrees on, so that all add up in the same order.
        self.slots = sorted(
            {found[id(layout)] for layout in layouts},
            key=lambda slot: (sorted(order for order, _ in slot.groups), places[slot]),
        )
        index = {slot: i for i, slot in enumerate(self.slots)}
        self.slot_of = [index[found[id(layout)]] for layout in layouts]
        # See Note [order].
        steps = [
            _ranks.Step(
                groups[key], devices[key], [i for i, s in enumerate(self.slots) if key in s.groups]
            )
            for key in sorted(groups)
        ]
        self.within = [step for step in steps if step.members]
        self.all = [step._replace(members=[0]) for step in steps]

    def read(self, items: Sequence[Tensor], write: bool) -> Any:
        """What the extension reads at once; None where each item has to be looked at.

        Always None where `items` are others than the plan was made for.
        """
        if not self.direct:
            return None
        return self.wrapped.read_grads(items) if write else self.wrapped.take_tensors(items)

    def is_for(self, asked: tuple[Any, ...]) -> bool:
        same = len(asked) == len(self.asked) and all(map(operator.is_, asked, self.asked))
        return self.valid and same

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


class MeshGrads:
    """The gradients of all ranks, with the verbs of the local ones. The compiler stays out."""

    def __init__(self, local: Any, plan: Plan) -> None:
        self.local, self.plan = local, plan

    def __len__(self) -> int:
        return len(self.local)

    @torch.compiler.disable
    def norm(self, p: float) -> Tensor:
        return self._result(self._norm(p))

    @torch.compiler.disable
    def scale_(self, coef: Tensor) -> None:
        self.local.scale_(coef)

    @torch.compiler.disable
    def clamp_(self, bound: float) -> None:
        self.local.clamp_(bound)

    @torch.compiler.disable
    def clip_norm_(self, max_norm: float | Tensor, p: float) -> Tensor:
        total_norm = self._norm(p)
        self.local.scale_(clip_coef(total_norm, max_norm))
        return self._result(total_norm)

    @torch.compiler.disable
    def agreed(self, total_norm: Tensor) -> Tensor:
        """`total_norm`, or NaN where that of any other rank is not finite."""
        bad = (~total_norm.isfinite()).double().reshape(1)
        for step in (*self.plan.all, *self.plan.beyond):
            bad = _ranks.all_reduce(step, bad, "MAX")
        return total_norm.masked_fill(bad[0] > 0, math.nan)

    def _norm(self, p: float) -> Tensor:
        if not p > 0:
            raise ValueError(
                f"norm_type: expected an order > 0 for gradients spread over ranks, got {p}"
            )
        plan, norms = self.plan, self.local.norms(p)
        if missing := len(plan.slots) - len(norms):
            norms = norms if len(norms) or plan.device is None else norms.to(plan.device)
            norms = torch.cat([norms, norms.new_zeros(missing)])
        parts = _ranks.as_parts(norms, p)
        for step in plan.within:
            parts = _ranks.over(step, parts, p)
        if plan.beyond:
            parts = _ranks.added(_ranks.pick(parts, plan.mine), p).reshape(1)
            for step in plan.beyond:
                parts = _ranks.over(step, parts, p)
        total_norm = _ranks.as_norm(_ranks.added(parts, p), p)
        return total_norm if plan.wide or self.local.is_wide() else total_norm.float()

    def _result(self, total_norm: Tensor) -> Tensor:
        plan, dtype = self.plan, total_norm.dtype
        if plan.mesh is None:
            return total_norm
        if dtype not in plan.result_layouts:
            plan.result_layouts[dtype] = _mesh.replicated(plan.mesh, dtype)
        return _mesh.as_replicated(total_norm, plan.result_layouts[dtype])


# The plan of a list, kept with the layout of its first DTensor: a tensor that anything refers to
# weakly could no longer be swapped, as Module.to() swaps parameters.
_plans = WeakIdKeyDictionary()


def is_spread(items: Sequence[Any], process_group: Any) -> bool:
    return process_group is not None or any(map(_mesh.is_dtensor, items))


def find(items: Sequence[Tensor], process_group: Any, walks: bool, write: bool) -> tuple[Plan, Any]:
    """The plan for these parameters or tensors, and what the extension reads by it, if it `walks`.

    Raises:
        TypeError: `process_group` is no group, mesh, or several.
        ValueError: of several groups two share more than this rank.
    """
    asked = _ranks.as_groups(process_group)
    key = next((_mesh.layout_of(item) for item in items if _mesh.is_dtensor(item)), None)
    plan = None if key is None else _plans.get(key)
    known = plan is not None and plan.is_for(asked)
    if known and walks and (grads := plan.read(items, write)) is not None:
        return plan, grads
    layouts = [_mesh.layout_of(item) for item in items]
    if not (known and plan.fits(layouts)):
        plan = Plan(items, layouts, asked)
        if key is not None:
            _plans[key] = plan
    return plan, plan.read(items, write) if walks else None
