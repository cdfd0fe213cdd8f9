"""Every parallel layout, on real processes; the oracle is float64 on the full gradients.

Tests with `on_ranks` run on every rank of a world; what they assert, they assert there. Which ranks
add up what is drawn in test_random_layouts.py.
"""

import copy
import functools
import gc
import math
import operator
import random
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import emulation
import pytest
import torch
import torch.distributed as dist
from conftest import DTYPES, emulated, emulation_folder, name_of, oracle, precision, ulps
from ranks import World, on_ranks
from torch import Tensor, nn

import fastclip
from fastclip import _ops, _ranks
from fastclip._gradients import reading

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

ORDERS = [1.0, 2.0, 3.0, 8.0, math.inf]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def grads_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [full(p.grad).detach().clone() for p in parameters if p.grad is not None]


def check(parameters: list[nn.Parameter], p: float = 2.0) -> Tensor:
    """Clips to half the norm; norm and gradients are those of one process that has them all."""
    before = grads_of(parameters)
    expected = oracle(before, p)
    held = [p.grad for p in parameters]
    total = fastclip.clip_grad_norm_(parameters, expected / 2, p)
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


def sharded(mesh: Any, dtype: torch.dtype = torch.float32, **options: Any) -> list[nn.Parameter]:
    """A transformer under `fully_shard`, after a backward on other data on every rank."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(7, 1, 5, 0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(11, 7), layer, Block()).to(dtype)
    for block in model[1:]:
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
    groups = _ranks.groups
    with mock.patch.object(groups, "all_reduce", side_effect=groups.all_reduce) as counted:
        call()
    return counted.call_count


# Layouts: what a rank holds, and how many collectives a clip of it may take.


def fsdp(size: int, **options: Any) -> tuple[list[nn.Parameter], int]:
    return sharded(init_device_mesh("cpu", (size,)), **options), 1


def hsdp(size: int) -> tuple[list[nn.Parameter], int]:
    names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=names)
    return sharded(mesh), int(size > 2)


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


def data_parallel(size: int) -> tuple[list[nn.Parameter], int]:
    model = nn.parallel.DistributedDataParallel(Block())
    torch.manual_seed(dist.get_rank())
    model(torch.randn(3, 7)).square().sum().backward()
    return list(model.parameters()), 0


LAYOUTS: dict[str, Callable[[int], tuple[list[nn.Parameter], int]]] = {
    "fsdp": fsdp,
    "bfloat16": functools.partial(
        fsdp, dtype=torch.bfloat16, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32)
    ),
    "hsdp": hsdp,
    "fsdp and tensor parallel": fsdp_tensor_parallel,
    "data parallel": data_parallel,
}


@pytest.mark.parametrize("walks", [True, False])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("name", LAYOUTS)
@on_ranks(2, 4)
def test_every_layout_clips_as_one_process_would(size, name, p, walks):
    with mock.patch.object(_ops, "extension", _ops.extension if walks else None):
        parameters, collectives = LAYOUTS[name](size)
        taken = steps_of(lambda: check(parameters, p))
        assert taken == collectives * (2 if p == 8 else 1), taken
        grads = [q.grad for q in parameters]
        again = fastclip.get_total_norm(grads, p)
        assert ulps(full(again), oracle(grads_of(parameters), p)) <= 2
        fastclip.normalize_grad_(parameters, 7.0)
        precise = max(1e-6, torch.finfo(grads[0].dtype).eps)
        assert oracle(grads_of(parameters), 2) == pytest.approx(7, rel=precise)


# Bits.


@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:], ids=name_of)
@on_ranks(4, seconds=240)
def test_the_norm_is_the_same_bits_however_it_is_cut(dtype):
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    meshes = [init_device_mesh("cpu", (4,)), square, square["b"]]
    for seed in range(150):
        generator = random.Random(seed)
        torch.manual_seed(seed)
        shapes = [[generator.randint(1, 40) for _ in range(seed % 3 + 1)] for _ in range(4)]
        grads = [
            (torch.randn(shape) * 10 ** generator.uniform(-3, 3)).to(dtype) for shape in shapes
        ]
        p = generator.choice([1.0, 2.0, 3.0])
        alone = fastclip.get_total_norm(grads, p)
        for mesh in (*meshes, *meshes):
            cut = []
            for grad in grads:
                ways = [Shard(generator.randrange(grad.dim())) for _ in range(mesh.ndim)]
                cut.append(distribute_tensor(grad, mesh, ways, src_data_rank=None))
            found = full(fastclip.get_total_norm(cut, p))
            # The plain-PyTorch ops sum what is cut in another order.
            rtol = precision(_ops, 0)
            torch.testing.assert_close(found, alone, rtol=rtol, atol=0, msg=f"{seed}, {p}")


@on_ranks(4)
def test_ranks_may_list_their_parameters_in_another_order():
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    parameters = [spread((4, 4), square, Shard(0), Shard(1)), spread((6,), square["a"], Shard(0))]
    parameters += [spread((5, 2), square["b"], Shard(0)), plain(3)]
    expected = oracle(grads_of(parameters), 2)
    random.Random(dist.get_rank()).shuffle(parameters)
    assert ulps(fastclip.clip_grad_norm_(parameters, 1e9), expected) <= 2


# Partial gradients.


def with_partial(rows: int) -> list[nn.Parameter]:
    """The second gradient is a sum that ranks have still to take, as SequenceParallel leaves it.

    Each test has its own number of rows: of equal layouts only the first call warns.
    """
    mesh = init_device_mesh("cpu", (2,))
    parameters = [spread((rows, 3), mesh, Shard(0)), spread((4,), mesh, Replicate()), plain(3)]
    local = torch.tensor([1.0, -1.0, 0.1, 0.2])
    parameters[1].grad = DTensor.from_local(local, mesh, [Partial()], run_check=False)
    return parameters


@on_ranks(2)
def test_partial_gradients_are_reduced_first():
    parameters = with_partial(5)
    grads = [q.grad for q in parameters]
    expected = oracle(grads_of(parameters), 2)
    with pytest.warns(UserWarning, match=r"tensors\[1\] is placed \(Partial.*redistributed"):
        assert ulps(fastclip.get_total_norm(grads), expected) <= 2
    assert parameters[1].grad is grads[1]
    with pytest.warns(UserWarning, match=r"gradient of parameters\[1\] is placed") as caught:
        fastclip.clip_grad_norm_(parameters, expected / 2)
    assert [w.filename for w in caught] == [__file__]
    assert parameters[1].grad.placements == parameters[1].placements == (Replicate(),)
    assert oracle(grads_of(parameters), 2) == pytest.approx(expected / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps_of(lambda: check(parameters)) == 1


@pytest.mark.skipif(_ops.extension is None, reason="not built")
@on_ranks(2)
def test_gradients_of_equal_layouts_are_read_at_once():
    mesh = init_device_mesh("cpu", (2,))
    parameters = [spread((5, 3), mesh, Shard(0)), spread((4,), mesh, Replicate()), plain(3)]
    for q in parameters[:2]:
        equal = copy.copy(q.grad._spec)
        assert equal is not q._spec
        q.grad = DTensor(q.grad._local_tensor, equal, requires_grad=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "look", None)
        check(parameters)
    # Equal to what the parameter was.
    was = parameters[1].grad
    parameters[1] = spread((4,), mesh, Shard(0))
    parameters[1].grad = DTensor(was._local_tensor, copy.copy(was._spec), requires_grad=False)
    with pytest.warns(UserWarning, match=r"parameters\[1\] is placed .*Replicate.*, not .*Shard"):
        fastclip.clip_grad_norm_(parameters, 1e9)
    assert parameters[1].grad.placements == parameters[1].placements


@on_ranks(2)
def test_values_are_clipped_after_the_reduction():
    parameters = with_partial(6)
    before = grads_of(parameters)
    versions = [q.grad._version for q in (parameters[0], *parameters[2:])]
    with pytest.warns(UserWarning, match="redistributed"):
        fastclip.clip_grad_value_(parameters, 0.5)
    for now, then in zip(grads_of(parameters), before, strict=True):
        assert torch.equal(now, then.clamp(-0.5, 0.5))
    now = [q.grad._version for q in (parameters[0], *parameters[2:])]
    assert all(map(operator.gt, now, versions))


# The result, the plan, the errors.


@on_ranks(2)
def test_the_result_is_the_same_number_however_it_is_read():
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
    # Thresholds and norms may be DTensors too, torch's own partial norm among them.
    threshold = distribute_tensor(torch.tensor(0.5), mesh, [Replicate()])
    check(cut)
    for items in (cut, [plain(3)]):
        fastclip.clip_grad_norm_(items, threshold)
        assert oracle(grads_of(items), 2) == pytest.approx(0.5, rel=1e-5)
    theirs = nn.utils.get_total_norm([q.grad for q in cut])
    fastclip.clip_grads_with_norm_(cut, 0.25, theirs)
    assert oracle(grads_of(cut), 2) == pytest.approx(0.25, rel=1e-5)
    for q in cut:
        q.grad = None
    norm = fastclip.clip_grad_norm_(cut, 1.0)
    assert (float(norm), norm.dtype) == (0.0, torch.float32)


@on_ranks(2)
def test_a_plan_is_made_once_and_goes_with_its_parameters():
    made, real = [], _ranks.Plan.__init__
    mesh = init_device_mesh("cpu", (2,))
    root = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
    parameters = [spread((6,), mesh, Shard(0)), plain(3), spread((6, 2), mesh, Shard(1))]

    def plans_after(items: list[nn.Parameter]) -> int:
        for _ in range(2):
            check(items)
            fastclip.clip_grad_norm_((q for q in items), 1e9)
        return len(made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ranks.Plan, "__init__", lambda *how: (made.append(1), real(*how))[1])
        assert plans_after(parameters) == 1
        # Values, and tensors that are laid out as the parameters, have the same one.
        fastclip.clip_grad_value_(parameters, 1e9)
        cut = [DTensor(here(q.grad), q._spec, requires_grad=False) for q in parameters[::2]]
        fastclip.get_total_norm([cut[0], torch.ones(3), cut[1]])
        assert plans_after(parameters) == 1
        # Another list with the same first parameter, and another layout.
        assert plans_after(parameters[:2]) == 2
        assert plans_after([*parameters[:2], spread((6, 2), mesh, Shard(0))]) == 3
        # A slice of a mesh is another object each time.
        for _ in range(3):
            fastclip.clip_grad_norm_(parameters, 1e9, process_group=root["pp"])
        assert len(made) == 4
        gc.disable()
        replaced = weakref.ref(_ranks.plan._plans[0][id(parameters[0]._spec)][0])
        assert plans_after(parameters) == 5
        gc.enable()
        assert replaced() is None
    # A layout that torch itself keeps nowhere; another one may come to lie where it was.
    layout = copy.copy(parameters[0]._spec)
    lone = nn.Parameter(DTensor(torch.zeros(3), layout, requires_grad=False))
    lone._spec = layout
    lone.grad = DTensor(torch.ones(3), layout, requires_grad=False)
    fastclip.clip_grad_norm_(lone, 1e9)
    plans, address = _ranks.plan._plans[0], id(layout)
    plan, _ = plans[address]
    del lone, layout
    gc.collect()
    assert address not in plans
    assert not plan.is_for(_ranks.NONE)


@pytest.mark.parametrize("walks", [True, False])
@on_ranks(2)
def test_tensors_whose_layouts_are_new_are_measured_as_they_are_placed(walks):
    # As gradients of tensor parallel parameters have, at every step.
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    same, other = [Shard(0), Shard(0), Replicate()], [Shard(0), Replicate(), Replicate()]
    dtypes = [torch.float32, torch.float32, torch.float64, torch.float32, torch.float32]
    with mock.patch.object(_ops, "extension", _ops.extension if walks else None):
        for dtype, ways in zip(dtypes, [*[same] * 4, other], strict=True):
            local = torch.full((3,), 1.0 + rank, dtype=dtype)
            tensors = [DTensor.from_local(local, mesh, [way], run_check=False) for way in ways]
            norm = fastclip.get_total_norm(tensors)
            # The same placements, another dtype: the norm is of theirs.
            assert norm.dtype == dtype
            squares = [15 if way.is_shard() else 3 * (1 + rank) ** 2 for way in ways]
            assert float(norm) == pytest.approx(sum(squares) ** 0.5, rel=1e-6)


@on_ranks(2, seconds=30)
def test_a_list_that_shrinks_while_it_is_read_is_read_as_it_was():
    # Python compares layouts, and meanwhile the list loses its parameters, as by a thread.
    mesh, shrinking = init_device_mesh("cpu", (2,)), []

    class Slow(Shard):
        def __eq__(self, other: object) -> bool:
            del shrinking[1:]
            return isinstance(other, Shard) and other.dim == self.dim

        __hash__ = Shard.__hash__

    for _ in range(20):
        parameters = [spread((64,), mesh, Shard(0)) for _ in range(100)]
        fastclip.clip_grad_norm_(parameters, 1.0)
        for q in parameters:
            q.grad = DTensor.from_local(here(q.grad), mesh, [Slow(0)], run_check=False)
        # Python looks at one after the other, and meets the list as it is left.
        seen = parameters if _ops.extension is not None else parameters[:1]
        expected, shrinking = oracle(grads_of(seen), 2), parameters
        norm = fastclip.clip_grad_norm_(parameters, 1.0)
        assert len(parameters) == 1
        assert ulps(full(norm), expected) <= 2


@on_ranks(4, seconds=30)
def test_a_wide_gradient_makes_the_norm_float64_on_every_rank():
    # Only the last rank has a wide one, and the first has no gradient at all.
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (4,))
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.complex128 if rank == 3 else torch.float16))
    parameter.grad = torch.full_like(parameter, rank) if rank else None
    values = [torch.full((3,), float(r), dtype=torch.float64) for r in (1, 2, 3)]
    for p in ORDERS:
        expected = torch.linalg.vector_norm(torch.cat(values), p)
        norm = fastclip.clip_grad_norm_([parameter], 1e9, p, process_group=mesh)
        torch.testing.assert_close(norm, expected, rtol=precision(_ops, 1e-14), atol=0)
    parameters = [spread((8,), mesh, Shard(0), dtype=torch.complex128), plain(3)]
    if rank:
        parameters[0].grad = None
    assert fastclip.clip_grad_norm_(parameters, 1e9).dtype == torch.float64


@on_ranks(2)
def test_the_norm_has_the_dtype_of_the_gradients_there_are():
    # The same parameters here, others there.
    rank = dist.get_rank()
    alone = DeviceMesh("cpu", [rank])
    same = spread((3,), alone, Shard(0))
    for dtype in (torch.float32, torch.float64, torch.float32):
        items = [spread((3,), alone, Shard(0), dtype=dtype)] if rank else [same]
        total = fastclip.clip_grad_norm_(items, 1e9, process_group=dist.group.WORLD)
        assert total.dtype == total.to_local().dtype == dtype
    # A module is converted after a clip.
    model = Block()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(torch.ones(2, 7)).square().sum().backward()
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        assert check(list(model.parameters())).dtype == dtype


@on_ranks(2)
def test_bad_input_is_named_and_changes_nothing():
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
    other = init_device_mesh("cpu", (1, 2))
    whole, ways = torch.ones(4), [Shard(0)] * 2
    for odd, grad, why in (
        (spread((4,), mesh, *ways[:1]), whole, "expected a DTensor.*Tensor"),
        (spread((4,), mesh, *ways[:1]), distribute_tensor(whole, other, ways), "of one mesh"),
        (spread((4,), mesh, *ways[:1]), distribute_tensor(whole.int(), mesh, ways[:1]), "int32"),
        (plain(4), distribute_tensor(whole, mesh, ways[:1]), "expected a plain tensor"),
    ):
        odd.grad_dtype, odd.grad = None, grad
        with pytest.raises(TypeError, match=rf"parameters\[2\]: .*{why}"):
            fastclip.clip_grad_norm_([*parameters, odd], 0.1)
    for now, then in zip(grads_of(parameters), before, strict=True):
        assert torch.equal(now, then)


@on_ranks(4)
def test_process_groups_that_share_two_ranks_are_refused():
    pair = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
    for some in ([pair, dist.group.WORLD], [dist.group.WORLD] * 2 + [pair]):
        with pytest.raises(ValueError, match=r"process_group: ranks \[.*are in two of the groups"):
            fastclip.clip_grad_norm_([plain(3)], 0.1, process_group=some)


def elsewhere_served(cache: Path) -> None:
    """Gradients on a device that the group has no backend for: the numbers travel by another."""
    emulated(cache)
    parameter = nn.Parameter(torch.zeros(4, device="emulated"))
    parameter.grad = (torch.arange(4.0) + dist.get_rank()).to("emulated")
    expected = math.sqrt(sum((i + r) ** 2 for i in range(4) for r in range(2)))
    norm = fastclip.clip_grad_norm_([parameter], expected / 2, process_group=dist.group.WORLD)
    assert norm.device.type == "emulated"
    assert ulps(norm.cpu(), expected) <= 2
    halves = (torch.arange(4.0) + dist.get_rank()) / 2
    torch.testing.assert_close(parameter.grad.cpu(), halves)


@pytest.mark.emulated
@pytest.mark.skipif(bool(emulation.MISSING), reason=str(emulation.MISSING))
def test_the_collective_runs_where_the_group_has_a_backend(world, request):
    cache = emulation_folder(request.config)
    emulation.build(cache)
    world(2).run(elsewhere_served, cache, seconds=120)


# The tests' own tools.


def hangs() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.zeros(1))


@pytest.mark.slow
def test_a_hang_is_a_failure(tmp_path):
    world = World(2, tmp_path)
    # Importing this file may take as long as the hang is given.
    world.run(here, torch.zeros(1))
    with pytest.raises(AssertionError, match=r"ranks \[0\] hang"):
        world.run(hangs, seconds=5)
