"""The ranks that `python -m fastclip check` runs on: what they say of themselves, and a model."""

import copy
import datetime
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .mesh import is_dtensor

# What waits longer for another rank is ended with an error.
PATIENCE = datetime.timedelta(seconds=120)


def join(type_: str) -> bool:
    """Join the ranks that torchrun has started, on a type of device; False if there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    backend = "gloo"
    if type_ == "cuda":
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=PATIENCE)
    return True


def leave() -> None:
    """Wait for the others, whom torchrun would end together with this rank."""
    dist.barrier()
    dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """What each rank gives, in their order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def differing(told: list[dict[str, str]]) -> list[str]:
    """Which ranks say something else than most, and of what."""
    lines = []
    for topic in told[0]:
        usual = Counter(one[topic] for one in told).most_common(1)[0][0]
        for rank, one in enumerate(told):
            if one[topic] != usual:
                lines.append(f"rank {rank} has {topic} {one[topic]}, others {usual}")
    return lines


def clip_models(clip: Callable[[Any, float], Tensor], type_: str) -> dict[str, str]:
    """Clip a model that is spread in several ways; of each "", or what differs from float64.

    A rank's share of the work is its own batch; what all batches together come to in float64, each
    rank computes for itself.
    """
    from torch.distributed.fsdp import fully_shard

    size, own = dist.get_world_size(), dist.get_rank()
    batches = torch.randn(size, 4, 12, generator=torch.Generator().manual_seed(1), device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        plain = nn.Sequential(nn.Linear(12, 21), nn.Tanh(), nn.Linear(21, 6))
    exact = copy.deepcopy(plain).double()
    sum(exact(batch.double()).square().mean() / size for batch in batches).backward()
    expected = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    total = float(expected.norm())
    square = (2, size // 2) if size % 2 == 0 else (1, size)
    meshes = {"FSDP2": (size,), f"mesh of {square[0]} x {square[1]}": square}
    found = {}
    for name in ("DDP", *meshes):
        model: Any = copy.deepcopy(plain).to(type_)
        if name == "DDP":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            fully_shard(model, mesh=_mesh(type_, meshes[name]))
        model(batches[own].to(type_)).square().mean().backward()
        norm = clip(model.parameters(), total / 2)
        grads = [p.grad for p in model.parameters()]
        whole = [g.full_tensor() if is_dtensor(g) else g for g in grads]
        clipped = torch.cat([g.flatten().cpu().double() for g in whole])
        value = float(norm.full_tensor() if is_dtensor(norm) else norm)
        found[name] = ""
        if abs(value - total) > 1e-4 * total:
            found[name] = f"expected a norm of {total}, got {value}"
        elif float((clipped - expected / 2).norm()) > 1e-4 * total:
            found[name] = "the clipped gradients are not those of one rank"
    return found


def _mesh(type_: str, shape: tuple[int, ...]) -> Any:
    names = ("replicate", "shard")[-len(shape) :]
    return dist.device_mesh.init_device_mesh(type_, shape, mesh_dim_names=names)
