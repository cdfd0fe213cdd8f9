"""Norms of tensors, rows and groups over ranks: against one process that has the full gradients."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import ORDERS, oracle, ulps
from ranks import World
from test_mesh import any_lists, full, plain, spread
from test_per_tensor import agc
from test_random_clipper import Outliers, Percentile
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fastclip
from fastclip import AutoClip, GradClipper, ZClip
from fastclip._ranks import local_of


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Callable[[int], World]]:
    folder = tmp_path_factory.mktemp("ranks")
    worlds = {size: World(size, folder) for size in (2, 4)}
    yield worlds.__getitem__
    for one in worlds.values():
        one.stop()


def same_everywhere(*values: float) -> None:
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    assert all(found == gathered[0] for found in gathered)


def each_tensor(seeds: range) -> None:
    for generator, parameters in any_lists(seeds):
        p = generator.choice(ORDERS)
        before = [full(q.grad).clone() for q in parameters]
        norms = fastclip.clip_grad_norms_(parameters, 3.0, p)
        same_everywhere(*norms.tolist())
        for q, grad, norm in zip(parameters, before, norms, strict=True):
            expected = oracle([grad], p)
            assert ulps(norm, expected) <= 2
            coef = min(1, 3.0 / (expected + 1e-6))
            torch.testing.assert_close(full(q.grad), grad * coef)


def test_each_tensor_of_any_layout_is_clipped_by_its_own_norm(world):
    world(4).run(each_tensor, range(40), seconds=120)


def beyond_float32() -> None:
    mesh = init_device_mesh("cpu", (2,))
    clips = [
        lambda some: fastclip.clip_grad_norm_(some, 1.0),
        lambda some: fastclip.clip_grad_norm_(some, 1.0, nonfinite="keep"),
        lambda some: fastclip.clip_grad_norm_(some, lambda norm: norm / norm),
        lambda some: fastclip.clip_grad_norm_(some, 1.0, error_if_nonfinite=True),
        lambda some: GradClipper(groups=[{"params": some, "max_norm": 1.0}]).clip_()[0],
        lambda some: fastclip.clip_grad_norms_(some, 1.0)[0],
    ]
    for clip in clips:
        parameter = spread((6,), mesh, Shard(0))
        local_of(parameter.grad).fill_(2e38)
        norm = local_of(clip([parameter]))
        assert (norm.dtype, norm.item()) == (torch.float32, math.inf)
        after = full(parameter.grad)
        torch.testing.assert_close(after, torch.full_like(after, 6**-0.5), rtol=1e-5, atol=0)


def test_a_norm_that_only_all_ranks_bring_beyond_float32_clips_by_its_coefficient(world):
    world(2).run(beyond_float32)


def each_unit(seeds: range) -> None:
    for _, parameters in any_lists(seeds):
        for q in parameters:
            with torch.no_grad():
                local_of(q).copy_(local_of(q.grad) * float(torch.rand(())))
        before = [full(q.grad).clone() for q in parameters]
        weights = [full(q.detach()) for q in parameters]
        fastclip.clip_grad_agc_(parameters, 0.5)
        for q, weight, grad in zip(parameters, weights, before, strict=True):
            expected = agc(weight, grad, 0.5, 1e-3).float()
            torch.testing.assert_close(full(q.grad), expected)


def test_each_unit_of_any_layout_is_clipped_adaptively(world):
    world(4).run(each_unit, range(40), seconds=120)


def groups(seeds: range) -> None:
    for generator, parameters in any_lists(seeds):
        p = generator.choice(ORDERS)
        labels = [generator.randrange(3) for _ in parameters]
        members = [
            [q for q, label in zip(parameters, labels, strict=True) if label == one]
            for one in range(3)
        ]
        before = [[full(q.grad).clone() for q in some] for some in members]
        thresholds = [2.0, math.inf, AutoClip(50, 3)]
        limits = [2.0, math.inf, oracle(before[2], p)]
        clipper = GradClipper(
            groups=[
                {"params": some, "max_norm": threshold}
                for some, threshold in zip(members, thresholds, strict=True)
            ],
            norm_type=p,
        )
        norms = clipper.clip_()
        same_everywhere(*norms.tolist())
        for some, grads, norm, limit in zip(members, before, norms, limits, strict=True):
            expected = oracle(grads, p)
            assert ulps(norm, expected) <= 2
            coef = min(1, limit / (expected + 1e-6))
            for q, grad in zip(some, grads, strict=True):
                torch.testing.assert_close(full(q.grad), grad * coef)


def test_groups_of_any_layout_have_their_own_norms(world):
    world(4).run(groups, range(40), seconds=120)


def normalised(seeds: range) -> None:
    for _, parameters in any_lists(seeds):
        fastclip.normalize_grad_(parameters, 7.0)
        assert oracle([full(q.grad) for q in parameters], 2.0) == pytest.approx(7.0, rel=1e-6)


def test_gradients_of_any_layout_are_normalised(world):
    world(4).run(normalised, range(10))


def missing() -> None:
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    parameters = [spread((4, 3), mesh, Shard(1)), spread((6,), mesh, Shard(0)), plain(2)]
    clipper = GradClipper(
        groups=[
            {"params": parameters[:1], "max_norm": 1.0},
            {"params": parameters[1:], "max_norm": 1.0},
        ]
    )
    there = parameters[0].grad._local_tensor.clone()
    if rank == 1:
        parameters[0].grad = None
    gathered = [None, None]
    dist.all_gather_object(gathered, there)
    rest = [full(parameters[1].grad), parameters[2].grad]
    expected = [oracle([gathered[0]], 2.0), *(oracle([g], 2.0) for g in rest)]
    both = oracle(rest, 2.0)
    norms = fastclip.clip_grad_norms_(parameters, math.inf)
    assert norms.tolist() == pytest.approx(expected)
    assert list(clipper.norms_by_parameter().values()) == pytest.approx(expected)
    kept = GradClipper(parameters, math.inf, each=True)
    assert full(kept.clip_()).item() == pytest.approx(oracle([torch.tensor(expected)], 2.0))
    if rank == 0:
        # What the last step has measured is there on every rank.
        assert list(kept.norms_by_parameter().values()) == pytest.approx(expected)
    norms = clipper.clip_()
    assert norms.tolist() == pytest.approx([expected[0], both])
    for parameter in parameters:
        with torch.no_grad():
            parameter.zero_()
    fastclip.clip_grad_agc_(parameters, 1.0, eps=1e-2)
    if rank == 0:
        # The rows are those of this rank alone: the other has none.
        rows = parameters[0].grad._local_tensor.norm(dim=1)
        torch.testing.assert_close(rows, torch.full((4,), 1e-2))
    for parameter in parameters[1:]:
        assert float(full(parameter.grad).norm()) == pytest.approx(1e-2)


def spoilt_on_one() -> None:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [spread((4, 3), mesh, Shard(0)), plain(2)]
    if dist.get_rank() == 1:
        parameters[1].grad[0] = math.nan
    before = [q.grad.clone() for q in parameters]
    clipper = GradClipper(parameters, 1e-3, nonfinite="keep")
    clipper.clip_()
    for q, grad in zip(parameters, before, strict=True):
        torch.testing.assert_close(local_of(q.grad), local_of(grad), equal_nan=True)
    assert clipper.stats()["nonfinite"] == 1


def test_a_norm_spoilt_on_one_rank_is_skipped_on_all(world):
    world(2).run(spoilt_on_one)


def test_a_rank_without_a_gradient_takes_part(world):
    world(2).run(missing)


def other_rows() -> None:
    mesh = init_device_mesh("cpu", (2,))
    shared = spread((4, 3), mesh, Shard(1))
    for rows in ((3, 5), (5, 3), (7, 2)):
        made = [shared, *(plain(count, 2) for count in rows), plain(2)]
        made[3].grad = None
        for parameter in made[1:]:
            column = torch.arange(1.0, 1 + len(parameter)).view(
                len(parameter), *[1] * (parameter.dim() - 1)
            )
            parameter.data = column.expand_as(parameter).clone()
            if parameter.grad is not None:
                parameter.grad.fill_(100.0)
        fastclip.clip_grad_agc_(made, 0.5)
        for parameter in made[1:3]:
            expected = 0.5 * parameter.detach().norm(dim=1)
            torch.testing.assert_close(parameter.grad.norm(dim=1), expected)


def test_rows_are_those_of_the_tensors_at_hand(world):
    world(2).run(other_rows)


def counted() -> None:
    mesh = init_device_mesh("cpu", (2,))
    layer = nn.ParameterDict({"a": spread((4, 3), mesh, Shard(0)), "b": plain(2)})
    layer["a"].grad._local_tensor[0, : 1 + dist.get_rank()] = math.nan
    # One rank alone, as people look for what went wrong.
    if dist.get_rank():
        assert fastclip.find_nonfinite(layer) == {"a": 2}
        layer["b"].grad[0] = math.inf
        assert fastclip.find_nonfinite(layer) == {"a": 2, "b": 1}


def test_what_is_not_finite_is_counted_on_a_rank_alone(world):
    world(2).run(counted)


def stages() -> None:
    rank = dist.get_rank()
    mine = [plain(3 + rank)]
    mine[0].grad = torch.full((3 + rank,), 1.0 + rank)
    clipper = GradClipper(mine, 1.0, process_group=dist.group.WORLD)
    for _ in range(2):
        mine[0].grad.fill_(1.0 + rank)
        assert float(clipper.clip_()) == pytest.approx(math.sqrt(3 + 4 * 4))
    assert clipper.stats()["clipped"] == 2
    if rank == 1:
        mine[0].grad.fill_(math.nan)
    before = mine[0].grad.clone()
    skipping = GradClipper(mine, 1.0, nonfinite="keep", process_group=dist.group.WORLD)
    skipping.clip_()
    torch.testing.assert_close(mine[0].grad, before, equal_nan=True)
    assert skipping.stats()["nonfinite"] == 1


def test_pipeline_stages_share_a_clipper(world):
    world(2).run(stages)


def copied() -> None:
    rank = dist.get_rank()
    made = nn.ParameterList([torch.zeros(2)])
    for group in (dist.group.WORLD, init_device_mesh("cpu", (2,)), [dist.group.WORLD]):
        made.clipper = GradClipper(made, 1.0, process_group=group)
        twin = copy.deepcopy(made)
        for one in (copy.copy(made.clipper), twin.clipper):
            for parameter in (made[0], twin[0]):
                parameter.grad = torch.tensor([3.0, 0.0] if rank else [0.0, 4.0])
            assert float(one.clip_()) == 5
            clipped, other = (made, twin) if one is not twin.clipper else (twin, made)
            assert oracle([clipped[0].grad], 2.0) == pytest.approx(0.6 if rank else 0.8, rel=1e-5)
            assert oracle([other[0].grad], 2.0) == (3 if rank else 4)
        with pytest.raises(TypeError, match="process_group: a process group cannot be pickled"):
            pickle.dumps(made)
    del made.clipper
    assert pickle.loads(pickle.dumps(GradClipper(made, 1.0)))._grouped.asked == [()]


def test_a_copy_shares_process_groups_which_cannot_be_pickled(world):
    world(2).run(copied)


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
        dcp.save(
            {"clipper": clipper, "rule": list(clipper.max_norm.values())[1]},
            checkpoint_id=path + kind,
        )


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


def steps(scaled: bool) -> None:
    from torch.distributed.fsdp import fully_shard

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
        for net, optimizer, scale in zip(
            nets, optimizers, (scaler.scale, lambda x: x), strict=True
        ):
            optimizer.zero_grad()
            scale(net(x).square().sum()).backward()
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


@pytest.mark.parametrize("scaled", [False, True])
def test_a_sharded_step_is_that_of_one_process(world, scaled):
    world(2).run(steps, scaled)
