"""Every parallel layout, on real processes; the oracle is float64 on the full gradients.

Functions without `test_` run on every rank of a world; what they assert, they assert there.
"""

import copy
import functools
import gc
import math
import operator
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import DTYPES, emulation_folder, name_of, oracle, precision, ulps
from ranks import World
from torch import Tensor, nn

import fastclip
from fastclip import _ops, _ranks
from fastclip._gradients import reading

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

ORDERS = [1.0, 2.0, 3.0, 8.0, math.inf]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Callable[[int], World]]:
    folder = tmp_path_factory.mktemp("stores")
    worlds = functools.cache(lambda size: World(size, folder))
    yield worlds
    for size in (2, 4):
        worlds(size).stop()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def grads_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [full(p.grad).detach().clone() for p in parameters if p.grad is not None]


def check(parameters: list[nn.Parameter], p: float = 2.0, elsewhere: Any = None) -> Tensor:
    """Clips to half the norm; norm and gradients are those of one process that has them all.

    `elsewhere`: a group of ranks that hold other parameters.
    """
    before = grads_of(parameters)
    whole = before
    if elsewhere is not None:
        gathered: list[Any] = [None] * dist.get_world_size(elsewhere)
        dist.all_gather_object(gathered, before, elsewhere)
        whole = [grad for grads in gathered for grad in grads]
    expected = oracle(whole, p)
    held = [p.grad for p in parameters]
    total = fastclip.clip_grad_norm_(parameters, expected / 2, p, process_group=elsewhere)
    assert ulps(full(total), expected) <= 2, (float(full(total)), expected)
    assert float(total) == float(full(total))
    assert all(p.grad is g for p, g in zip(parameters, held, strict=True))
    coef = 0.5 * expected / (expected + 1e-6)
    for now, then in zip(grads_of(parameters), before, strict=True):
        eps = 2 * torch.finfo(now.dtype).eps + 1e-6
        torch.testing.assert_close(now.double(), then.double() * coef, rtol=eps, atol=1e-30)
    return total


class Block(nn.Module):
    """A transformer's block: dimensions that no number of ranks divides, one smaller than most."""

    def __init__(self, width: int = 7, hidden: int = 10, out: int = 3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.head = nn.Linear(width, out)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x) * self.gain


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(7, 1, 5, 0.0, batch_first=True), Block()]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def sharded(mesh: Any, dtype: torch.dtype = torch.float32, **options: Any) -> list[nn.Parameter]:
    """A transformer under `fully_shard`, after a backward on other data on every rank."""
    torch.manual_seed(0)
    model = Transformer().to(dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    torch.manual_seed(dist.get_rank())
    model(torch.randint(11, (4, 6))).square().sum().backward()
    return list(model.parameters())


def spread(shape: tuple[int, ...], mesh: Any, *placements: Any, **like: Any) -> nn.Parameter:
    """A DTensor parameter with a gradient, the same full one on every rank of the mesh."""
    parameter = nn.Parameter(distribute_tensor(torch.zeros(shape, **like), mesh, placements))
    grad = torch.randn(shape).to(parameter.dtype)
    parameter.grad = distribute_tensor(grad, mesh, placements)
    return parameter


def plain(*shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape)
    return parameter


def steps_of(call: Callable[[], Any]) -> int:
    """How many collectives a call takes part in."""
    count = 0
    real = _ranks.groups.all_reduce

    def counted(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        return real(*args)

    _ranks.groups.all_reduce = counted
    try:
        call()
    finally:
        _ranks.groups.all_reduce = real
    return count


# Layouts: what a rank holds, and how many collectives a clip of it may take.


def fsdp(size: int) -> tuple[list[nn.Parameter], int]:
    return sharded(init_device_mesh("cpu", (size,))), 1


def fsdp_offloaded(size: int) -> tuple[list[nn.Parameter], int]:
    policy = CPUOffloadPolicy(pin_memory=False)
    return sharded(init_device_mesh("cpu", (size,)), offload_policy=policy), 1


def fsdp_bf16(size: int) -> tuple[list[nn.Parameter], int]:
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    return sharded(init_device_mesh("cpu", (size,)), torch.bfloat16, mp_policy=policy), 1


def hsdp(size: int) -> tuple[list[nn.Parameter], int]:
    names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=names)
    return sharded(mesh), int(size > 2)


def tensor_parallel(size: int) -> tuple[list[nn.Parameter], int]:
    mesh = init_device_mesh("cpu", (size,))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    model(torch.randn(4, 8)).square().sum().backward()
    return list(model.parameters()), 1


def fsdp_tensor_parallel(size: int) -> tuple[list[nn.Parameter], int]:
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    model = Block(8, 16, 3)
    ways = {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1))}
    ways["down"] = RowwiseParallel(output_layouts=Shard(1))
    parallelize_module(model, mesh["tp"], ways)
    fully_shard(model, mesh=mesh["dp"])
    torch.manual_seed(mesh["dp"].get_local_rank())
    x = torch.randn(2, 4, 8).chunk(size // 2, 1)[mesh["tp"].get_local_rank()]
    model(x).square().sum().backward()
    # `head` and `gain` are plain to tensor parallelism: each of its ranks trains its own.
    for p in (*model.head.parameters(), model.gain):
        dist.all_reduce(p.grad._local_tensor, group=mesh["tp"].get_group())
    return list(model.parameters()), 1 + int(size > 2)


def experts(size: int) -> tuple[list[nn.Parameter], int]:
    """Experts over their own mesh, cut again for FSDP, beside dense parameters over all ranks."""
    dense = init_device_mesh("cpu", (size,))
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("efsdp", "ep"))
    parameters = [spread((5, 7), dense, Shard(0)), spread((3,), dense, Shard(0))]
    parameters += [spread((4, 6, 3), mesh, Shard(1), Shard(0)) for _ in range(2)]
    parameters += [spread((9,), dense, Shard(0)), spread((2, 2), mesh["ep"], Shard(0))]
    return parameters, 3 if size > 2 else 1


