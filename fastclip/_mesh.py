"""DTensors: what of them is on this rank, and over which ranks the rest. Only here are they known.

Their private `_spec` and `_local_tensor` cost nanoseconds where `to_local()` costs microseconds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._ranks import Groups, Key, ranks_of

# Where a DTensor keeps its layout (mesh, placements) and what is on this rank.
LAYOUT = "_spec"
INNER = "_local_tensor"


class Slot(NamedTuple):
    """Gradients that are spread over the same groups: of mesh dimensions, and beyond the mesh."""

    within: frozenset[Key]
    beyond: frozenset[Key]


class Mesh:
    """What a plan has to know of a device mesh.

    Note [order]: ranks of a mesh add up along one dimension after the other, so all must begin with
    the same one, whatever other meshes share its groups. The distances between the ranks of a group
    tell the dimension, if they are the same all over the mesh. Else the mesh keeps to itself.
    """

    def __init__(self, mesh: Any, others: Groups, position: int) -> None:
        self.ranks = tuple(mesh.mesh.flatten().tolist())
        self.shape = tuple(mesh.shape)
        lines = [mesh.mesh.movedim(d, -1).reshape(-1, mesh.size(d)) for d in range(mesh.ndim)]
        even = all(bool((ln - ln[:, :1] == ln[:1] - ln[0, 0]).all()) for ln in lines)
        self.keys: list[Key] = []
        self.groups: Groups = {}
        # A rank outside holds nothing.
        for dim in range(mesh.ndim) if mesh.get_coordinate() is not None else ():
            ranks = ranks_of(group := mesh.get_group(dim))
            order = (
                tuple(r - ranks[0] for r in ranks) if even else (1, dim, *self.shape, *self.ranks)
            )
            self.keys.append((order, ranks))
            if len(ranks) > 1:
                self.groups[order, ranks] = group
        shared = {key: set(key[1]) & set(self.ranks) for key in others}
        for (_, ranks), some in shared.items():
            if 1 < len(some) < len(ranks):
                raise ValueError(
                    f"process_group: of its ranks {list(ranks)}, {sorted(some)} share the mesh of "
                    f"parameters[{position}], whose gradient is counted there; pass the group of "
                    "this rank and those that hold other parameters"
                )
        self.beyond = frozenset(key for key, some in shared.items() if len(some) < 2)

    def slot(self, placements: Sequence[Any]) -> tuple[Slot, tuple]:
        """The slot of gradients so placed, and its place among others."""
        sharded = [i for i, p in enumerate(placements) if not (p.is_replicate() or p.is_partial())]
        spread = {self.keys[i] for i in sharded if self.keys}
        within = frozenset(spread & self.groups.keys())
        return Slot(within, self.beyond), (self.ranks, self.shape, sharded)


def is_dtensor(value: object) -> bool:
    # Whoever has a DTensor has imported it; nobody else should have to.
    module = getattr(dist, "tensor", None)
    return module is not None and isinstance(value, module.DTensor)


def layout_of(item: Tensor) -> Any:
    return getattr(item, LAYOUT) if is_dtensor(item) else None


def value_of(tensor: Tensor) -> Tensor:
    """A tensor that is the same on all ranks, as a plain one."""
    if not is_dtensor(tensor):
        return tensor
    here = all(p.is_replicate() for p in tensor.placements)
    return getattr(tensor, INNER) if here else tensor.full_tensor()


def placed(tensor: Tensor, layout: Any) -> Tensor:
    """`tensor` itself if it is placed so, else a redistributed copy; nothing stays partial."""
    replicate = dist.tensor.Replicate()
    placements = tuple(replicate if p.is_partial() else p for p in layout.placements)
    return tensor if tensor.placements == placements else tensor.redistribute(placements=placements)


def replicated(layouts: Sequence[Any], dtype: torch.dtype) -> Any:
    """The layout of a number that all ranks of the only mesh have; None if it is not the only."""
    if not layouts or not all(layouts) or any(a.mesh != layouts[0].mesh for a in layouts):
        return None
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    mesh = layouts[0].mesh
    placements = (dist.tensor.Replicate(),) * mesh.ndim
    return DTensorSpec(mesh, placements, tensor_meta=TensorMeta(torch.Size(), (), dtype))


def as_replicated(value: Tensor, layout: Any) -> Tensor:
    return dist.tensor.DTensor(value, layout, requires_grad=False)
