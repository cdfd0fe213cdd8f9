"""DTensors: which part of one is on this rank, and over which ranks it is sharded.

Reading the private `_spec` and `_local_tensor` costs nanoseconds, `to_local()` microseconds.
"""

import itertools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from .._ops import without_modes
from .._private import attribute, private
from .groups import Groups, Key, Step, age_of, device_of, ranks_of

# The attributes of a DTensor that hold its layout and its local tensor. In the attributes FIELDS, a
# gradient's layout must equal its parameter's.
LAYOUT = "_spec"
INNER = "_local_tensor"
FIELDS = ("mesh", "placements")


class Slot(NamedTuple):
    """The gradients of one mesh that are sharded over the same process groups.

    Ranks send a number for each slot but no name, so slots are identified by facts that all ranks
    of a mesh know. `number` stands for the mesh's set of ranks; it is 0 if nothing is sent.
    `counts_for_mesh` is true on the one rank that adds the sum over the mesh to later sums over
    process groups.
    """

    groups: frozenset[Key]
    number: int
    counts_for_mesh: bool


class Mesh:
    """The ranks of a device mesh, and its process groups in an order that all ranks share.

    Note [order]: ranks of a mesh sum along one dimension after the other, so all must begin with
    the same dimension, even if other meshes share some of its groups. In the 2 x 2 mesh

        0 1      dimension 0: groups {0, 2} and {1, 3}, distances 0, 2
        2 3      dimension 1: groups {0, 1} and {2, 3}, distances 0, 1

    all ranks begin with dimension 1. Groups are sorted by the distances of their ranks from the
    first, if all groups of a dimension have the same distances. Otherwise the key is the
    dimension's index with the mesh's shape and ranks; such keys sort after all distances.
    """

    def __init__(self, mesh: Any, others: Collection["Mesh"]) -> None:
        self.device_type, self.root = mesh.device_type, attribute(mesh, "_get_root_mesh")()
        with without_modes():
            self.ranks = ranks = tuple(mesh.mesh.flatten().tolist())
            lines = [mesh.mesh.movedim(d, -1).reshape(-1, mesh.size(d)) for d in range(mesh.ndim)]
            self.is_even = all(bool((ln - ln[:, :1] == ln[:1] - ln[0, 0]).all()) for ln in lines)
        # All ranks of the mesh have the same value.
        self.known = (ranks, tuple(mesh.shape))
        self.number: int = 1 + len(others)
        for other in others:
            if other.ranks == ranks:
                self.number = other.number
        self.groups: Groups = {}
        self.keys: list[Key] = []
        # A rank outside of the mesh holds no shard.
        for dim in range(mesh.ndim) if mesh.get_coordinate() is not None else ():
            members = ranks_of(group := mesh.get_group(dim))
            alone = (1, dim, *mesh.shape, *ranks)
            order = tuple(r - members[0] for r in members) if self.is_even else alone
            self.keys.append(key := Key(order, members))
            if len(members) > 1:
                self.groups[key] = group

    def slot(self, placements: Sequence[Any], rows: bool, reach: frozenset[int]) -> Slot:
        """Return the slot of a gradient with these placements; with `rows`, the slot of its rows.

        Sums over the mesh are the same on all its ranks, so only its first rank in `reach` counts.
        """
        me = dist.get_rank()
        counts_for_mesh = me == min(reach.intersection(self.ranks), default=me)
        if not self.keys:
            return Slot(frozenset(), 0, counts_for_mesh)
        whole = [p.is_replicate() or p.is_partial() for p in placements]
        if rows:
            whole = [w or p.dim == 0 for w, p in zip(whole, placements, strict=True)]
        sharded = [not w for w in whole]
        keys = itertools.compress(self.keys, sharded)
        spread = frozenset(key for key in keys if key in self.groups)
        return Slot(spread, self.number if spread else 0, counts_for_mesh)