def mixed(size: int) -> tuple[list[nn.Parameter], int]:
    """Plain parameters beside DTensors that are cut, uneven, replicated, empty on some ranks."""
    mesh = init_device_mesh("cpu", (size,))
    parameters = [plain(5), spread((7, 3), mesh, Shard(0)), spread((4, 5), mesh, Shard(1))]
    parameters += [spread((6,), mesh, Replicate()), plain(2, 2), spread((1,), mesh, Shard(0))]
    parameters += [spread((3,), mesh, Shard(0), dtype=d) for d in (torch.bfloat16, torch.float64)]
    return parameters, 1


def data_parallel(size: int) -> tuple[list[nn.Parameter], int]:
    model = nn.parallel.DistributedDataParallel(Block())
    torch.manual_seed(dist.get_rank())
    model(torch.randn(3, 7)).square().sum().backward()
    return list(model.parameters()), 0


def uneven_mesh(size: int) -> tuple[list[nn.Parameter], int]:
    """Ranks in an order in which distances between them do not tell the dimensions apart."""
    rows = DeviceMesh("cpu", [[0, 3], [1, 2]] if size == 4 else [[1, 0]])
    parameters = [
        spread((8, 8), rows, Shard(0), Shard(1)),
        spread((8,), rows, Shard(0), Replicate()),
    ]
    return [*parameters, spread((5,), rows, Replicate(), Shard(0))], 2 if size == 4 else 1


LAYOUTS = [
    *(fsdp, fsdp_offloaded, fsdp_bf16, hsdp, tensor_parallel, fsdp_tensor_parallel),
    *(experts, mixed, data_parallel, uneven_mesh),
]


