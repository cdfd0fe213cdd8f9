"""DTensors: which part of one is on this rank, and over which ranks the rest is spread.

Their private `_spec` and `_local_tensor` cost nanoseconds where `to_local()` costs microseconds.
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

# Where a DTensor keeps its layout and what is on this rank; the fields in which two layouts have to
# be equal.
LAYOUT = "_spec"
INNER = "_local_tensor"
FIELDS = ("mesh", "placements")


class Slot(NamedTuple):
    """Gradients of one mesh that are spread over the same groups.

    Ranks send each other the numbers of their slots without names, so slots are told apart by what
    all ranks of a mesh know: its ranks, of which `number` stands for one set; 0 where nothing is
    sent. `counts_for_mesh` says whether it is this rank that enters the sum of the mesh in sums
    beyond it.
    """

    groups: frozenset[Key]
    number: int
    counts_for_mesh: bool


class Mesh:
    """The ranks of a device mesh, and its process groups in an order that all ranks share.

    Note [order]: ranks of a mesh add up along one dimension after the other, so all must begin with
    the same one, whatever other meshes share its groups. Of the 2 x 2 mesh

        0 1      dimension 0: groups {0, 2} and {1, 3}, distances 0, 2
        2 3      dimension 1: groups {0, 1} and {2, 3}, distances 0, 1

    all ranks begin with dimension 1: the distances between the ranks of a group tell the dimension,
    if they are the same all over the mesh. Else it is told by its number, with the shape and the
    ranks of the mesh, and comes after all others.
    """

    def __init__(self, mesh: Any, others: Collection["Mesh"]) -> None:
        self.device_type, self.root = mesh.device_type, attribute(mesh, "_get_root_mesh")()
        with without_modes():
            self.ranks = ranks = tuple(mesh.mesh.flatten().tolist())
            lines = [mesh.mesh.movedim(d, -1).reshape(-1, mesh.size(d)) for d in range(mesh.ndim)]
            self.is_even = all(bool((ln - ln[:, :1] == ln[:1] - ln[0, 0]).all()) for ln in lines)
        # All its ranks know this of it.
        self.known = (ranks, tuple(mesh.shape))
        self.number: int = 1 + len(others)
        for other in others:
            if other.ranks == ranks:
                self.number = other.number
        self.groups: Groups = {}
        self.keys: list[Key] = []
        # A rank outside holds nothing.
        for dim in range(mesh.ndim) if mesh.get_coordinate() is not None else ():
            members = ranks_of(group := mesh.get_group(dim))
            alone = (1, dim, *mesh.shape, *ranks)
            order = tuple(r - members[0] for r in members) if self.is_even else alone
            self.keys.append(key := Key(order, members))
            if len(members) > 1:
                self.groups[key] = group

    def slot(self, placements: Sequence[Any], rows: bool, reach: frozenset[int]) -> Slot:
        """The slot of a gradient placed so; with `rows`, of each of its slices along dimension 0.

        All ranks of the mesh have the same sums: of those within `reach`, one counts for it.
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
    """The collectives over all groups of the meshes, in the order of Note [order]."""
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
    """Order process groups of the same ranks alike on all of these ranks.

    A group's name would not do: that may be another on each of its ranks.
    """
    device_type, group = choice
    return device_type == "cpu", device_type, age_of(group)


def find_crossing(meshes: Collection[Mesh], reach: frozenset[int]) -> str | None:
    """Say why two of the meshes cannot share a norm, if any two cannot.

    They meet in this rank only and are not lines of one grid: each rank would take the norm of
    other gradients, and shards of one gradient would be scaled differently. Two lines of a grid
    share no distance; meshes cut from one root are a grid's.
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
                    f"{list(others)}, which have only rank {dist.get_rank()} in common: no norm is "
                    "the same on all of them; clip the two by themselves, or pass as process_group "
                    "one that holds all these ranks"
                )
    return None


def is_dtensor(value: object) -> TypeGuard["dist.tensor.DTensor"]:
    # Whoever has a DTensor has imported it; nobody else should have to.
    module = getattr(dist, "tensor", None)
    return module is not None and isinstance(value, module.DTensor)


def layout_of(item: Tensor) -> Any:
    return attribute(item, LAYOUT) if is_dtensor(item) else None


def value_of(tensor: Tensor) -> Tensor:
    """A tensor that is the same on all ranks, as a plain one."""
    if not is_dtensor(tensor):
        return tensor
    here = all(p.is_replicate() for p in tensor.placements)
    found: Tensor = attribute(tensor, INNER) if here else tensor.full_tensor()
    return found


def placed(tensor: Tensor, layout: Any, name: str) -> Tensor:
    """`tensor` if it is placed so, else a redistributed copy. Nothing stays partial.

    Raises:
        TypeError: its mesh is another; or only one of the two, it and `layout`, knows a mesh.
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
    """The layout of a number that all ranks of a mesh have."""
    spec = private("torch.distributed.tensor._dtensor_spec.DTensorSpec")
    meta = private("torch.distributed.tensor._dtensor_spec.TensorMeta")
    placements = (dist.tensor.Replicate(),) * mesh.ndim
    return spec(mesh, placements, tensor_meta=meta(torch.Size(), (), dtype))


def as_replicated(value: Tensor, layout: Any) -> Tensor:
    return dist.tensor.DTensor(value, layout, requires_grad=False)


def local_of(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank, as a plain one."""
    found: Tensor = attribute(tensor, INNER) if is_dtensor(tensor) else tensor
    return found
