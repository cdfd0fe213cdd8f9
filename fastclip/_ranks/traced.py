"""DTensors in a graph of `torch.compile`: what of a plan a graph holds, as constants."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import Step
from .mesh import is_dtensor
from .reduction import NONE, Kind, reduction

Dims = tuple[int, ...]


class Constants(NamedTuple):
    """Of one norm, what `Reduction` says: the graph sends what is sent without it."""

    slot_of: Dims
    slots: int
    members: list[list[int]]
    beside: int
    steps: list[Step]


def cuts(items: Sequence[Tensor], write: bool) -> tuple[Any, tuple[Dims, ...]] | None:
    """The mesh, and of each item the dimensions of the mesh that cut it, none of a plain tensor.

    None if a graph cannot hold them: several meshes, partial sums, a gradient that is placed
    otherwise than its parameter.
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


def constants(mesh: Any, cuts: tuple[Dims, ...]) -> Constants | None:
    """None where a collective would not run on the device of the mesh."""
    found = _constants(mesh, cuts)
    if found is None:
        return None
    slot_of, slots, members, beside, steps = found
    device = torch.device(mesh.device_type)
    return Constants(
        slot_of,
        slots,
        [list(some) for some in members],
        beside,
        [Step(name, device, list(members)) for name, members in steps],
    )


# The compiler makes no constant but of numbers, names and tuples of those.
@torch.compiler.assume_constant_result
def _constants(mesh: Any, cuts: tuple[Dims, ...]) -> Any:
    # torch hands a stand-in for a mesh to what it traces.
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
    if any(step.device.type != mesh.device_type for step in found.adding):
        return None
    steps = tuple((step.group.group_name, tuple(step.members)) for step in found.adding)
    members = tuple(map(tuple, found.members))
    return tuple(found.slot_of), len(found.slots), members, found.beside, steps


def local_in_graph(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_dtensor(tensor) else tensor


def replicated_in_graph(value: Tensor, mesh: Any) -> Tensor:
    placements = [dist.tensor.Replicate()] * mesh.ndim
    return dist.tensor.DTensor.from_local(value, mesh, placements, run_check=False)