def clips_as_one_process(build: Callable, p: float, reader: str) -> None:
    if reader == "python":
        extension, _ops.extension = _ops.extension, None
    try:
        parameters, collectives = build(dist.get_world_size())
        taken = steps_of(lambda: check(parameters, p))
        assert taken == collectives * (2 if p == 8 else 1), taken
        grads = [q.grad for q in parameters]
        again = fastclip.get_total_norm(grads, p)
        assert ulps(full(again), oracle(grads_of(parameters), p)) <= 2
    finally:
        if reader == "python":
            _ops.extension = extension


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("build", LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_clips_as_one_process_would(world, build, p, size):
    for reader in ("walk", "python") if p == 2 else ("walk",):
        world(size).run(clips_as_one_process, build, p, reader)


# Ranks with other parameters.


def pipeline(as_mesh: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh["pp"].get_local_rank()
    torch.manual_seed(stage)
    # The stages have other parameters, in another order, of other slots.
    first = [spread((5, 3), mesh["dp"], Shard(0)), plain(4), spread((2,), mesh["dp"], Replicate())]
    last = [plain(3, 3), spread((9,), mesh["dp"], Shard(0))]
    group = mesh["pp"] if as_mesh else mesh["pp"].get_group()
    for p in ORDERS:
        parameters = first if stage == 0 else last
        elsewhere = mesh["pp"].get_group()
        check(parameters, p, elsewhere)
        norm = fastclip.get_total_norm([q.grad for q in parameters], p, process_group=group)
        same = [torch.empty_like(full(norm)) for _ in range(4)]
        dist.all_gather(same, full(norm))
        assert all(torch.equal(s, same[0]) for s in same)


@pytest.mark.parametrize("as_mesh", [False, True], ids=["group", "mesh"])
def test_pipeline_stages_are_one_norm(world, as_mesh):
    world(4).run(pipeline, as_mesh)


def local_shards() -> None:
    # FSDP1, Megatron: plain tensors, each rank with its part of every parameter.
    torch.manual_seed(dist.get_rank())
    parameters = [plain(dist.get_rank() + 1, 3), plain(4)]
    if dist.get_rank() == 0:
        parameters[1].grad = None
    for p in ORDERS:
        check(parameters, p, dist.group.WORLD)


def test_plain_local_shards_are_summed_over_their_group(world):
    world(2).run(local_shards)


def experts_outside_a_mesh() -> None:
    # Dense DTensors over all four ranks beside experts that two ranks share the work of: the
    # DTensors are counted by their mesh, the plain experts by the group.
    dense = init_device_mesh("cpu", (4,))
    groups = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    parameters = [spread((6, 5), dense, Shard(0)), spread((3,), dense, Replicate())]
    torch.manual_seed(1 + groups["ep"].get_local_rank())
    parameters += [plain(4, 2)]
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, parameters[2].grad, groups["ep"].get_group())
    expected = oracle([*grads_of(parameters[:2]), *gathered], 2)
    group = groups["ep"].get_group()
    norm = fastclip.clip_grad_norm_(parameters, 1.0, process_group=group)
    assert not isinstance(norm, DTensor)
    assert ulps(norm, expected) <= 2


def test_a_group_adds_only_what_no_mesh_has_counted(world):
    world(4).run(experts_outside_a_mesh)


def meshes_that_other_ranks_speak_for() -> None:
    # A head that FSDP alone shards, on each rank of tensor parallelism a mesh of its own, beside
    # layers on the mesh of both: of the first mesh rank 1 is no speaker, of its head's it is.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp = mesh["tp"].get_local_rank()
    layers, head, expert = torch.randn(4, 8), torch.randn(8), torch.randn(4, 3)
    parameters = [
        spread((4, 8), mesh, Shard(0), Shard(1)),
        spread((4, 8), mesh, Shard(1), Replicate()),
        spread((8,), mesh["dp"], Shard(0)),
    ]
    for q, grad in zip(parameters, (layers, 2 * layers, (1 + tp) * head), strict=True):
        q.grad = distribute_tensor(grad, q.device_mesh, q.placements)
    parameters.append(plain(4, 3))
    parameters[-1].grad = (1 + dist.get_rank()) * expert
    experts = [k * expert for k in (1, 2, 3, 4)]
    for p in ORDERS:
        expected = oracle([layers, 2 * layers, head, 2 * head, *experts], p)
        norm = fastclip.clip_grad_norm_(parameters, 1e9, p, process_group=dist.group.WORLD)
        assert ulps(norm, expected) <= 2
        groups = [{"params": parameters[:3], "max_norm": 1e9}]
        groups.append({"params": parameters[3:], "max_norm": 1e9})
        norms = fastclip.GradClipper(
            norm_type=p, groups=groups, process_group=dist.group.WORLD
        ).clip_()
        assert ulps(norms[0], oracle([layers, 2 * layers, head, 2 * head], p)) <= 2
        assert ulps(norms[1], oracle(experts, p)) <= 2


def test_ranks_that_speak_for_other_meshes_send_the_same(world):
    world(4).run(meshes_that_other_ranks_speak_for, seconds=30)


def several_groups() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(dist.get_rank())
    parameters = [plain(3)] if dist.get_rank() else []
    gathered: list[Any] = [None] * 4
    dist.all_gather_object(gathered, grads_of(parameters))
    expected = oracle([grad for grads in gathered for grad in grads], 2)
    for groups in (mesh, [mesh.get_group(0), mesh.get_group(1)], dist.group.WORLD):
        assert ulps(fastclip.clip_grad_norm_(parameters, 1e9, process_group=groups), expected) <= 2


def test_several_groups_and_a_rank_without_parameters(world):
    world(4).run(several_groups)


def mesh_across_groups() -> None:
    # The mesh lies across rows and columns of the square, which add it up in two steps.
    square, diagonal = init_device_mesh("cpu", (2, 2)), DeviceMesh("cpu", [1, 2])
    shared, own = torch.randn(5), torch.randn(3)
    parameters = [plain(3)]
    parameters[0].grad = (1 + dist.get_rank()) * own
    if dist.get_rank() in (1, 2):
        parameters.append(spread((5,), diagonal, Shard(0)))
        parameters[1].grad = distribute_tensor(shared, diagonal, [Shard(0)])
    for p in ORDERS:
        expected = oracle([shared, own, 2 * own, 3 * own, 4 * own], p)
        for group in (square, dist.group.WORLD):
            norm = fastclip.clip_grad_norm_(parameters, 1e9, p, process_group=group)
            assert ulps(norm, expected) <= 2, (float(norm), expected)


def test_a_mesh_across_the_groups_of_another_counts_once(world):
    world(4).run(mesh_across_groups, seconds=30)


def group_beside_its_mesh() -> None:
    # Stage 0 has plain parameters, which only rank 0 passes; stage 1 DTensors, replicated too.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    dp, rank = mesh["dp"], dist.get_rank()
    before = torch.randn(4)
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4), dp, [Shard(0)]))
    parameter.grad = distribute_tensor(before, dp, [Shard(0)])
    twin = nn.Parameter(distribute_tensor(torch.zeros(4), dp, [Replicate()]))
    twin.grad = distribute_tensor(2 * before, dp, [Replicate()])
    alone = nn.Parameter(torch.zeros(4))
    alone.grad = 3 * before
    items = [parameter, twin] if rank > 1 else [alone] if rank == 0 else []
    for p in ORDERS:
        expected = oracle([before, 2 * before, 3 * before], p)
        norm = fastclip.clip_grad_norm_(items, 1e9, p, process_group=dist.group.WORLD)
        assert ulps(full(norm), expected) <= 2
    for groups in ([mesh["dp"], dist.group.WORLD], [dist.group.WORLD, dist.group.WORLD, dp]):
        with pytest.raises(ValueError, match=r"process_group: ranks \[.*are in two of the groups"):
            fastclip.clip_grad_norm_(items, 0.1, process_group=groups)
    # A group that the mesh has counted already adds nothing.
    assert (
        ulps(
            full(fastclip.clip_grad_norm_([parameter], 1e9, process_group=dp)), oracle([before], 2)
        )
        <= 2
    )


def test_a_group_that_shares_ranks_with_a_mesh_counts_once(world):
    world(4).run(group_beside_its_mesh)


def twins_beside_a_group() -> None:
    # Rank 0 speaks for what all have, so that the others add one thing of the two that they hold.
    mesh, world = init_device_mesh("cpu", (4,)), dist.group.WORLD
    twin, own = torch.full((5,), 2.0), torch.full((3,), 1.0 + dist.get_rank())
    parameters = [nn.Parameter(distribute_tensor(torch.zeros(5), mesh, [Replicate()])), plain(3)]
    parameters[0].grad = distribute_tensor(twin, mesh, [Replicate()])
    parameters[1].grad = own
    for p in (1.0, 2.0, 3.0, math.inf):
        expected = oracle([twin, *(torch.full((3,), 1.0 + rank) for rank in range(4))], p)
        norm = fastclip.clip_grad_norm_(parameters, 1e9, p, process_group=world)
        assert ulps(norm, expected) <= 2
        groups = [{"params": parameters, "max_norm": 1e9}]
        norms = fastclip.GradClipper(groups=groups, norm_type=p, process_group=world).clip_()
        assert norms.shape == (1,)
        assert ulps(norms[0], expected) <= 2


def test_all_ranks_of_a_group_add_as_many_numbers(world):
    world(4).run(twins_beside_a_group, seconds=30)


