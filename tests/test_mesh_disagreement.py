"""Ranks that do not agree on what is finite, on input, on meshes: none waits, none is misled."""

import copy
import datetime
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import oracle, ulps
from ranks import on_ranks
from test_mesh import full, grads_of, here, plain, spread, steps_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import fastclip
from fastclip import GradClipper, _agreement, _ops, _ranks


def grid(size: int = 4) -> Any:
    """A line of two ranks, or a square of four."""
    dimensions = size // 2
    return init_device_mesh("cpu", (2,) * dimensions, mesh_dim_names=("dp", "tp")[:dimensions])


# What is not finite on one rank.


@pytest.mark.parametrize("step", [fastclip.clipped_step, fastclip.unscale_and_clip_])
@on_ranks(2, 4)
def test_a_rank_that_overflows_has_all_skip_the_step(size, step):
    mesh = grid(size)
    parameters = [spread((8,), mesh, *[Shard(0)] * mesh.ndim), plain(2)]
    if dist.get_rank() == size - 1:
        parameters[1].grad[0] = math.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        fastclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    optimizers = [torch.optim.AdamW([q], lr=1.0, fused=True) for q in parameters]
    step(optimizers, 1e9, scaler)
    if step is fastclip.unscale_and_clip_:
        for optimizer in optimizers:
            scaler.step(optimizer)
    assert not any(here(q.detach()).any() for q in parameters)


@on_ranks(4)
def test_agreement_takes_no_message_of_its_own():
    mesh = grid()
    parameters = [spread((8, 4), mesh, Shard(0), Shard(1)), spread((4,), mesh, Shard(0), Shard(0))]
    parameters += [spread((4,), mesh, Shard(0), Replicate()), plain(3)]
    # A slice of the mesh has the groups of its dimension.
    parameters.append(spread((4,), mesh["tp"], Shard(0)))
    for policy in ("propagate", "keep", "zero", "error"):
        clip = lambda: fastclip.clip_grad_norm_(parameters, 1e9, nonfinite=policy)  # noqa: B023, E731
        assert steps_of(clip) == 2
    # Not all ranks ask.
    rank = dist.get_rank()
    fastclip.clip_grad_norm_(parameters, 1e9, error_if_nonfinite=rank == 1)
    fastclip.clip_grad_norm_(parameters, 1e9, nonfinite="keep" if rank else "propagate")
    fastclip.clip_grad_norm_([plain(3)], 1e9, 2, rank == 0, process_group=dist.group.WORLD)


# What cannot be clipped on one rank.


def expanded(parameter: nn.Parameter) -> None:
    parameter.grad = torch.ones(1).expand(3)


def integer(parameter: nn.Parameter) -> None:
    parameter.grad_dtype = None
    parameter.grad = torch.ones(3, dtype=torch.int32)


def of_a_mesh(parameter: nn.Parameter) -> None:
    alone = DeviceMesh("cpu", [dist.get_rank()], _init_backend=False)
    parameter.grad = DTensor.from_local(torch.ones(3), alone, [Replicate()])


BAD = [(expanded, "single memory location"), (integer, "dtype torch.int32"), (of_a_mesh, "DTensor")]


@pytest.mark.parametrize("value", [2.0, math.inf, math.nan])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "keep"])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 8.0, math.inf, 0.0, -1.0])
@on_ranks(2, 4)
def test_a_rank_that_cannot_clip_tells_the_others_why(size, p, nonfinite, value):
    """What is not finite on one rank does not swallow what another one says."""
    mesh, rank = grid(size), dist.get_rank()
    for (spoil, why), group in itertools.product(BAD, (None, dist.group.WORLD)):
        parameters = [spread((8,), mesh, *[Shard(0)] * mesh.ndim), plain(3)]
        local = here(parameters[0].grad).fill_(2.0 if rank else value)
        before, bad = local.clone(), rank == size - 1
        if bad:
            spoil(parameters[1])
        with pytest.raises((TypeError, RuntimeError)) as caught:
            fastclip.clip_grad_norm_(parameters, 1e-3, p, process_group=group, nonfinite=nonfinite)
        assert why in str(caught.value)
        assert "parameters[1]" in str(caught.value)
        assert bad or f"on rank {size - 1}" in str(caught.value)
        torch.testing.assert_close(local, before, rtol=0, atol=0, equal_nan=True)
        # The next call finds all ranks together again.
        parameters[1].grad = None
        expected = oracle([full(parameters[0].grad)], 2)
        norm = full(fastclip.clip_grad_norm_(parameters, 1e9)).item()
        assert norm == pytest.approx(expected, nan_ok=True)


