"""Two ranks over gloo: Lightning's DDP, accelerate's FSDP2, torchtitan's clip, Megatron's."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loops import check_clipped, check_reached, losses_of
from torch import nn
from torch.overrides import TorchFunctionMode

import fastclip


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(4, 8, generator=generator) for _ in range(steps)]


def distance(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x).float() - 3).square().mean()


def total(tensor: torch.Tensor) -> float:
    return float(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def numbers_of(model: nn.Module, clip: Callable[[list[nn.Parameter]], Any], steps: int) -> Any:
    """The losses of a loop, and the norms that its clip returned."""
    norms: list[float] = []
    parameters = list(model.parameters())
    losses = losses_of(
        sgd(model),
        batches(steps),
        functools.partial(distance, model),
        torch.Tensor.backward,
        lambda: norms.append(total(clip(parameters))),
    )
    return losses + norms


def lightnings_ddp() -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", NODE_RANK="0")
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2")

    def train(steps: int) -> list[float]:
        environment = LightningEnvironment()
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[environment])
        fabric.launch()
        model = net()
        model, optimizer = fabric.setup(model, sgd(model))
        clip = functools.partial(fabric.clip_gradients, model, optimizer, max_norm=0.5)
        far = functools.partial(distance, model)
        return losses_of(optimizer, batches(steps), far, fabric.backward, clip)

    check_clipped(check_reached(train))


def accelerates_meshes() -> None:
    """Its clip of FSDP2 gradients, which it combines itself where there are several meshes."""
    from accelerate import Accelerator
    from torch.distributed.fsdp import fully_shard

    clip = functools.partial(Accelerator._clip_grad_norm_dtensor_aware, None)

    def train(steps: int, several: bool) -> list[float]:
        model = net()
        for part in model if several else [model]:
            fully_shard(part, mesh=dist.init_device_mesh("cpu", (2,), mesh_dim_names=(f"{part}",)))
        return numbers_of(model, lambda parameters: clip(parameters, 0.5), steps)

    check_clipped(check_reached(functools.partial(train, several=False)))
    # A norm for each mesh, and one more scaling, of nothing.
    check_clipped(
        check_reached(functools.partial(train, several=True), calls=3, name="clip_grads_with_norm_")
    )


def torchtitans_clip() -> None:
    from torch.distributed.fsdp import fully_shard
    from torchtitan.distributed import utils

    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "fsdp"))

    def train(steps: int) -> list[float]:
        model = net()
        fully_shard(model, mesh=mesh["fsdp"])
        # It raises the norm to its power in place, to add it up over the stages.
        how = dict(max_norm=0.5, foreach=True, pp_mesh=mesh["pp"])
        return numbers_of(model, functools.partial(utils.clip_grad_norm_, **how), steps)

    check_clipped(check_reached(train, name="clip_grads_with_norm_"))


class CudaIsHere(TorchFunctionMode):
    """Where Megatron says cuda, the CPU; what it asserts of types holds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def megatrons_clip() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.optimizer import clip_grads

    def train(steps: int) -> list[float]:
        model = net()
        parameters, optimizer, found = list(model.parameters()), sgd(model), []
        for x in batches(steps):
            optimizer.zero_grad()
            distance(model, x).backward()
            with CudaIsHere():
                norm = clip_grads.get_grad_norm_fp32(
                    [p.grad for p in parameters], grad_stats_parallel_group=dist.group.WORLD
                )
                clip_grads.clip_grad_by_total_norm_fp32(parameters, 0.5, norm)
            found.append(norm)
            optimizer.step()
        return [*found, *(float(p.detach().double().norm()) for p in parameters)]

    theirs = train(20)
    with fastclip.patch():
        assert clip_grads.l2_norm_impl.__module__ == "fastclip.integrations.megatron"
        ours = train(20)
    assert clip_grads.l2_norm_impl.__module__ != "fastclip.integrations.megatron"
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert all(type(norm) is float for norm in ours)
    assert max(ours[:20]) > 0.5


LOOPS = {
    "lightning": ("lightning", lightnings_ddp),
    "accelerate's meshes": ("accelerate", accelerates_meshes),
    "torchtitan": ("torchtitan", torchtitans_clip),
    "megatron": ("megatron.core.optimizer.clip_grads", megatrons_clip),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_framework_on_two_ranks_is_clipped(world, name):
    module, loop = LOOPS[name]
    pytest.importorskip(module)
    world(2).run(loop, seconds=120)