def same_on_all_ranks() -> None:
    world = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    wide = dict(dtype=torch.float64)
    for seed in range(40):
        torch.manual_seed(seed)
        parameters = [spread((7, 3), world, Shard(0), **wide)]
        parameters += [spread((5,), square["b"], Shard(0), **wide)]
        parameters += [spread((4, 4), square, Shard(0), Shard(1), **wide), plain(3)]
        norm = fastclip.clip_grad_norm_(parameters, 1e9)
        assert norm.dtype == torch.float64
        same = [torch.empty_like(norm) for _ in range(4)]
        dist.all_gather(same, norm)
        assert all(torch.equal(s, norm) for s in same)


def test_all_ranks_get_the_same_bits_in_float64_too(world):
    world(4).run(same_on_all_ranks)


# What a rank lacks.


def missing_gradients() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    parameters = [spread((3, 4), mesh, Shard(0)), spread((8,), mesh, Shard(0)), plain(2)]
    parameters += [spread((5,), mesh, Replicate()), spread((1, 4), mesh, Shard(0))]
    for p in ORDERS:
        whole = [q.grad._local_tensor for q in parameters[:2] if isinstance(q.grad, DTensor)]
        if rank == 1:
            parameters[0].grad = None
        gathered: list[Any] = [None] * dist.get_world_size()
        mine = [] if rank == 1 else [whole[0]]
        dist.all_gather_object(gathered, [*mine, parameters[1].grad._local_tensor])
        rest = [parameters[2].grad, parameters[3].grad._local_tensor, full(parameters[4].grad)]
        expected = oracle([g for grads in gathered for g in grads] + rest, p)
        norm = fastclip.clip_grad_norm_(parameters, math.inf, p)
        assert ulps(norm, expected) <= 2
        parameters[0].grad = distribute_tensor(torch.randn(3, 4), mesh, [Shard(0)])
    for parameter in parameters:
        if rank == 1:
            parameter.grad = None
    fastclip.clip_grad_norm_(parameters, 1.0)
    for parameter in parameters:
        parameter.grad = None
    norm = fastclip.clip_grad_norm_(parameters, 1.0)
    assert (float(norm), norm.dtype) == (0.0, torch.float32)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_without_some_gradients_takes_part(world, size):
    world(size).run(missing_gradients)


