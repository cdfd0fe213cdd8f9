"""FullyShardedDataParallel, whose gradients are local shards, clipped over its process group."""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import ulps
from ranks import on_ranks
from torch import nn

import fastclip

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"])
@on_ranks(4)
def test_every_sharding_strategy_is_one_norm(strategy, use_orig_params):
    rank, world = dist.get_rank(), dist.group.WORLD
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = (pairs[rank // 2], across[rank % 2]) if strategy == "HYBRID_SHARD" else world
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
    how = dict(use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    shard = lambda part: FullyShardedDataParallel(part, group, ShardingStrategy[strategy], **how)  # noqa: E731
    first, last = copy.deepcopy(model[:2]), copy.deepcopy(model[2:])
    wrapped = shard(nn.Sequential(shard(first), last))
    batches = [torch.randn(6, 7, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    wrapped(batches[rank]).square().sum().backward()
    double = model.double()
    sum(double(x.double()).square().sum() / 4 for x in batches).backward()
    expected = float(fastclip.get_total_norm([p.grad for p in double.parameters()]))
    grads = [p.grad for p in wrapped.parameters() if p.grad is not None]
    before = [grad.clone() for grad in grads]
    shards = None if strategy == "NO_SHARD" else wrapped.process_group
    norm = fastclip.clip_grad_norm_(wrapped.parameters(), expected / 2, process_group=shards)
    # Its own reductions are float32.
    assert ulps(norm, expected) <= 40
    for now, then in zip(grads, before, strict=True):
        torch.testing.assert_close(now, then / 2, rtol=1e-5, atol=1e-7)
