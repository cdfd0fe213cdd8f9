"""The part of `python -m fastclip check` that its ranks run together, under torchrun."""

import copy
import datetime
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .mesh import value_of

# A rank that waits longer than this for another rank ends with an error.
PATIENCE = datetime.timedelta(seconds=120)


def join(device_type: str) -> bool:
    """Join the ranks that torchrun has started; return False if this is the only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=PATIENCE)
    return True


def leave() -> None:
    """Wait for all ranks, then leave: once one rank ends with an error, torchrun ends them all."""
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo that still free a tensor would abort a process that ends (pytorch#190489).
    time.sleep(0.1)


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def differing(facts: list[dict[str, str]]) -> list[str]:
    """Name the ranks whose facts differ from those of most ranks, a line for each."""
    lines = []
    for topic in facts[0]:
        usual = Counter(own[topic] for own in facts).most_common(1)[0][0]
        for rank, own in enumerate(facts):
            if own[topic] != usual:
                lines.append(f"rank {rank} has {topic} {own[topic]}, others {usual}")
    return lines


def clip_models(clip: Callable[[Any, float], Tensor], device_type: str) -> dict[str, str]:
    """Clip a model under DDP, under FSDP2, and under FSDP2 on a 2-d mesh; return errors by name.

    The error is "" if the clip is correct. Each rank runs its own batch through the model, and
    computes the expected gradients of all batches in float64.
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
    total, found = float(expected.norm()), {}
    square = (2, size // 2) if size % 2 == 0 else (1, size)
    for name, shape in {"DDP": (), "FSDP2": (size,), "a 2-d mesh": square}.items():
        model: Any = copy.deepcopy(plain).to(device_type)
        if shape:
            names = ("replicate", "shard")[-len(shape) :]
            mesh = dist.device_mesh.init_device_mesh(device_type, shape, mesh_dim_names=names)
            fully_shard(model, mesh=mesh)
        else:
            model = nn.parallel.DistributedDataParallel(model)
        model(batches[own].to(device_type)).square().mean().backward()
        norm = float(value_of(clip(model.parameters(), total / 2)))
        grads = [value_of(p.grad).flatten().cpu().double() for p in model.parameters()]
        found[name] = ""
        if abs(norm - total) > 1e-4 * total:
            found[name] = f"expected a norm of {total}, got {norm}"
        elif float((torch.cat(grads) - expected / 2).norm()) > 1e-4 * total:
            found[name] = "the clipped gradients are not those of one rank"
    return found