def nonfinite_on_one_rank(bad: float, p: float, where: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = [spread((8, 2), mesh, Shard(0)), plain(3)]
    if dist.get_rank() == 1:
        grad = parameters[0].grad._local_tensor if where == "shard" else parameters[1].grad
        grad.view(-1)[1] = bad
    before = [parameters[0].grad._local_tensor.clone(), parameters[1].grad.clone()]
    with pytest.raises(RuntimeError, match="is non-finite"):
        fastclip.clip_grad_norm_(parameters, 1.0, p, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="is non-finite"):
        fastclip.get_total_norm([q.grad for q in parameters], p, error_if_nonfinite=True)
    after = [parameters[0].grad._local_tensor, parameters[1].grad]
    for now, then in zip(after, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    fastclip.clip_grad_norm_(parameters, 1.0, p, nonfinite="keep")
    for now, then in zip(after, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    zeroed = [spread((8, 2), mesh, Shard(0)), plain(3)]
    for q, then in zip(zeroed, before, strict=True):
        getattr(q.grad, "_local_tensor", q.grad).copy_(then)
    fastclip.clip_grad_norm_(zeroed, 1.0, p, nonfinite="zero")
    assert all((getattr(q.grad, "_local_tensor", q.grad) == 0).all() for q in zeroed)
    if where == "shard":
        norm = float(fastclip.clip_grad_norm_(parameters, 1.0, p))
        assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
        grads = parameters[1].grad
        assert grads.isnan().all() if math.isnan(bad) else (grads == 0).all()


@pytest.mark.parametrize("where", ["shard", "plain"])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_on_one_rank_is_so_on_all(world, bad, p, where):
    world(2).run(nonfinite_on_one_rank, bad, p, where)


# Bits.


def same_bits(dtype: torch.dtype) -> None:
    meshes = [
        init_device_mesh("cpu", (4,)),
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")),
    ]
    half = meshes[1]["b"]
    for seed in range(150):
        generator = random.Random(seed)
        torch.manual_seed(seed)
        shapes = [
            [generator.randint(1, 40) for _ in range(generator.randint(1, 3))] for _ in range(4)
        ]
        grads = [
            (torch.randn(shape) * 10 ** generator.uniform(-3, 3)).to(dtype) for shape in shapes
        ]
        p = (2.0, 1.0, 3.0)[seed % 3]
        alone = fastclip.get_total_norm(grads, p)
        for mesh in (*meshes, half):
            for _ in range(2):
                placements = [
                    [Shard(generator.randrange(g.dim())) for _ in range(mesh.ndim)] for g in grads
                ]
                spread = [
                    distribute_tensor(g, mesh, w, src_data_rank=None)
                    for g, w in zip(grads, placements, strict=True)
                ]
                found = full(fastclip.get_total_norm(spread, p))
                # The plain-PyTorch ops sum what is cut in another order.
                rtol = precision(_ops, 0)
                torch.testing.assert_close(found, alone, rtol=rtol, atol=0, msg=f"{seed}, {p}")


@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:], ids=name_of)
def test_the_norm_is_the_same_bits_however_it_is_cut(world, dtype):
    world(4).run(same_bits, dtype, seconds=240)


def any_lists(seeds: range) -> Iterator[tuple[random.Random, list[nn.Parameter]]]:
    """Random lists on random meshes over four ranks, in random placements."""
    world = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    other = init_device_mesh("cpu", (2, 2), mesh_dim_names=("c", "d"))
    meshes = [world, square, square["a"], square["b"], other, other["d"]]
    for seed in seeds:
        generator = random.Random(seed)
        torch.manual_seed(seed)
        parameters = []
        for _ in range(generator.randint(1, 6)):
            shape = tuple(generator.randint(1, 9) for _ in range(generator.randint(1, 3)))
            mesh = generator.choice([*meshes, None])
            if mesh is None:
                parameters.append(plain(*shape))
                continue
            ways = [Replicate(), *(Shard(d) for d in range(len(shape)))]
            places = [generator.choice(ways) for _ in range(mesh.ndim)]
            parameters.append(spread(shape, mesh, *places))
        yield generator, parameters


def any_layout(seeds: range) -> None:
    for generator, parameters in any_lists(seeds):
        check(parameters, generator.choice(ORDERS))


def test_any_mix_of_meshes_and_placements(world):
    world(4).run(any_layout, range(60), seconds=120)


def another_order() -> None:
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    parameters = [spread((4, 4), square, Shard(0), Shard(1)), spread((6,), square["a"], Shard(0))]
    parameters += [spread((5, 2), square["b"], Shard(0)), plain(3)]
    expected = oracle(grads_of(parameters), 2)
    random.Random(dist.get_rank()).shuffle(parameters)
    assert ulps(fastclip.clip_grad_norm_(parameters, 1e9), expected) <= 2


def test_ranks_may_list_their_parameters_in_another_order(world):
    world(4).run(another_order)


# Partial gradients.


def sequence_parallel() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16))
    ways = {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1))}
    parallelize_module(model, mesh, ways)
    model(torch.randn(2, 4, 8)).square().sum().backward()
    parameters = list(model.parameters())
    assert parameters[0].grad.placements == (Partial(),)
    grads = [q.grad for q in parameters]
    with pytest.warns(UserWarning, match=r"tensors\[0\] is placed \(Partial.*redistributed"):
        norm = fastclip.get_total_norm(grads)
    expected = oracle(grads_of(parameters), 2)
    assert ulps(norm.full_tensor(), expected) <= 2
    assert parameters[0].grad is grads[0]
    before = grads_of(parameters)
    with pytest.warns(UserWarning, match=r"gradient of parameters\[0\] is placed") as caught:
        fastclip.clip_grad_norm_(parameters, expected / 2)
    assert [w.filename for w in caught] == [__file__]
    assert parameters[0].grad.placements == parameters[0].placements == (Replicate(),)
    for now, then in zip(grads_of(parameters), before, strict=True):
        torch.testing.assert_close(now, then / 2, rtol=1e-6, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps_of(lambda: check(parameters)) == 1


def test_partial_gradients_are_reduced_first(world):
    world(2).run(sequence_parallel)


def layouts_of_their_own() -> None:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [spread((5, 3), mesh, Shard(0)), spread((4,), mesh, Replicate()), plain(3)]
    for q in parameters[:2]:
        equal = copy.copy(q.grad._spec)
        assert equal is not q._spec
        q.grad = DTensor(q.grad._local_tensor, equal, requires_grad=False)
    look = reading.look
    reading.look = None
    try:
        check(parameters)
    finally:
        reading.look = look
    # Equal to what the parameter was.
    was = parameters[1].grad
    parameters[1] = spread((4,), mesh, Shard(0))
    parameters[1].grad = DTensor(was._local_tensor, copy.copy(was._spec), requires_grad=False)
    with pytest.warns(UserWarning, match=r"parameters\[1\] is placed .*Replicate.*, not .*Shard"):
        fastclip.clip_grad_norm_(parameters, 1e9)
    assert parameters[1].grad.placements == parameters[1].placements


@pytest.mark.skipif(_ops.extension is None, reason="not built")
def test_gradients_of_equal_layouts_are_read_at_once(world):
    world(2).run(layouts_of_their_own)


def partial_by_value() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = [spread((5, 3), mesh, Shard(0)), spread((4,), mesh, Replicate()), plain(3)]
    parameters.append(spread((6,), mesh, Shard(0)))
    local = torch.tensor([1.0, -1.0, 0.1, 0.2])
    parameters[1].grad = DTensor.from_local(local, mesh, [Partial()], run_check=False)
    before = grads_of(parameters)
    versions = [q.grad._version for q in (parameters[0], *parameters[2:])]
    with pytest.warns(UserWarning, match="redistributed"):
        fastclip.clip_grad_value_(parameters, 0.5)
    for now, then in zip(grads_of(parameters), before, strict=True):
        assert torch.equal(now, then.clamp(-0.5, 0.5))
    now = [q.grad._version for q in (parameters[0], *parameters[2:])]
    assert all(map(operator.gt, now, versions))


def test_values_are_clipped_after_the_reduction(world):
    world(2).run(partial_by_value)


# The result, the plan, the errors.


def results() -> None:
    mesh = init_device_mesh("cpu", (2,))
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    cut = [spread((6,), mesh, Shard(0)), spread((3,), mesh, Replicate())]
    norm = fastclip.clip_grad_norm_(cut, 1e9)
    assert norm.placements == (Replicate(),)
    assert norm.device_mesh == mesh
    assert norm.item() == norm.to_local().item() == norm.full_tensor().item()
    two = fastclip.clip_grad_norm_([spread((6,), both, Shard(0), Shard(0))], 1e9)
    assert two.placements == (Replicate(), Replicate())
    for items in ([*cut, plain(2)], [*cut, spread((4,), both, Shard(0), Replicate())]):
        assert type(fastclip.clip_grad_norm_(items, 1e9)) is Tensor
    wide = [*cut, spread((3,), mesh, Shard(0), dtype=torch.float64)]
    assert fastclip.clip_grad_norm_(wide, 1e9).dtype == torch.float64
    # Thresholds and norms may be DTensors too, torch's own partial norm among them.
    threshold = distribute_tensor(torch.tensor(0.5), mesh, [Replicate()])
    check(cut)
    fastclip.clip_grad_norm_(cut, threshold)
    assert oracle(grads_of(cut), 2) == pytest.approx(0.5, rel=1e-5)
    alone = [plain(3)]
    fastclip.clip_grad_norm_(alone, threshold)
    assert oracle(grads_of(alone), 2) == pytest.approx(0.5, rel=1e-5)
    theirs = nn.utils.get_total_norm([q.grad for q in cut])
    fastclip.clip_grads_with_norm_(cut, 0.25, theirs)
    assert oracle(grads_of(cut), 2) == pytest.approx(0.25, rel=1e-5)


def test_the_result_is_the_same_number_however_it_is_read(world):
    world(2).run(results)


def torch_agrees() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for p in (1.0, 2.0, 3.0):
        ours, theirs = (
            [spread((6, 4), mesh, Shard(0)), spread((8,), mesh, Shard(0))] for _ in "ab"
        )
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = distribute_tensor(other.grad.full_tensor(), mesh, [Shard(0)])
        norm = nn.utils.clip_grad_norm_(theirs, 1.0, p).full_tensor()
        torch.testing.assert_close(fastclip.clip_grad_norm_(ours, 1.0, p).full_tensor(), norm)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(full(mine.grad), full(other.grad))
    # What torch was seen to get wrong.
    if torch.__version__.startswith("2.13."):
        cut = [spread((8,), mesh, Shard(0))]
        norm = nn.utils.clip_grad_norm_(cut, 1e9, math.inf)
        maxima: list[Any] = [None, None]
        dist.all_gather_object(maxima, norm.item())
        assert maxima[0] != maxima[1]
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
            nn.utils.clip_grad_norm_([*cut, plain(2)], 1e9)


def test_torch_agrees_where_it_is_right(world):
    world(2).run(torch_agrees)


def plans() -> None:
    made = 0
    real = _ranks.Plan.__init__

    def counted(self: Any, *args: Any) -> None:
        nonlocal made
        made += 1
        real(self, *args)

    _ranks.Plan.__init__ = counted
    try:
        mesh = init_device_mesh("cpu", (2,))
        parameters = [spread((6,), mesh, Shard(0)), plain(3), spread((6, 2), mesh, Shard(1))]
        for _ in range(5):
            check(parameters)
            fastclip.clip_grad_norm_((q for q in parameters), 1e9)
            fastclip.clip_grad_value_(parameters, 1e9)
            cut = [
                DTensor(q.grad._local_tensor, q._spec, requires_grad=False) for q in parameters[::2]
            ]
            fastclip.get_total_norm([cut[0], torch.ones(3), cut[1]])
        # Tensors that are laid out as the parameters have the same one.
        assert made == 1
        # Another list with the same first parameter, another layout, another group.
        check(parameters[:2])
        check([*parameters[:2], spread((6, 2), mesh, Shard(0))])
        assert made == 3
        check(parameters)
        assert made == 4
        # A slice of a mesh is another object each time.
        root = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
        for _ in range(5):
            fastclip.clip_grad_norm_(parameters, 1e9, process_group=root["pp"])
        assert made == 5
        gc.disable()
        replaced = weakref.ref(_ranks.plan._plans[0][id(parameters[0]._spec)][0])
        check(parameters)
        assert made == 6
        assert replaced() is None
    finally:
        gc.enable()
        _ranks.Plan.__init__ = real
    # Of layouts that torch itself keeps nowhere.
    layout = copy.copy(parameters[0]._spec)
    lone = nn.Parameter(DTensor(torch.zeros(3), layout, requires_grad=False))
    lone._spec = layout
    lone.grad = DTensor(torch.ones(3), layout, requires_grad=False)
    fastclip.clip_grad_norm_(lone, 1e9)
    plans = _ranks.plan._plans[0]
    held, plan = len(plans), weakref.ref(plans[id(layout)][0])
    del lone, layout
    gc.collect()
    assert len(plans) < held
    assert plan() is None
    # Another layout may come to lie where one was that is gone.
    layout = copy.copy(parameters[0]._spec)
    plan = _ranks.Plan(parameters[:1], [layout], _ranks.NONE)
    assert plan.is_for(_ranks.NONE)
    del layout
    assert not plan.is_for(_ranks.NONE)


def test_a_plan_is_made_once_and_goes_with_its_parameters(world):
    world(2).run(plans)


def fresh_layouts(reader: str) -> None:
    """Tensors whose layouts are new objects at every step, as gradients of tensor parallel ones."""
    mesh, rank, extension = init_device_mesh("cpu", (2,)), dist.get_rank(), _ops.extension

    def tensors(dtype: torch.dtype, *ways: Any) -> list[Tensor]:
        local = torch.full((3,), 1.0 + rank, dtype=dtype)
        return [DTensor.from_local(local, mesh, [way], run_check=False) for way in ways]

    _ops.extension = extension if reader == "walk" else None
    try:
        for step in range(5):
            # The same placements, another dtype: the norm is of theirs.
            dtype = torch.float64 if step == 2 else torch.float32
            norm = fastclip.get_total_norm(tensors(dtype, Shard(0), Shard(0), Replicate()))
            assert norm.dtype == dtype
            expected = 2 * 3 * (1 + 4) + 3 * (1 + rank) ** 2
            assert float(norm) == pytest.approx(expected**0.5, rel=1e-6)
        # As many, placed otherwise behind the first.
        norm = fastclip.get_total_norm(tensors(torch.float32, Shard(0), Replicate(), Replicate()))
        expected = 3 * (1 + 4) + 2 * 3 * (1 + rank) ** 2
        assert float(norm) == pytest.approx(expected**0.5, rel=1e-6)
    finally:
        _ops.extension = extension


@pytest.mark.parametrize("reader", ["walk", "python"])
def test_tensors_whose_layouts_are_new_are_measured_as_they_are_placed(world, reader):
    world(2).run(fresh_layouts, reader)


def shrinking_list() -> None:
    """Python compares layouts, and meanwhile the list loses its parameters, as by a thread."""
    mesh, compared, shrinks = init_device_mesh("cpu", (2,)), 0, False

    class Slow(Shard):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            if shrinks:
                del parameters[1:]
                compared += 1
            return isinstance(other, Shard) and other.dim == self.dim

        __hash__ = Shard.__hash__

    for _ in range(20):
        parameters = [spread((64,), mesh, Shard(0)) for _ in range(100)]
        fastclip.clip_grad_norm_(parameters, 1.0)
        for parameter in parameters:
            local = here(parameter.grad)
            parameter.grad = DTensor.from_local(local, mesh, [Slow(0)], run_check=False)
        # Python looks at one after the other, and meets the list as it is left.
        seen = parameters if _ops.extension is not None else parameters[:1]
        expected, compared, shrinks = oracle(grads_of(seen), 2), 0, True
        norm = fastclip.clip_grad_norm_(parameters, 1.0)
        shrinks = False
        assert len(parameters) == 1
        assert compared >= 1
        assert ulps(full(norm), expected) <= 2


def test_a_list_that_shrinks_while_it_is_read_is_read_as_it_was(world):
    world(2).run(shrinking_list, seconds=30)


def wide_on_one_rank(dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [spread((4,), mesh, Shard(0), dtype=dtype), spread((4,), mesh, Shard(0))]
    if dist.get_rank():
        parameters[0].grad = None
    assert fastclip.clip_grad_norm_(parameters, 1e9).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=name_of)
def test_a_wide_parameter_makes_the_norm_float64_on_every_rank(world, dtype):
    world(2).run(wide_on_one_rank, dtype, seconds=30)


def wide_beyond(dtype: torch.dtype) -> None:
    rank, pair = dist.get_rank(), init_device_mesh("cpu", (2, 2))
    # Only the last rank has a wide one, and the first has no gradient at all.
    parameter = nn.Parameter(torch.zeros(3, dtype=dtype if rank == 3 else torch.bfloat16))
    parameter.grad = torch.full_like(parameter, rank) if rank else None
    for p in ORDERS:
        values = [torch.full((3,), float(r), dtype=torch.float64) for r in (1, 2, 3)]
        expected = torch.linalg.vector_norm(torch.cat(values), p)
        for group in (dist.group.WORLD, pair):
            norm = fastclip.clip_grad_norm_([parameter], 1e9, p, process_group=group)
            torch.testing.assert_close(norm, expected, rtol=precision(_ops, 1e-14), atol=0)
            groups = [{"params": [parameter], "max_norm": 1e9}, {"params": [], "max_norm": 1.0}]
            norms = fastclip.GradClipper(groups=groups, norm_type=p, process_group=group).clip_()
            assert norms.dtype == torch.float64


def wide_now_and_then() -> None:
    """The same parameters here, others there."""
    rank = dist.get_rank()
    alone = DeviceMesh("cpu", [rank])
    here = spread((3,), alone, Shard(0))
    for dtype in (torch.float32, torch.float64, torch.float32):
        items = [spread((3,), alone, Shard(0), dtype=dtype)] if rank else [here]
        total = fastclip.clip_grad_norm_(items, 1e9, process_group=dist.group.WORLD)
        assert total.dtype == total.to_local().dtype == dtype


def test_a_plan_returns_the_dtype_of_the_gradients_there_are(world):
    world(2).run(wide_now_and_then)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=name_of)
