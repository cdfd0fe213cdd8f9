"""Ranks that do not agree on what is finite, on input, on meshes: none waits, none is misled."""

import copy
import datetime
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import oracle, ulps
from ranks import World
from test_mesh import any_lists, full, grads_of, plain, spread, steps_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastclip
from fastclip import GradClipper, _agreement, _ops, _ranks


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Callable[[int], World]]:
    folder = tmp_path_factory.mktemp("disagreement")
    worlds = {size: World(size, folder) for size in (2, 4)}
    yield worlds.__getitem__
    for one in worlds.values():
        one.stop()


def here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def grid() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


# Orders that are no powers.


def unusual_orders(seeds: range) -> None:
    for _, parameters in any_lists(seeds):
        grads = [g.double().flatten() for g in grads_of(parameters)]
        every = torch.cat(grads) if grads else torch.zeros(0)
        for p in (-math.inf, -2.0, -1.0, -0.5, 0.0):
            if p == 0:
                expected = float(sum(bool(g.count_nonzero()) for g in grads))
            elif not every.numel():
                continue
            elif math.isinf(p):
                expected = float(every.abs().min())
            else:
                expected = float((every.abs() ** p).sum() ** (1 / p))
            norm = fastclip.clip_grad_norm_(parameters, math.inf, p)
            assert float(full(norm)) == pytest.approx(expected, rel=1e-6), p


def test_orders_of_zero_and_less_are_those_of_the_full_gradients(world):
    world(4).run(unusual_orders, range(12))


def counts_of_each() -> None:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [spread((5,), mesh, Shard(0)), plain(4), spread((3,), mesh, Replicate()), plain(2)]
    parameters[1].grad[0] = 0
    parameters[3].grad = None
    norms = fastclip.clip_grad_norms_(parameters, math.inf, 0)
    assert norms.tolist() == [5, 3, 3, 0]


def test_each_tensor_of_order_zero_counts_its_elements(world):
    world(2).run(counts_of_each)


def unusual_orders_of_stages() -> None:
    """Each rank has other tensors, the last one none."""
    rank, world = dist.get_rank(), dist.group.WORLD
    stages = [[torch.tensor([3.0, 1.0]), torch.zeros(2)], [torch.tensor([2.0, 4.0])], [], []]
    stage = [nn.Parameter(torch.zeros(2)) for _ in stages[rank]]
    for parameter, grad in zip(stage, stages[rank], strict=True):
        parameter.grad = grad + 0.5
    clip = GradClipper(stage, math.inf, 0, process_group=world).clip_
    assert float(clip()) == 3
    assert float(fastclip.clip_grad_norm_(stage, math.inf, 0, process_group=world)) == 3
    norm = fastclip.clip_grad_norm_(stage, math.inf, -1, process_group=world)
    assert float(norm) == pytest.approx(1 / sum(1 / x for x in (3.5, 1.5, 0.5, 0.5, 2.5, 4.5)))


def test_orders_of_zero_and_less_over_stages(world):
    world(4).run(unusual_orders_of_stages)


# What is not finite on one rank.


def one_is_infinite(mesh: Any, size: int) -> list[nn.Parameter]:
    parameters = [spread((8,), mesh, *[Shard(0)] * mesh.ndim), plain(2)]
    if dist.get_rank() == size - 1:
        parameters[1].grad[0] = math.inf
    return parameters


def steps_together(size: int) -> None:
    mesh = init_device_mesh("cpu", (size,)) if size == 2 else grid()
    for step in (fastclip.clipped_step, fastclip.unscale_and_clip_):
        parameters = one_is_infinite(mesh, size)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        optimizers = [torch.optim.AdamW([q], lr=1.0, fused=True) for q in parameters]
        step(optimizers, 1e9, scaler)
        if step is fastclip.unscale_and_clip_:
            for optimizer in optimizers:
                scaler.step(optimizer)
        assert not any(here(q.detach()).any() for q in parameters)
    for policy in ("keep", "zero"):
        parameters = one_is_infinite(mesh, size)
        before = here(parameters[0].grad).clone()
        fastclip.clip_grad_norm_(parameters, 1e-3, nonfinite=policy)
        assert torch.equal(here(parameters[0].grad), before * (policy == "keep"))
    for policy in (dict(error_if_nonfinite=True), dict(nonfinite="error")):
        with pytest.raises(RuntimeError, match="non-finite"):
            fastclip.clip_grad_norm_(one_is_infinite(mesh, size), 1.0, **policy)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_overflows_has_all_skip_the_step(world, size):
    world(size).run(steps_together, size)


