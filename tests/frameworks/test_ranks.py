"""Two ranks over gloo: Lightning's DDP, accelerate's FSDP2, torchtitan's clip, Megatron's."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loops import batches, check_reached, distance, losses_of, net, sgd
from torch import nn
from torch.overrides import TorchFunctionMode


def numbers_of(model: nn.Module, clip: Callable[[list[nn.Parameter]], Any], steps: int) -> Any:
    """The losses of a loop, and the norms that its clip returned."""
    norms: list[float] = []
    parameters, data = list(model.parameters()), batches(steps, seed=dist.get_rank())

    def clip_all() -> None:
        norm = clip(parameters)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))

    return losses_of(sgd(model), data, functools.partial(distance, model), clip_all) + norms


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
        far, data = functools.partial(distance, model), batches(steps, seed=dist.get_rank())
        return losses_of(optimizer, data, far, clip, fabric.backward)

    check_reached(train)


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

    check_reached(functools.partial(train, several=False))
    # A norm for each mesh, and one more scaling, of nothing.
    check_reached(functools.partial(train, several=True), calls=3, name="clip_grads_with_norm_")


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

    check_reached(train, name="clip_grads_with_norm_")


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

    def clip(parameters: list[nn.Parameter]) -> float:
        with CudaIsHere():
            grads = [p.grad for p in parameters]
            norm = clip_grads.get_grad_norm_fp32(grads, grad_stats_parallel_group=dist.group.WORLD)
            clip_grads.clip_grad_by_total_norm_fp32(parameters, 0.5, norm)
        assert type(norm) is float
        return norm

    counted = check_reached(
        lambda steps: numbers_of(net(), clip, steps), name="multi_tensor_l2norm"
    )
    assert counted.calls["multi_tensor_scale"]


@pytest.mark.parametrize(
    ("name", "loop"),
    [
        ("lightning", lightnings_ddp),
        ("accelerate", accelerates_meshes),
        ("torchtitan", torchtitans_clip),
        ("megatron.core.optimizer.clip_grads", megatrons_clip),
    ],
)
def test_a_framework_on_two_ranks_is_clipped(world, name, loop):
    pytest.importorskip(name)
    world(2).run(loop, seconds=120)