def test_a_wide_gradient_makes_the_norm_float64_on_every_rank_of_a_process_group(world, dtype):
    world(4).run(wide_beyond, dtype, seconds=30)


def conversions() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = Block()
    fully_shard(model, mesh=mesh)
    model(torch.ones(2, 7)).square().sum().backward()
    check(list(model.parameters()))
    fastclip.get_total_norm([q.grad for q in model.parameters()])
    model.to(torch.float64)
    assert check(list(model.parameters())).dtype == torch.float64
    local = nn.Linear(3, 2)
    for q in local.parameters():
        q.grad = torch.randn_like(q)
    for dtype in (torch.float32, torch.float64):
        local.to(dtype)
        norm = fastclip.clip_grad_norm_(local.parameters(), 1e9, process_group=dist.group.WORLD)
        assert norm.dtype == dtype


def test_a_module_can_be_converted_after_a_clip(world):
    world(2).run(conversions)


def compiled() -> None:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [spread((6, 3), mesh, Shard(0)), plain(4)]
    expected = oracle(grads_of(parameters), 2)
    clip = torch.compile(lambda ps: fastclip.clip_grad_norm_(ps, 1.0), backend="aot_eager")
    assert ulps(full(clip(parameters)), expected) <= 2
    assert oracle(grads_of(parameters), 2) == pytest.approx(1, rel=1e-5)
    shards = [plain(3)]
    add = torch.compile(
        lambda ps: fastclip.clip_grad_norm_(ps, 1e9, process_group=dist.group.WORLD),
        backend="aot_eager",
    )
    assert ulps(add(shards), math.sqrt(2) * oracle(grads_of(shards), 2)) <= 2


