"""The ranks of `python -m fastclip check`: they compare themselves, and clip a model together."""

import datetime
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .mesh import value_of

# A rank that waits longer for another one ends with an error.
PATIENCE = datetime.timedelta(seconds=120)


def join(device_type: str) -> bool:
    """Join the ranks that torchrun has started, on a type of device; False if there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=PATIENCE)
    return True


def leave() -> None:
    """Leave together: torchrun ends all ranks when the first one ends with an error."""
    dist.barrier()
    dist.destroy_process_group()


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
    """Clip gradients that are spread over meshes; return for each mesh what is wrong, or "".

    Every rank draws the same full gradients, and compares the clipped ones with half of these.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    random = torch.Generator().manual_seed(1)
    grads = [torch.randn(n, 12, generator=random, device="cpu") for n in (21, 6, 1)]
    expected = torch.cat([grad.flatten() for grad in grads]).double()
    total, size, found = float(expected.norm()), dist.get_world_size(), {}
    for shape in ((size,), (2, size // 2) if size % 2 == 0 else (1, size)):
        mesh = dist.device_mesh.init_device_mesh(device_type, shape)
        places = [Replicate(), Shard(0)][-len(shape) :]
        spread = [distribute_tensor(grad.to(device_type), mesh, places) for grad in grads]
        parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in spread]
        for parameter, grad in zip(parameters, spread, strict=True):
            parameter.grad = grad
        norm = float(value_of(clip(parameters, total / 2)))
        clipped = torch.cat([value_of(grad).flatten().cpu().double() for grad in spread])
        name = f"a mesh of {' x '.join(map(str, shape))}"
        found[name] = ""
        if abs(norm - total) > 1e-4 * total:
            found[name] = f"expected a norm of {total}, got {norm}"
        elif float((clipped - expected / 2).norm()) > 1e-4 * total:
            found[name] = "the clipped gradients are not those of one rank"
    return found