def groups_agree_alike() -> None:
    """Of two groups only one adds up over ranks; the other is replicated, and bad on one rank."""
    mesh = init_device_mesh("cpu", (2,))
    cut, same, own = spread((4,), mesh, Shard(0)), spread((3,), mesh, Replicate()), plain(3)
    if dist.get_rank():
        own.grad[0] = math.nan
    before = [here(q.grad).clone() for q in (same, own)]
    groups = [{"params": [cut], "max_norm": 1e-3}, {"params": [same, own], "max_norm": 1e-3}]
    norms = GradClipper(groups=groups, nonfinite="keep").clip_()
    assert norms.isfinite().tolist() == [True, False]
    assert oracle([full(cut.grad)], 2) == pytest.approx(1e-3, rel=2e-3)
    for q, then in zip((same, own), before, strict=True):
        torch.testing.assert_close(here(q.grad), then, rtol=0, atol=0, equal_nan=True)


def test_groups_agree_whether_or_not_they_add_up(world):
    world(2).run(groups_agree_alike)


def agreement_is_free() -> None:
    mesh = grid()
    parameters = [spread((8, 4), mesh, Shard(0), Shard(1)), spread((4,), mesh, Shard(0), Shard(0))]
    parameters += [spread((4,), mesh, Shard(0), Replicate()), plain(3)]
    for policy in ("propagate", "keep", "zero", "error"):
        clip = lambda: fastclip.clip_grad_norm_(parameters, 1e9, nonfinite=policy)  # noqa: B023, E731
        assert steps_of(clip) == 2
    # Not all ranks ask.
    rank = dist.get_rank()
    fastclip.clip_grad_norm_(parameters, 1e9, error_if_nonfinite=rank == 1)
    fastclip.clip_grad_norm_(parameters, 1e9, nonfinite="keep" if rank else "propagate")
    world = dist.group.WORLD
    fastclip.clip_grad_norm_([plain(3)], 1e9, 2, rank == 0, process_group=world)


def test_agreement_takes_no_message_of_its_own(world):
    world(4).run(agreement_is_free)


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


def one_cannot(size: int, p: float, nonfinite: str) -> None:
    mesh = init_device_mesh("cpu", (size,)) if size == 2 else grid()
    world = dist.group.WORLD
    for (spoil, why), group in itertools.product(BAD, (None, world)):
        parameters = [spread((8,), mesh, *[Shard(0)] * mesh.ndim), plain(3)]
        before = here(parameters[0].grad).clone()
        bad = dist.get_rank() == size - 1
        if bad:
            spoil(parameters[1])
        with pytest.raises((TypeError, RuntimeError)) as caught:
            fastclip.clip_grad_norm_(parameters, 1e-3, p, process_group=group, nonfinite=nonfinite)
        assert why in str(caught.value)
        assert "parameters[1]" in str(caught.value)
        assert bad or f"on rank {size - 1}" in str(caught.value)
        assert torch.equal(here(parameters[0].grad), before)
        # The next call finds all ranks together again.
        parameters[1].grad = None
        assert (
            ulps(
                full(fastclip.clip_grad_norm_(parameters, 1e9)),
                oracle([full(parameters[0].grad)], 2),
            )
            <= 2
        )


@pytest.mark.parametrize("nonfinite", ["propagate", "keep"])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf, -1.0])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_cannot_clip_tells_the_others_why(world, size, p, nonfinite):
    world(size).run(one_cannot, size, p, nonfinite)


def one_of_many_cannot() -> None:
    """The norms of tensors and of groups are vectors."""
    mesh = init_device_mesh("cpu", (2,))
    parameters = [spread((6, 2), mesh, Shard(1)), plain(3), spread((4,), mesh, Shard(0))]
    if dist.get_rank():
        integer(parameters[1])
    groups = [{"params": [q], "max_norm": 1.0} for q in parameters]
    calls = [
        lambda: fastclip.clip_grad_norms_(parameters, 1.0),
        lambda: fastclip.clip_grad_agc_(parameters),
        lambda: GradClipper(groups=groups).clip_(),
        lambda: GradClipper(parameters, 1.0).norms_by_parameter(),
        lambda: fastclip.get_total_norm([q.grad for q in parameters]),
    ]
    for call in calls:
        with pytest.raises((TypeError, RuntimeError), match=r"\[1\]: dtype torch.int32"):
            call()