def test_the_compiler_stays_out(world):
    world(2).run(compiled, seconds=120)


def errors() -> None:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [spread((6,), mesh, Shard(0)), plain(3)]
    before = grads_of(parameters)
    world = dist.group.WORLD
    wrong = [3, "world", [world, None], dist.GroupMember.NON_GROUP_MEMBER]
    # No order on which ranks agree, or none the second time.
    wrong += [{world}, frozenset([world]), iter([world]), {world: 1}]
    for group in wrong:
        with pytest.raises(TypeError, match="process_group: expected a ProcessGroup or DeviceMesh"):
            fastclip.clip_grad_norm_(parameters, 0.1, process_group=group)
    with pytest.raises(TypeError, match=r"parameters\[2\]: expected a tensor"):
        fastclip.clip_grad_norm_([*parameters, "w"], 0.1)
    odd = spread((4,), mesh, Shard(0))
    odd.grad = torch.ones(4)
    with pytest.raises(TypeError, match=r"gradient of parameters\[2\]: expected a DTensor.*Tensor"):
        fastclip.clip_grad_norm_([*parameters, odd], 0.1)
    other = init_device_mesh("cpu", (1, 2), mesh_dim_names=("x", "y"))["y"]
    odd.grad = distribute_tensor(torch.ones(4), other, [Shard(0)])
    if other != mesh:
        with pytest.raises(TypeError, match=r"parameters\[2\]: expected .* DTensors of one mesh"):
            fastclip.clip_grad_norm_([*parameters, odd], 0.1)
    eight = spread((4,), mesh, Shard(0))
    eight.grad_dtype = None
    eight.grad = distribute_tensor(torch.ones(4, dtype=torch.int32), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"parameters\[2\]: dtype torch.int32"):
        fastclip.clip_grad_norm_([*parameters, eight], 0.1)
    for now, then in zip(grads_of(parameters), before, strict=True):
        assert torch.equal(now, then)


