"""Norms of tensors, rows and groups over ranks: against one process that has the full gradients."""

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import CLIPS, oracle
from ranks import on_ranks
from test_mesh import full, plain, spread
from test_random_clipper import Outliers, Percentile
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import fastclip
from fastclip import AutoClip, GradClipper, ZClip
from fastclip._ranks import local_of


@on_ranks(2)
def test_a_norm_that_only_all_ranks_bring_beyond_float32_clips_by_its_coefficient():
    mesh = init_device_mesh("cpu", (2,))
    each = lambda items, n: fastclip.clip_grad_norms_(items, n)[0]  # noqa: E731
    for clip in (*CLIPS.values(), each):
        parameter = spread((6,), mesh, Shard(0))
        local_of(parameter.grad).fill_(2e38)
        norm = local_of(clip([parameter], 1.0))
        assert (norm.dtype, norm.item()) == (torch.float32, math.inf)
        after = full(parameter.grad)
        torch.testing.assert_close(after, torch.full_like(after, 6**-0.5), rtol=1e-5, atol=0)


@on_ranks(2)
def test_norms_by_parameter_are_those_of_the_full_gradients():
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    parameters = [spread((4, 3), mesh, Shard(1)), spread((6,), mesh, Shard(0)), plain(2)]
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, local_of(parameters[0].grad))
    if rank == 1:
        parameters[0].grad = None
    expected = [oracle(parts[:1], 2), *(oracle([full(q.grad)], 2) for q in parameters[1:])]
    clipper = GradClipper(parameters, 1.0)
    assert list(clipper.norms_by_parameter().values()) == pytest.approx(expected)
    kept = GradClipper(parameters, math.inf, each=True)
    assert full(kept.clip_()).item() == pytest.approx(oracle([torch.tensor(expected)], 2))
    if rank == 0:
        # What the last step has measured is there on every rank.
        assert list(kept.norms_by_parameter().values()) == pytest.approx(expected)


@on_ranks(2)
def test_rows_are_those_of_the_tensors_at_hand():
    mesh = init_device_mesh("cpu", (2,))
    shared = spread((4, 3), mesh, Shard(1))
    for rows in ((3, 5), (5, 3), (7, 2)):
        made = [shared, *(plain(count, 2) for count in rows), plain(2)]
        made[3].grad = None
        for parameter in made[1:3]:
            parameter.data = torch.arange(1.0, 1 + len(parameter))[:, None].expand(-1, 2).clone()
            parameter.grad.fill_(100.0)
        fastclip.clip_grad_agc_(made, 0.5)
        for parameter in made[1:3]:
            expected = 0.5 * parameter.detach().norm(dim=1)
            torch.testing.assert_close(parameter.grad.norm(dim=1), expected)


@on_ranks(2)
def test_what_is_not_finite_is_counted_on_a_rank_alone():
    mesh = init_device_mesh("cpu", (2,))
    layer = nn.ParameterDict({"a": spread((4, 3), mesh, Shard(0)), "b": plain(2)})
    layer["a"].grad._local_tensor[0, : 1 + dist.get_rank()] = math.nan
    # One rank alone, as people look for what went wrong.
    if dist.get_rank():
        assert fastclip.find_nonfinite(layer) == {"a": 2}
        layer["b"].grad[0] = math.inf
        assert fastclip.find_nonfinite(layer) == {"a": 2, "b": 1}


@on_ranks(2)
def test_a_copy_shares_process_groups_which_cannot_be_pickled():
    rank = dist.get_rank()
    made = nn.ParameterList([torch.zeros(2)])
    for group in (dist.group.WORLD, init_device_mesh("cpu", (2,)), [dist.group.WORLD]):
        made.clipper = GradClipper(made, 1.0, process_group=group)
        twin = copy.deepcopy(made)
        for clipper, parameter in ((copy.copy(made.clipper), made[0]), (twin.clipper, twin[0])):
            parameter.grad = torch.tensor([3.0, 0.0] if rank else [0.0, 4.0])
            assert float(clipper.clip_()) == 5
            assert oracle([parameter.grad], 2.0) == pytest.approx(0.6 if rank else 0.8, rel=1e-5)
        with pytest.raises(TypeError, match="process_group: a process group cannot be pickled"):
            pickle.dumps(made)
    del made.clipper
    assert pickle.loads(pickle.dumps(GradClipper(made, 1.0)))._grouped.asked == [()]