def mesh_steps(meshes: Collection[Mesh], slots: Sequence[Slot]) -> list[Step]:
    """Return the collectives over all groups of the meshes, in the order of Note [order]."""
    found: dict[Key, list[tuple[str, Any]]] = {}
    for mesh in meshes:
        for key, group in mesh.groups.items():
            found.setdefault(key, []).append((mesh.device_type, group))
    taken = {key: min(some, key=_precedence) for key, some in found.items()}
    return [
        Step(group, device_of(group, type_), [i for i, s in enumerate(slots) if key in s.groups])
        for key, (type_, group) in sorted(taken.items(), key=lambda pair: pair[0])
    ]


def _precedence(choice: tuple[str, Any]) -> Any:
    """Return a sort key that orders process groups of the same ranks alike on all these ranks.

    The name of a group would not do: the group's ranks may have different names for it.
    """
    device_type, group = choice
    return device_type == "cpu", device_type, age_of(group)


def find_crossing(meshes: Collection[Mesh], reach: frozenset[int]) -> str | None:
    """Return the reason why two of the meshes cannot share a norm; None if all can.

    Two meshes with only this rank in common must be lines of one grid. Otherwise ranks would
    measure different sets of gradients, and scale shards of one gradient differently. Meshes are
    lines of a grid if they have the same root mesh, or if no distance between ranks occurs in both.
    """
    even = [mesh for mesh in meshes if mesh.is_even]
    for one, other in itertools.combinations(even, 2):
        for (_, ranks), (_, others) in itertools.product(one.groups, other.groups):
            both = {*ranks, *others}
            if one.root == other.root or both <= reach:
                continue
            here, there = ({r - some[0] for r in some[1:]} for some in (ranks, others))
            if len(both) == len(ranks) + len(others) - 1 and here & there:
                return (
                    f"parameters: some are spread over ranks {list(ranks)}, others over ranks "
                    f"{list(others)}, which have only rank {dist.get_rank()} in common, and so "
                    "cannot share a norm; clip the two sets separately, or pass a process_group "
                    "that contains all these ranks"
                )
    return None


def is_dtensor(value: object) -> TypeGuard["dist.tensor.DTensor"]:
    # If a DTensor exists, this module is imported already; users without one need not import it.
    module = getattr(dist, "tensor", None)
    return module is not None and isinstance(value, module.DTensor)


def layout_of(item: Tensor) -> Any:
    return attribute(item, LAYOUT) if is_dtensor(item) else None


def value_of(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor as a plain tensor; a plain tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    here = all(p.is_replicate() for p in tensor.placements)
    found: Tensor = attribute(tensor, INNER) if here else tensor.full_tensor()
    return found


def place_as(tensor: Tensor, layout: Any, name: str) -> Tensor:
    """Return `tensor`, redistributed if `layout` has other placements; Partial becomes Replicate.

    Raises:
        TypeError: the meshes of `tensor` and `layout` differ, or only one of the two has a mesh.
    """
    if layout is None and not is_dtensor(tensor):
        return tensor
    if layout is None or not is_dtensor(tensor) or tensor.device_mesh != layout.mesh:
        raise TypeError(
            f"{name}: expected a {'DTensor' if layout else 'plain tensor'} like the parameter, got "
            f"a {type(tensor).__name__}; make both DTensors of one mesh, or neither"
        )
    replicate = dist.tensor.Replicate()
    placements = tuple(replicate if p.is_partial() else p for p in layout.placements)
    return tensor if tensor.placements == placements else tensor.redistribute(placements=placements)


def replicated(mesh: Any, dtype: torch.dtype) -> Any:
    """Return the layout of a 0-d DTensor that is replicated over a mesh."""
    spec = private("torch.distributed.tensor._dtensor_spec.DTensorSpec")
    meta = private("torch.distributed.tensor._dtensor_spec.TensorMeta")
    placements = (dist.tensor.Replicate(),) * mesh.ndim
    return spec(mesh, placements, tensor_meta=meta(torch.Size(), (), dtype))


def as_replicated(value: Tensor, layout: Any) -> Tensor:
    return dist.tensor.DTensor(value, layout, requires_grad=False)


def local_of(tensor: Tensor) -> Tensor:
    """Return the local tensor of a DTensor; a plain tensor as it is."""
    found: Tensor = attribute(tensor, INNER) if is_dtensor(tensor) else tensor
    return found