def test_bad_input_is_named_and_changes_nothing(world):
    world(2).run(errors)


def elsewhere_served(emulation_cache: str) -> None:
    """Gradients on a device that the group has no backend for: the numbers travel by another."""
    from pathlib import Path

    import conftest

    conftest.emulated(Path(emulation_cache))
    parameter = nn.Parameter(torch.zeros(4, device="emulated"))
    parameter.grad = (torch.arange(4.0) + dist.get_rank()).to("emulated")
    expected = math.sqrt(sum((i + r) ** 2 for i in range(4) for r in range(2)))
    norm = fastclip.clip_grad_norm_([parameter], expected / 2, process_group=dist.group.WORLD)
    assert norm.device.type == "emulated"
    assert ulps(norm.cpu(), expected) <= 2
    halves = (torch.arange(4.0) + dist.get_rank()) / 2
    torch.testing.assert_close(parameter.grad.cpu(), halves)


@pytest.mark.emulated
def test_the_collective_runs_where_the_group_has_a_backend(world, request):
    import emulation

    if emulation.MISSING:
        pytest.skip(str(emulation.MISSING))
    cache = emulation_folder(request.config)
    emulation.build(cache)
    world(2).run(elsewhere_served, str(cache), seconds=120)


# Training loops.


def train(clip: Callable[[list[nn.Parameter]], object], size: int, rank: int) -> float:
    """20 steps of a transformer on its part of 8 batches; the last loss over all of them."""
    torch.manual_seed(0)
    model = Transformer()
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    torch.manual_seed(1)
    data = torch.randint(11, (20, 8, 6))
    for batch in data:
        optimizer.zero_grad()
        part = batch.chunk(size)[rank]
        loss = (model(part) - part.unsqueeze(-1) / 11).square().mean()
        loss.backward()
        clip(list(model.parameters()))
        optimizer.step()
    if size > 1:
        loss = loss.detach() / size
        dist.all_reduce(loss)
    return float(loss.detach())


def trains() -> list[float]:
    clipped = lambda ps: fastclip.clip_grad_norm_(ps, 0.1)  # noqa: E731
    size, rank = dist.get_world_size(), dist.get_rank()
    return [train(clipped, size, rank), train(clipped, 1, 0), train(lambda ps: None, 1, 0)]


def test_training_ends_where_one_process_ends(world):
    for spread_over, alone, unclipped in world(2).run(trains):
        assert spread_over == pytest.approx(alone, rel=1e-4)
        assert alone != pytest.approx(unclipped, rel=1e-2)


def torchtitan_style() -> None:
    # Norm over the list, made whole, combined over the pipeline by hand, then applied.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    torch.manual_seed(mesh["pp"].get_local_rank())
    parameters = [spread((5, 3), mesh["dp"], Shard(0)), spread((4,), mesh["dp"], Shard(0))]
    for p in (2.0, math.inf):
        before = grads_of(parameters)
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, before, mesh["pp"].get_group())
        expected = oracle([g for grads in gathered for g in grads], p)
        total = fastclip.get_total_norm([q.grad for q in parameters], p, foreach=True)
        assert isinstance(total, DTensor)
        total = total.full_tensor()
        if math.isinf(p):
            dist.all_reduce(total, op=dist.ReduceOp.MAX, group=mesh["pp"].get_group())
        else:
            total **= p
            dist.all_reduce(total, group=mesh["pp"].get_group())
            total **= 1.0 / p
        fastclip.clip_grads_with_norm_(parameters, expected / 2, total, foreach=True)
        assert float(total) == pytest.approx(expected, rel=1e-6)
        for now, then in zip(grads_of(parameters), before, strict=True):
            torch.testing.assert_close(now, then / 2, rtol=1e-5, atol=1e-7)


def test_torchtitan_style_loop(world):
    world(4).run(torchtitan_style)


def accelerate_style() -> None:
    # One call on whatever the model has, mixed lists included; the caller wants a number.
    mesh = init_device_mesh("cpu", (2,))
    model = Block()
    fully_shard(model.up, mesh=mesh)
    fully_shard(model.down, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.ones(2, 7)).square().sum().backward()
        expected = oracle(grads_of(list(model.parameters())), 2)
        norm = fastclip.clip_grad_norm_(model.parameters(), 1.0, norm_type=2)
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()


def test_accelerate_style_loop(world):
    world(2).run(accelerate_style)


# The tests' own tools.


def hangs() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.zeros(1))


def returns() -> None:
    pass


def test_a_hang_is_a_failure(tmp_path):
    world = World(2, tmp_path)
    # Importing this file may take as long as the hang is given.
    world.run(returns)
    with pytest.raises(AssertionError, match=r"ranks \[0\] hang"):
        world.run(hangs, seconds=5)