def grouped() -> tuple[GradClipper, list[nn.Parameter]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = [spread((8,), mesh, Shard(0)), spread((3, 6), mesh, Shard(1)), plain(4)]
    rules = [1.0, AutoClip(50, 4), ZClip(0.5, 1.0, 2)]
    groups = [
        {"params": q, "max_norm": r, "name": f"{i}.of"}
        for i, (q, r) in enumerate(zip(made, rules, strict=True))
    ]
    return GradClipper(groups=groups), made


def norm_at(step: int) -> float:
    return 1.0 + step * step % 7


def run_steps(clipper: GradClipper, made: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter in made:
            value = norm_at(step) / math.sqrt(parameter.numel())
            local_of(parameter.grad).fill_(value)
        clipper.clip_()


def saved(path: str) -> None:
    for kind, last in (("fresh", 0), ("warm", 9)):
        clipper, made = grouped()
        run_steps(clipper, made, range(last))
        rule = list(clipper.max_norm.values())[1]
        dcp.save({"clipper": clipper, "rule": rule}, checkpoint_id=path + kind)


def restored(path: str) -> None:
    norms = [norm_at(step) for step in range(12)]
    promises = Percentile(50, 4), Outliers(0.5, 1.0, 2)
    limits = [[1.0] * 12, *(list(map(promise, norms)) for promise in promises)]
    for kind, done in itertools.product(("fresh", "warm"), (0, 2)):
        clipper, made = grouped()
        run_steps(clipper, made, range(done))
        rule = AutoClip(50, 4)
        dcp.load({"clipper": clipper, "rule": rule}, checkpoint_id=path + kind)
        first = 0 if kind == "fresh" else 9
        run_steps(clipper, made, range(first, 12))
        for one, limit in zip(clipper.stats().values(), limits, strict=True):
            each = zip(norms, limit, strict=True)
            assert one["total_norm"] == pytest.approx(norms, rel=1e-6)
            assert one["coef"] == pytest.approx([min(1, m / (n + 1e-6)) for n, m in each], rel=1e-6)
        found = [float(rule(torch.tensor(norm))) for norm in norms[first:]]
        assert found == pytest.approx(limits[1][first:])


@pytest.mark.parametrize("size", [2, 4])
def test_a_checkpoint_is_restored_onto_any_number_of_ranks(world, size, tmp_path):
    world(6 - size).run(saved, f"{tmp_path}/")
    world(size).run(restored, f"{tmp_path}/")


@pytest.mark.parametrize("scaled", [False, True])
@on_ranks(2)
def test_a_sharded_step_is_that_of_one_process(scaled):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for layer in nets[0]:
        fully_shard(layer)
    fully_shard(nets[0])
    optimizers = [torch.optim.AdamW(n.parameters(), lr=0.01, fused=True) for n in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    for step in range(6):
        x = torch.randn(4, 5)
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(nets[0](x).square().sum()).backward()
        nets[1](x).square().sum().backward()
        if step % 2:
            norm = fastclip.clipped_step(optimizers[0], 0.5, scaler)
        else:
            norm = fastclip.unscale_and_clip_(optimizers[0], 0.5, scaler)
            scaler.step(optimizers[0])
        scaler.update()
        expected = nn.utils.clip_grad_norm_(nets[1].parameters(), 0.5)
        optimizers[1].step()
        torch.testing.assert_close(full(norm), expected)
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(full(a.detach()), b.detach(), rtol=1e-4, atol=1e-5)
