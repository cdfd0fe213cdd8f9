"""Plans for DTensors in a graph of `torch.compile`; the graph holds the plans as constants."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._ops import result_dtype
from .groups import Step
from .mesh import is_dtensor
from .reduction import NONE, Kind, reduction

Dims = tuple[int, ...]


class Constants(NamedTuple):
    """The fields that a graph needs of a `Reduction` for one norm."""

    kind: Kind
    slot_of: Dims
    group_of: list[int]
    members: list[list[int]]
    beside: int
    adding_steps: list[Step]
    group_steps: list[Step]
    sends: bool


class PlanOfGraph:
    """A `Plan` of one mesh; its collectives are the same as those of a `Plan` outside of graphs."""

    sizes = None

    def __init__(self, items: Sequence[Tensor], mesh: Any, reduction: Constants) -> None:
        self.mesh, self.reduction, self.device = mesh, reduction, items[0].device
        self.is_replicated = all(map(is_dtensor, items))
        self.wide = result_dtype([i for i in items if is_dtensor(i)]) == torch.float64

    def result(self, norm: Tensor) -> Tensor:
        if not self.is_replicated:
            return norm
        placements = [dist.tensor.Replicate()] * self.mesh.ndim
        return dist.tensor.DTensor.from_local(norm, self.mesh, placements, run_check=False)


def plan_of_graph(items: Sequence[Tensor], write: bool) -> PlanOfGraph | None:
    """Return a plan; None if a graph cannot hold these items, or their gradients if `write`."""
    found = _sharded_dims(items, write)
    constants = None if found is None else _constants_of(*found)
    return None if found is None or constants is None else PlanOfGraph(items, found[0], constants)


def _sharded_dims(items: Sequence[Tensor], write: bool) -> tuple[Any, tuple[Dims, ...]] | None:
    """Return the mesh, and the mesh dimensions that shard each item; (-1,) for a plain tensor.

    Return None if a graph cannot hold the items: they have several meshes or a Partial placement,
    or a gradient is placed differently from its parameter.
    """
    mesh: Any = None
    found: list[Dims] = []
    for item in items:
        own: Any = item.grad if write and item.grad is not None else item
        if is_dtensor(item) != is_dtensor(own):
            return None
        if not is_dtensor(item):
            found.append((-1,))
            continue
        mesh = item.device_mesh if mesh is None else mesh
        if item.device_mesh != mesh or own.device_mesh != mesh:
            return None
        if item.placements != own.placements or any(p.is_partial() for p in own.placements):
            return None
        found.append(tuple(i for i, p in enumerate(own.placements) if p.is_shard()))
    return mesh, tuple(found)


def _constants_of(mesh: Any, cuts: tuple[Dims, ...]) -> Constants | None:
    """Return the constants; None if a collective would not run on the mesh's type of device."""
    found = _constants(mesh, cuts)
    if found is None:
        return None
    slot_of, slots, members, beside, steps, sends = found
    device = torch.device(mesh.device_type)
    return Constants(
        Kind.TOTAL,
        slot_of,
        [0] * slots,
        [list(some) for some in members],
        beside,
        [Step(name, device, list(members)) for name, members in steps],
        [],
        sends,
    )


# torch.compile can make constants only of numbers, strings and tuples of them.
@torch.compiler.assume_constant_result
def _constants(mesh: Any, cuts: tuple[Dims, ...]) -> Any:
    # While tracing, torch may pass a stand-in for the mesh.
    mesh = getattr(mesh, "real_obj", mesh)
    shard, replicate = dist.tensor.Shard(0), dist.tensor.Replicate()
    layouts = [
        None
        if dims == (-1,)
        else SimpleNamespace(
            mesh=mesh,
            placements=tuple(shard if d in dims else replicate for d in range(mesh.ndim)),
        )
        for dims in cuts
    ]
    found = reduction(layouts, NONE, Kind.TOTAL)
    if any(step.device.type != mesh.device_type for step in found.adding_steps):
        return None
    steps = tuple((step.group.group_name, tuple(step.members)) for step in found.adding_steps)
    members = tuple(map(tuple, found.members))
    return tuple(found.slot_of), len(found.group_of), members, found.beside, steps, found.sends


def local_in_graph(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_dtensor(tensor) else tensor