@on_ranks(2, seconds=30)
def test_bits_of_a_nan_are_no_failure():
    """A NaN may have any bits, and is no failure; and a failure is heard under a dispatch mode."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = spread((4,), mesh, Shard(0), dtype=torch.float64)
    if dist.get_rank():
        here(parameter.grad).view(torch.int64).fill_((0x7FF8 << 48) | 12345)
    for p in (1.0, 2.0, math.inf, 8.0):
        assert math.isnan(full(fastclip.clip_grad_norm_([parameter], math.inf, p)))
        assert math.isnan(full(fastclip.get_total_norm([parameter.grad], p)))
    parameter = spread((4,), mesh, Shard(0))
    if dist.get_rank():
        parameter.grad = DTensor.from_local(torch.ones(1).expand(2), mesh, [Shard(0)])
    for _ in range(2):
        with CommDebugMode(), pytest.raises(RuntimeError, match="single memory location"):
            fastclip.clip_grad_norm_([parameter], 1.0)


def raises_oddly(*_: Any, **__: Any) -> Any:
    raise AttributeError("a private name of torch that has gone")


@pytest.mark.parametrize("has_store", [True, False])
@on_ranks(2, 4, seconds=60)
def test_an_error_that_nobody_foresaw_is_told_too(size, has_store):
    """It is on one rank or two; with and without a store for its reason."""
    mesh = grid(size)
    # Adaptive clipping adds up over ranks what is cut by columns.
    parameters = [spread((8, 8), mesh, *[Shard(1)] * mesh.ndim), plain(3)]
    groups = [{"params": [q], "max_norm": 1.0} for q in parameters]
    clipper, many = GradClipper(parameters, 1.0), GradClipper(groups=groups)
    clipper.clip_()
    many.clip_()
    calls = [
        lambda: fastclip.clip_grad_norm_(parameters, 1.0),
        lambda: fastclip.clip_grad_norm_(parameters, 1.0, math.inf, nonfinite="keep"),
        lambda: fastclip.clip_grad_norms_(parameters, 1.0),
        lambda: fastclip.clip_grad_agc_(parameters),
        lambda: fastclip.normalize_grad_(parameters),
        lambda: fastclip.clipped_step(torch.optim.SGD(parameters, 0.1, fused=True), 1.0),
        lambda: fastclip.NormAccumulator(parameters).clip_(1.0),
        clipper.clip_,
        many.clip_,
    ]
    for failing, call in itertools.product({1, size - 1}, calls):
        fails = dist.get_rank() == failing or (failing == 3 and dist.get_rank() == 1)
        with pytest.MonkeyPatch.context() as patch:
            if fails:
                patch.setattr(_ops, "extension", None)
                patch.setattr(_ops, "norms", raises_oddly)
                patch.setattr(_ops, "norm", raises_oddly)
            patch.setattr(_ranks.failure, "PATIENCE", datetime.timedelta(seconds=0.5))
            if not has_store:
                patch.setattr(_ranks.failure, "_store", raises_oddly)
            with pytest.raises(AttributeError if fails else RuntimeError) as caught:
                call()
        if failing == 1 and has_store:
            assert "a private name of torch" in str(caught.value)
        assert fails or "another rank could not take part" in str(caught.value)
    assert fastclip.clip_grad_norm_(parameters, 1.0).isfinite()


@on_ranks(4, seconds=240)
def test_a_rank_may_be_compiled_alone():
    """Its graph sends what is sent without one, also where it lacks a gradient."""
    mesh, rank = grid(), dist.get_rank()
    ways = [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Replicate(), Shard(0))]
    for p, lacks in itertools.product((2.0, 1.0, 8.0, math.inf, 0.5, -1.0), (False, True)):
        made = []
        for _ in range(2):
            torch.manual_seed(0)
            made.append([*(spread((8, 4), mesh, *way) for way in (*ways, ways[1])), plain(3)])
            if lacks and rank == 2:
                made[-1][0].grad = None
        torch._dynamo.reset()
        clip = lambda qs: fastclip.clip_grad_norm_(qs, 1e-3, p)  # noqa: B023, E731
        expected = clip(made[0])
        alone = torch.compile(clip, backend="aot_eager", fullgraph=True) if rank == 2 else clip
        torch.testing.assert_close(full(alone(made[1])), full(expected), rtol=1e-6, atol=0)
        for one, other in zip(*made, strict=True):
            if one.grad is not None:
                torch.testing.assert_close(here(one.grad), here(other.grad), rtol=1e-6, atol=0)


@on_ranks(2)
def test_groups_are_the_same_on_all_ranks():
    a, b = plain(3), plain(3)
    rank, world = dist.get_rank(), dist.group.WORLD
    groups = [{"params": [a], "max_norm": 1.0, "name": "trunk"}]
    more = [*groups, {"params": [b], "max_norm": 1.0, "name": "head"}]
    with pytest.raises(ValueError, match=r"groups: expected the same on all ranks.*'trunk'"):
        GradClipper(groups=more if rank else groups, process_group=world).clip_()
    with pytest.raises(ValueError, match="groups: expected the same on all ranks"):
        GradClipper(groups=more[::-1] if rank else more, process_group=world).clip_()
    # None of them is measured.
    left = GradClipper(groups=[{"params": [a], "max_norm": None}], process_group=world)
    assert left.clip_().tolist() == []


@on_ranks(2, 4, seconds=30)
def test_clippers_compare_what_they_clip_by_at_the_first_step(size):
    """What ranks have to have alike before they clip together, and every time anew."""
    mesh, last = init_device_mesh("cpu", (size,)), dist.get_rank() == size - 1
    parameters = [spread((4 * size,), mesh, Shard(0)), plain(2)]
    seen = fastclip.AutoClip(50)
    for norm in (1.0, 2.0):
        seen(torch.tensor(norm, dtype=torch.float64))
    for mine, topic in (
        (dict(max_norm=2.0 if last else 1.0), "thresholds and rules ['2.0']"),
        (dict(max_norm=1.0, norm_type=1 if last else 2), "norm_type and nonfinite [1.0"),
        (dict(max_norm=1.0, nonfinite="keep" if last else "zero"), "norm_type and nonfinite"),
        (dict(max_norm=fastclip.AutoClip(50) if last else seen), "at {'count': 0}"),
        (dict(max_norm=fastclip.AutoClip(51 if last else 50)), "{'percentile': 51"),
        (dict(max_norm=fastclip.ZClip() if last else fastclip.AutoClip(50)), "ZClip of"),
    ):
        before = here(parameters[0].grad).clone()
        with pytest.raises(ValueError, match="expected the same on all ranks") as caught:
            GradClipper(parameters, **mine).clip_()
        assert not last or topic in str(caught.value), topic
        assert torch.equal(here(parameters[0].grad), before)
    clipper = GradClipper(parameters, fastclip.AutoClip(50))
    assert steps_of(clipper.clip_) == 2
    assert steps_of(clipper.clip_) == 1
    assert steps_of(copy.deepcopy(clipper).clip_) == 2
    state = clipper.state_dict()
    clipper.load_state_dict(state)
    if last:
        clipper.max_norm.load_state_dict(fastclip.AutoClip(50).state_dict())
    with pytest.raises(ValueError, match=r"thresholds and rules .*AutoClip of .* at"):
        clipper.clip_()
    clipper.load_state_dict(state)
    assert steps_of(clipper.clip_) == 2
    # A rank of another build rounds otherwise.
    with pytest.MonkeyPatch.context() as patch:
        if last:
            patch.setattr(_agreement, "has_kernels", lambda device: not _ops.has_kernels(device))
        with pytest.raises(ValueError, match="versions and kernels"):
            GradClipper(parameters, 1.0).clip_()


# Meshes and groups that are no grid.


@on_ranks(4)
def test_meshes_that_cross_are_refused_on_all_their_ranks():
    one, other = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [1, 2])
    rank = dist.get_rank()
    parameters = [spread((4,), one, Shard(0))] if rank < 2 else []
    parameters += [spread((4,), other, Shard(0))] if rank in (1, 2) else []
    for q in parameters:
        here(q.grad).fill_(3 if q.device_mesh == one else 4)
    before = [here(q.grad).clone() for q in parameters]
    if rank < 3:
        with pytest.raises((ValueError, RuntimeError), match=r"ranks \[0, 1\].*ranks \[1, 2\]"):
            fastclip.clip_grad_norm_(parameters, 1e-3)
    assert all(torch.equal(here(q.grad), b) for q, b in zip(parameters, before, strict=True))
    # Norms of their own do not cross.
    own = fastclip.clip_grad_norms_(parameters, math.inf)
    expected = [6.0 if q.device_mesh == one else 8.0 for q in parameters]
    assert own.tolist() == pytest.approx(expected, rel=1e-6)
    # Over all ranks there is one norm again.
    norm = fastclip.clip_grad_norm_(parameters, 1e9, process_group=dist.group.WORLD)
    assert float(norm) == 10


@on_ranks(4)
def test_lines_of_an_uneven_grid_do_not_cross():
    """Its rows and columns, {0, 1} and {1, 2} among them, have the same distances."""
    root = DeviceMesh("cpu", [[0, 1], [3, 2]], mesh_dim_names=("column", "row"))
    items = [spread((6,), root["row"], Shard(0)), spread((5, 2), root["column"], Shard(1))]
    items.append(spread((9,), root, Shard(0), Shard(0)))
    expected = oracle(grads_of(items), 2)
    # Each rank has a row and a column of its own, of which no norm is the same on all.
    assert ulps(full(fastclip.clip_grad_norm_(items, 1e9)), expected) <= 2
