"""DTensors in a graph of `torch.compile`, which holds no plan: one mesh, cut or replicated."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import is_dtensor

Dims = tuple[int, ...]


def cuts(items: Sequence[Tensor], write: bool) -> tuple[Any, list[Dims]] | None:
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
            found.append(())
            continue
        mesh = item.device_mesh if mesh is None else mesh
        if item.device_mesh != mesh or own.device_mesh != mesh:
            return None
        if item.placements != own.placements or any(p.is_partial() for p in own.placements):
            return None
        found.append(tuple(i for i, p in enumerate(own.placements) if p.is_shard()))
    return mesh, found


def local_in_graph(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_dtensor(tensor) else tensor


def replicated_in_graph(value: Tensor, mesh: Any) -> Tensor:
    placements = [dist.tensor.Replicate()] * mesh.ndim
    return dist.tensor.DTensor.from_local(value, mesh, placements, run_check=False)


def joined(norms: dict[Dims, Tensor], p: float, mesh: Any) -> Tensor:
    """The p-norm of all, from those of what the same dimensions of a mesh cut, as it is here."""
    if math.isinf(p):
        extremes = [_over(norm, "max" if p > 0 else "min", mesh, d) for d, norm in norms.items()]
        # What a maximum makes of NaN depends on the order.
        nans = {d: norm.masked_fill(~norm.isnan(), 0) for d, norm in norms.items()}
        odd = [_over(nan, "sum", mesh, d) for d, nan in nans.items()]
        each = torch.stack([extreme + nan for extreme, nan in zip(extremes, odd, strict=True)])
        return each.amax() if p > 0 else each.amin()
    unit: float | Tensor = 1.0
    if p not in (1, 2) and p > 0:
        known = {d: norm.nan_to_num(0, posinf=0) for d, norm in norms.items()}
        most = torch.stack([_over(norm, "max", mesh, d) for d, norm in known.items()]).amax()
        unit = most.where(most > 0, 1)
    sums = [_over((norm / unit) ** p, "sum", mesh, d) for d, norm in norms.items()]
    return unit * torch.stack(sums).sum() ** (1 / p)


def _over(value: Tensor, op: str, mesh: Any, dims: Dims) -> Tensor:
    from torch.distributed._functional_collectives import all_reduce

    for dim in dims:
        value = all_reduce(value, op, (mesh, dim))
    return value