def test_a_rank_that_cannot_tells_the_others_for_many_norms(world):
    world(2).run(one_of_many_cannot)


def nan_beside_failure(p: float) -> None:
    """What is not finite on one rank does not swallow what another one says."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for policy, value in itertools.product(("propagate", "zero", "keep"), (math.nan, math.inf)):
        parameters = [spread((4,), mesh, Shard(0)), plain(3)]
        if rank == 0:
            here(parameters[0].grad).fill_(value)
        else:
            expanded(parameters[1])
        before = here(parameters[0].grad).clone()
        with pytest.raises(RuntimeError, match=r"memory location[\s\S]*parameters\[1\]"):
            fastclip.clip_grad_norm_(parameters, 1e-3, p, nonfinite=policy)
        assert torch.equal(here(parameters[0].grad).nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("p", [1.0, 2.0, 8.0, math.inf, 0.0])
def test_a_nan_does_not_swallow_that_a_rank_cannot_clip(world, p):
    world(2).run(nan_beside_failure, p, seconds=30)


def nan_with_bits() -> None:
    """A NaN may have any bits, and is no failure; and a failure is heard under a dispatch mode."""
    from torch.distributed.tensor.debug import CommDebugMode

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


def test_bits_of_a_nan_are_no_failure(world):
    world(2).run(nan_with_bits, seconds=30)


def raises_oddly(*_: Any, **__: Any) -> Any:
    raise AttributeError("a private name of torch that has gone")


def unexpected(size: int, has_store: bool) -> None:
    """An error that nobody foresaw, on one rank or two; with and without a store for its reason."""
    mesh = init_device_mesh("cpu", (size,)) if size == 2 else grid()
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


@pytest.mark.parametrize("has_store", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_an_error_that_nobody_foresaw_is_told_too(world, size, has_store):
    world(size).run(unexpected, size, has_store, seconds=60)


def half_under_a_scaler() -> None:
    """Torch refuses to unscale float16; only one rank has such a gradient."""
    mesh = init_device_mesh("cpu", (2,))
    cut, own = spread((4,), mesh, Shard(0)), plain(3)
    if dist.get_rank():
        own.grad_dtype = None
        own.grad = torch.ones(3, dtype=torch.float16)
    optimizer = torch.optim.SGD([cut, own], 0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises((ValueError, RuntimeError), match="is float16, which torch"):
        fastclip.unscale_and_clip_(optimizer, 1.0, scaler)


def test_a_gradient_that_cannot_be_unscaled_is_told(world):
    world(2).run(half_under_a_scaler, seconds=30)


def compiled_on_one_rank() -> None:
    mesh, rank = grid(), dist.get_rank()
    for p in (2.0, 1.0, math.inf, 8.0):
        parameters = [spread((8, 4), mesh, Shard(0), Shard(1)), plain(3)]
        parameters += [spread((6,), mesh, Shard(0), Replicate()) for _ in range(2)]
        parameters += [spread((6,), mesh, Replicate(), Shard(0))]
        expected = oracle(grads_of(parameters), p)
        torch._dynamo.reset()
        clip = lambda: fastclip.clip_grad_norm_(parameters, expected / 2, p)  # noqa: B023, E731
        norm = torch.compile(clip, backend="aot_eager", fullgraph=True)() if rank == 2 else clip()
        assert ulps(full(norm), expected) <= 3
        assert oracle(grads_of(parameters), p) == pytest.approx(expected / 2, rel=1e-4)


def test_a_rank_may_be_compiled_alone(world):
    world(4).run(compiled_on_one_rank, seconds=120)


def one_adds_nothing(nonfinite: str) -> None:
    """What is wrong on rank 1 is of a tensor for which rank 0 speaks, or of a group of its own."""
    mesh, world = init_device_mesh("cpu", (2,)), dist.group.WORLD
    twin, mine = spread((3,), mesh, Replicate()), plain(3)
    groups = [{"params": [twin], "max_norm": 1.0}]
    groups += [{"params": [mine], "max_norm": 1.0, "process_group": world}]
    for parameters in ([twin], [twin, mine]):
        twin.grad = distribute_tensor(torch.ones(3), mesh, [Replicate()])
        if dist.get_rank():
            twin.grad = DTensor.from_local(torch.ones(1).expand(3), mesh, [Replicate()])
        calls = [
            lambda own=parameters: fastclip.clip_grad_norm_(
                own, 1e-3, process_group=world, nonfinite=nonfinite
            ),
            lambda: GradClipper(groups=groups, nonfinite=nonfinite).clip_(),
        ]
        for call in calls:
            before = here(twin.grad).clone()
            with pytest.raises(RuntimeError, match="single memory location"):
                call()
            assert torch.equal(here(twin.grad), before)


@pytest.mark.parametrize("nonfinite", ["propagate", "keep"])
def test_a_rank_that_adds_nothing_tells_the_others_too(world, nonfinite):
    world(2).run(one_adds_nothing, nonfinite, seconds=30)


def one_of_a_grid_cannot() -> None:
    """The rank across adds up with ranks that are told, and tell it in turn."""
    mesh = grid()
    rows, columns = spread((2, 4), mesh["tp"], Shard(1)), spread((2, 4), mesh["dp"], Shard(1))
    mine = plain(3)
    if dist.get_rank() == 0:
        integer(mine)
    with pytest.raises((TypeError, RuntimeError), match=r"dtype torch\.int32"):
        fastclip.clip_grad_agc_([rows, columns, mine])


def test_no_rank_of_a_grid_waits_for_one_that_raised(world):
    world(4).run(one_of_a_grid_cannot, seconds=20)


def others_are_placed_all_the_same() -> None:
    """A gradient that is reduced first needs all ranks, also one that found an error before it."""
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
    partial.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    parameters = [plain(3), partial]
    if dist.get_rank():
        integer(parameters[0])
    with pytest.warns(UserWarning, match="redistributed"), pytest.raises((TypeError, RuntimeError)):
        # Nothing is sent over a mesh that cuts nothing, so that only the rank itself raises there.
        fastclip.clip_grad_norm_([*parameters, spread((2,), mesh, Shard(0))], 1.0)


def test_a_rank_that_cannot_still_reduces_with_the_others(world):
    world(2).run(others_are_placed_all_the_same)


def other_groups() -> None:
    a, b = plain(3), plain(3)
    rank, world = dist.get_rank(), dist.group.WORLD
    groups = [{"params": [a], "max_norm": 1.0, "name": "trunk"}]
    more = [*groups, {"params": [b], "max_norm": 1.0, "name": "head"}]
    with pytest.raises(ValueError, match=r"groups: expected the same on all ranks.*'trunk'"):
        GradClipper(groups=more if rank else groups, process_group=world).clip_()
    with pytest.raises(ValueError, match="groups: expected the same on all ranks"):
        GradClipper(groups=more[::-1] if rank else more, process_group=world).clip_()
    clipper = GradClipper(groups=more, process_group=world)
    assert steps_of(clipper.clip_) == 2
    assert steps_of(clipper.clip_) == 1
    # None of them is measured.
    left = GradClipper(groups=[{"params": [a], "max_norm": None}], process_group=world)
    assert left.clip_().tolist() == []


def test_groups_are_the_same_on_all_ranks(world):
    world(2).run(other_groups)


def differing(size: int) -> None:
    """What ranks have to have alike before they clip together, and every time anew."""
    mesh, rank = init_device_mesh("cpu", (size,)), dist.get_rank()
    last = rank == size - 1
    parameters = [spread((4 * size,), mesh, Shard(0)), plain(2)]
    seen = fastclip.AutoClip(50)
    for norm in (1.0, 2.0):
        seen(torch.tensor(norm, dtype=torch.float64))
    restored = fastclip.AutoClip(50)
    restored.load_state_dict(seen.state_dict())
    for mine, topic in (
        (dict(max_norm=2.0 if last else 1.0), "thresholds and rules ['2.0']"),
        (dict(max_norm=1.0, norm_type=1 if last else 2), "norm_type and nonfinite [1.0"),
        (dict(max_norm=1.0, nonfinite="keep" if last else "zero"), "norm_type and nonfinite"),
        (dict(max_norm=fastclip.AutoClip(50) if last else restored), "at {'count': 0}"),
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


@pytest.mark.parametrize("size", [2, 4])
def test_clippers_compare_what_they_clip_by_at_the_first_step(world, size):
    world(size).run(differing, size, seconds=30)


# Meshes and groups that are no grid.


def crossing() -> None:
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


def full_square(parameter: nn.Parameter) -> Tensor:
    return full(parameter.grad).double().square().sum()


def test_meshes_that_cross_are_refused_on_all_their_ranks(world):
    world(4).run(crossing)


def lines_of_a_grid() -> None:
    """Meshes that each rank made by themselves, in any order: rows and columns are no crossing."""
    rank = dist.get_rank()
    rows = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])]
    columns = [DeviceMesh("cpu", ranks) for ranks in ([0, 2], [1, 3])]
    whole = DeviceMesh("cpu", [0, 1, 2, 3])
    a = spread((6,), rows[rank // 2], Shard(0))
    b = spread((5, 2), columns[rank % 2], Shard(1))
    c = spread((9,), whole, Shard(0))
    expected = sum(map(full_square, (a, b, c))) ** 0.5
    assert ulps(full(fastclip.clip_grad_norm_([a, b, c], 1e9)), float(expected)) <= 2


def test_lines_of_a_grid_do_not_cross(world):
    world(4).run(lines_of_a_grid)


def lines_of_an_uneven_grid() -> None:
    """Its rows and columns, {0, 1} and {1, 2} among them, have the same distances."""
    root = DeviceMesh("cpu", [[0, 1], [3, 2]], mesh_dim_names=("column", "row"))
    items = [spread((6,), root["row"], Shard(0)), spread((5, 2), root["column"], Shard(1))]
    items.append(spread((9,), root, Shard(0), Shard(0)))
    expected = sum(map(full_square, items)) ** 0.5
    # Each rank has a row and a column of its own, of which no norm is the same on all.
    assert ulps(full(fastclip.clip_grad_norm_(items, 1e9)), float(expected)) <= 2


def test_lines_of_an_uneven_grid_do_not_cross(world):
    world(4).run(lines_of_an_uneven_grid)


def diagonal() -> None:
    mesh, across = grid(), DeviceMesh("cpu", [1, 2])
    inside = dist.get_rank() in (1, 2)
    parameters = [spread((4,), across, Shard(0)) for _ in range(inside)]
    squares = full_square(parameters[0]) if inside else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(squares)
    lines = [mesh.get_group(0), mesh.get_group(1)]
    for asked in (mesh, lines, lines[::-1], [mesh["tp"], mesh["dp"]], dist.group.WORLD):
        norm = fastclip.clip_grad_norm_(parameters, 1e9, process_group=asked)
        assert ulps(norm, (float(squares) / 2) ** 0.5) <= 2


def test_a_mesh_across_the_groups_counts_once(world):
    world(4).run(diagonal)


def own_groups() -> None:
    """Experts differ on the ranks of tp, the head is the same there: each group knows its own."""
    mesh = grid()
    trunk = spread((8, 8), mesh, Shard(0), Shard(1))
    head = spread((4, 8), mesh["dp"], Shard(0))
    torch.manual_seed(7 + mesh["tp"].get_local_rank())
    expert = plain(4, 4)
    squares = expert.grad.double().square().sum()
    dist.all_reduce(squares, group=mesh["tp"].get_group())
    expected = [float(full_square(trunk) + full_square(head)) ** 0.5, float(squares) ** 0.5]
    before = expert.grad.clone()
    clipper = GradClipper(
        groups=[
            {"params": [trunk, head], "max_norm": math.inf, "name": "model"},
            {"params": [expert], "max_norm": expected[1] / 2, "process_group": mesh["tp"]},
        ]
    )
    for norm, value in zip(clipper.clip_(), expected, strict=True):
        assert ulps(norm, value) <= 2
    torch.testing.assert_close(expert.grad, before / 2)


def test_groups_of_a_clipper_have_their_own_process_groups(world):
    world(4).run(own_groups)


def only_the_gradient_is_spread() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    mesh = init_device_mesh("cpu", (2,))
    parameter.grad = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    with pytest.raises(TypeError, match=r"gradient of parameters\[0\]: expected a plain tensor"):
        fastclip.clip_grad_norm_([parameter], 1.0)


def test_a_spread_gradient_of_a_plain_parameter_is_named(world):
    world(2).run(only_the_gradient_is_spread)
