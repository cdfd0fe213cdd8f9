"""Process groups, and the collectives over them."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._ops import without_modes
from .._private import attribute, private

# The sorted ranks of a process group.
Ranks = tuple[int, ...]


class Key(NamedTuple):
    """Identifies a process group. Keys sort in the order of Note [order] in mesh.py."""

    order: Ranks
    ranks: Ranks


Groups = dict[Key, Any]


class Step(NamedTuple):
    """A collective: its process group (in a graph, the group's name), its device, what it sums."""

    group: Any
    device: torch.device
    members: list[int]


def as_groups(process_group: Any) -> tuple[Any, ...]:
    if process_group is None:
        return ()
    kinds = (dist.ProcessGroup, dist.device_mesh.DeviceMesh)
    # Sums run over the groups in the given order; a set's order would differ between processes.
    several = isinstance(process_group, Sequence) and not isinstance(process_group, str)
    asked = tuple(process_group) if several else (process_group,)
    for group in asked:
        if not isinstance(group, kinds):
            raise TypeError(
                "process_group: expected a ProcessGroup or DeviceMesh that this rank is in, or a "
                "list of several in an order that is the same on all ranks, got "
                f"{group!r} of type {type(group).__name__}"
            )
    return asked


def groups_of(asked: Iterable[Any]) -> list[Any]:
    """Return the process groups, with each mesh replaced by those of its dimensions, in order."""
    groups: list[Any] = []
    for some in asked:
        mesh = isinstance(some, dist.device_mesh.DeviceMesh)
        groups += map(some.get_group, range(some.ndim)) if mesh else [some]
    return groups


def reachable_ranks(asked: Iterable[Any]) -> frozenset[int]:
    """Return the ranks whose values reach this rank when sums run over each of `asked` in turn."""
    if not asked:
        return frozenset()
    me = dist.get_rank()
    reach = frozenset([me])
    for some in asked:
        mesh = isinstance(some, dist.device_mesh.DeviceMesh)
        with without_modes():
            ranks = some.mesh.flatten().tolist() if mesh else ranks_of(some)
        # Assume a grid: from each rank reached so far, its group lies at the same offsets as ours.
        reach = frozenset(rank + other - me for rank in reach for other in ranks)
    return reach


def by_key(groups: Iterable[Any]) -> Groups:
    """Return a dict from key to process group, in the given order, without groups of one rank.

    Raises:
        ValueError: two of the groups have more than this rank in common.
    """
    found = {Key((), ranks_of(group)): group for group in groups if group.size() > 1}
    for (_, ranks), (_, others) in itertools.combinations(found, 2):
        if len(shared := sorted(set(ranks) & set(others))) > 1:
            raise ValueError(
                f"process_group: ranks {shared} are in two of the groups and would count twice; "
                "pass groups that have only this rank in common"
            )
    return found


def group_steps(process_groups: Sequence[list[Any]]) -> list[Step]:
    """Return the collectives. Each group of gradients has a list in `process_groups`.

    Raises:
        ValueError: two process groups of one list have more than this rank in common.
    """
    found: Groups = {}
    members: dict[Key, list[int]] = {}
    for i, some in enumerate(process_groups):
        for key, group in by_key(some).items():
            found.setdefault(key, group)
            members.setdefault(key, []).append(i)
    return [Step(group, device_of(group), members[key]) for key, group in found.items()]


def ranks_of(group: Any) -> Ranks:
    return tuple(sorted(dist.get_process_group_ranks(group)))


def age_of(group: Any) -> int:
    """Return the index of a process group in the order in which this rank created its groups.

    Ranks create a group together, so all ranks of two groups agree on which is older. Only the
    private dict that `get_process_group_ranks` reads has this order.
    """
    # Looked up at each call, because code that runs ranks as threads replaces `_world`.
    world = private("torch.distributed.distributed_c10d._world")
    return list(attribute(world, "pg_group_ranks")).index(group)


def device_of(group: Any, wanted: str | None = None) -> torch.device:
    """Return the device on which a process group communicates, the same on all its ranks.

    It is of the `wanted` type if the group has a backend for that type. If not, it is the
    accelerator if the group has a backend for the accelerator alone, such as NCCL; else the CPU.
    """
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    if wanted in backends:
        return torch.device(wanted)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    own = backends.get(accelerator.type) if accelerator is not None else None
    if accelerator is not None and own not in (None, backends.get("cpu")):
        return accelerator
    return torch.device("cpu" if "cpu" in backends else next(iter(backends)))


def is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def rank() -> int | None:
    """Return the rank of this process; None if torch.distributed is not initialized."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else None


def all_reduce(step: Step, values: Tensor, op: str) -> Tensor:
    """Return `values` reduced over the step's ranks; values on its device change in place."""
    elsewhere = values.device.type != step.device.type
    moved = values.to(step.device) if elsewhere else values
    # What dist.all_reduce calls in the end, without its ten microseconds of argument checks.
    step.group.allreduce([moved], _options(op)).wait()
    return moved.to(values.device) if elsewhere else moved


@functools.cache
def _options(op: str) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = getattr(dist.ReduceOp, op)
    return options


def find_differing(numbers: list[int], steps: Iterable[Step]) -> int | None:
    """Return the index of the first number that ranks differ in; this waits for the device."""
    with without_modes():
        own = torch.tensor([*numbers, *(-n for n in numbers)], dtype=torch.float64, device="cpu")
        most = own.clone()
        for step in steps:
            most = all_reduce(step, most, "MAX")
        differs = (most != own).tolist()
    both = zip(differs[: len(numbers)], differs[len(numbers) :], strict=True)
    return next((i for i, pair in enumerate(both) if any(pair)), None)
