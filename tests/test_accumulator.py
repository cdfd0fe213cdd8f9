"""The norm gathered during backward: never another than that of the gradients as they are."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from conftest import Reads, oracle, parameters, ulps
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastclip
from fastclip import NormAccumulator, _ops


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(4)])
        self.sometimes = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)

    def forward(self, x, more: bool = True):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.frozen(self.sometimes(x) if more else x)


def run(module: nn.Module, step: int, more: bool = True) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(3, 5, generator=generator).to(next(module.parameters()).dtype)
    module(x, more).square().sum().backward()


def grads_of(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def check(norms: NormAccumulator, module: nn.Module) -> int:
    """Norm and gradients are those of a clip of what the gradients are now; how many it read."""
    before = grads_of(module)
    expected = oracle([grad.to_dense() for grad in before], 2.0)
    with Reads() as reads:
        norm = norms.clip_(expected / 2)
    assert ulps(norm, expected) <= 2
    coef = expected / 2 / (expected + 1e-6)
    for grad, then in zip(grads_of(module), before, strict=True):
        torch.testing.assert_close(grad, then * coef, check_stride=False)
    return reads.count


needs_hooks = pytest.mark.skipif(_ops.extension is None, reason="without the extension no hooks")


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_every_device_measures_in_backward(device, dtype, p):
    made = [nn.Parameter(torch.zeros(n, dtype=dtype, device=device)) for n in (2, 70, 40_000)]
    slopes = [torch.randn(item.shape).to(device, dtype) for item in made]
    norms = NormAccumulator(made, p)
    assert float(norms.clip_(1.0)) == 0
    for item, slope in zip(made, slopes, strict=True):
        (item * slope).sum().backward()
    expected = oracle(slopes, p)
    with Reads() as reads:
        norm = norms.clip_(expected / 2)
    assert ulps(norm, expected) <= 2
    assert reads.count == 0 or _ops.extension is None
    coef = expected / 2 / (expected + 1e-6)
    for item, slope in zip(made, slopes, strict=True):
        torch.testing.assert_close(item.grad.cpu(), (slope.cpu().double() * coef).to(dtype))
    # A second clip has nothing to go by, and measures what the first has left.
    with Reads() as reads:
        assert float(norms.clip_(math.inf)) == pytest.approx(expected / 2, rel=1e-2)
    assert reads.count == 3


@needs_hooks
def test_only_what_changed_is_measured_again():
    module = Net()
    norms = NormAccumulator(module)
    with norms.pause():
        run(module, 0)
    run(module, 1, more=False)
    module.layers[0].weight.grad.mul_(2)
    with pytest.raises(ValueError, match="max_norm"):
        norms.clip_(-1.0)
    assert check(norms, module) == 3


def swap(module: nn.Module) -> None:
    # What is swapped out lives on, with the gradient that was seen.
    module.other = nn.Parameter(torch.zeros(5, 5))
    module.other.grad = torch.ones(5, 5)
    torch.utils.swap_tensors(module.layers[1].weight, module.other)
    del module.other


MEMORY = torch.zeros(50)
CHANGES = {
    "object": lambda module, weight: setattr(weight, "grad", torch.ones(5, 5)),
    "none": lambda module, weight: setattr(weight, "grad", None),
    "data": lambda module, weight: setattr(weight.grad, "data", torch.ones(5, 5)),
    "cut": lambda module, weight: setattr(weight.grad, "data", weight.grad.data[:2]),
    # Elsewhere in the same memory, whose version counter does not tell.
    "moved": lambda module, weight: setattr(weight.grad, "data", MEMORY[25:].fill_(3).view(5, 5)),
    "sparse": lambda module, weight: setattr(weight, "grad", torch.ones(5, 5).to_sparse()),
    "narrowed": lambda module, weight: module.to(torch.bfloat16),
    "widened": lambda module, weight: run(module.double(), 1),
    "swapped": lambda module, weight: swap(module),
}


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_changed_since_are_measured_again(change):
    module = Net()
    norms = NormAccumulator(module)
    weight = module.layers[1].weight
    weight.grad = MEMORY.zero_()[:25].view(5, 5)
    run(module, 0)
    CHANGES[change](module, weight)
    check(norms, module)


def test_parameters_that_are_replaced_are_measured():
    module = Net()
    norms = NormAccumulator(module)
    run(module, 0)
    other = {key: value + 1 for key, value in module.state_dict().items()}
    module.load_state_dict(other, assign=True)
    for seed in (1, 2):
        # The second backward adds to what is in place.
        module.zero_grad(set_to_none=False)
        run(module, seed)
        check(norms, module)
    norms.remove()
    assert not any(q._post_accumulate_grad_hooks for q in module.parameters())


def test_ranks_change_gradients_unseen():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    module = Net()
    before = NormAccumulator(module)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        for norms in (before, NormAccumulator(module)):
            run(module, 0)
            # As a collective writes: the version counter does not tell.
            module.layers[0].weight.grad.data.mul_(2)
            check(norms, module)
    finally:
        dist.destroy_process_group()


@needs_hooks
def test_a_gradient_and_a_module_that_are_dropped_are_freed():
    module = Net()
    norms = NormAccumulator(module)
    run(module, 0)
    grad = weakref.ref(module.layers[0].weight.grad)
    module.zero_grad()
    assert grad() is None
    run(module, 1)
    check(norms, module)
    gone = weakref.ref(module.layers[0].weight)
    del module, norms
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("in_a_pause", [False, True])
def test_removed_hooks_leave_nothing_behind(in_a_pause):
    module = Net()
    with NormAccumulator(module) as norms:
        run(module, 0)
        if in_a_pause:
            with norms.pause():
                norms.remove()
            assert norms._measured is None or norms._measured.is_paused
    assert all(not p._post_accumulate_grad_hooks for p in module.layers.parameters())
    copy.deepcopy(module)
    run(module, 1)
    assert check(norms, module) == 10


def data_parallel(views: bool, unused: bool) -> list[int]:
    """How many gradients each clip has read."""
    module = DistributedDataParallel(
        Net(),
        bucket_cap_mb=0.0002,
        gradient_as_bucket_view=views,
        find_unused_parameters=unused,
    )
    norms = NormAccumulator(module)
    rank, found = dist.get_rank(), []
    for step in range(8):
        module.zero_grad(set_to_none=step % 2 == 0)
        if step in (0, 3, 6):
            # The buckets of the second synchronised backward are not those of the first.
            with module.no_sync() if step else nullcontext():
                run(module, 100 + rank)
        # Used by one rank alone, by none, by both; last by an unsynchronised backward alone.
        more = [True, rank == 0, False, True, True, True, False, True][step] if unused else True
        with norms.pause() if step == 5 else nullcontext():
            run(module, 10 * step + rank, more)
        if step == 4:
            module.module.layers[0].weight.grad.mul_(2)
        found.append(check(norms, module))
        total = [None, None]
        dist.all_gather_object(total, [g.tolist() for g in grads_of(module)])
        assert total[0] == total[1] or step == 6
    norms.remove()
    run(module, 7)
    check(norms, module)
    return found


# Modules, and what they are given in each step.
ODD = {
    "complex": (
        lambda: nn.Linear(2, 2, bias=False, dtype=torch.complex64),
        lambda step: torch.full((1, 2), 3 + 4j * step),
    ),
    "sparse": (
        lambda: nn.Embedding(5, 2, sparse=True),
        lambda step: torch.tensor([step, 1]),
    ),
}


def odd_gradients(kind: str, p: float, wrap: Callable[[nn.Module], nn.Module]) -> None:
    make, batch = ODD[kind]
    module = wrap(make())
    norms = NormAccumulator(module, p)
    for step in range(3):
        module.zero_grad()
        module(batch(step)).abs().sum().backward()
        expected = fastclip.clip_grad_norm_(module.parameters(), math.inf, p)
        torch.testing.assert_close(norms.clip_(math.inf), expected)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("kind", ["complex", "sparse"])
@pytest.mark.parametrize("wrap", [nn.Sequential, DistributedDataParallel])
def test_gradients_that_are_not_plain_are_measured_by_the_clip(world, wrap, kind, p):
    if wrap is nn.Sequential:
        odd_gradients(kind, p, wrap)
    else:
        world(2).run(odd_gradients, kind, p, wrap)


@needs_hooks
@pytest.mark.parametrize(
    ("buckets", "made", "read"),
    [
        ([(0, 1), (2,)], 3, 0),
        ([(0,), (2,)], 3, 1),
        ([(0, 1)], 3, 0),
        # Backward leaves out the others, of which their bucket holds zeros.
        ([(0, 1), (2,)], 1, None),
    ],
)
def test_a_gradient_counts_to_the_bucket_it_was_last_in(buckets, made, read):
    *items, other = parameters(list(torch.randn(4, 3)))
    measured = _ops.extension.MeasuredBuckets(items, 2.0)
    # What was not there from the beginning is no error: that would end backward on one rank,
    # while others wait for its gradients.
    measured.touch(other)
    for number in (0, 7):
        measured.see_bucket(number, [other], torch.ones(3))
    for cut, count in (([(0, 1), (2,)], 3), ([(0,), (1,), (2,)], 3), (buckets, made)):
        for item in items[:count]:
            item.grad = item.grad if count == 3 else torch.randn(3)
            measured.touch(item)
        for number, members in enumerate(cut):
            held = [items[i].grad if i < count else torch.zeros(3) for i in members]
            measured.see_bucket(number, [items[i] for i in members], torch.cat(held))
        measured.settle(items)
    with Reads() as reads:
        norm = measured.take(items).norm(2.0)
    assert ulps(norm, oracle([item.grad for item in items], 2.0)) <= 2
    assert reads.count == read or read is None


def averaged(way: str) -> None:
    """With and without an accumulator; each rank has a batch more than the one before, or two."""
    rank, size = dist.get_rank(), dist.get_world_size()
    batches = [2] * size if way == "sparse" else list(range(1, size + 1))

    def grads(measures: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        embedding = nn.Embedding(5, 3, sparse=way == "sparse")
        module = DistributedDataParallel(nn.Sequential(embedding, nn.Linear(3, 2)))
        norms = NormAccumulator(module) if measures else None
        found = []
        join = module.join(divide_by_initial_world_size=way == "by all")
        with nullcontext() if way == "sparse" else join:
            for step in range(batches[rank]):
                module.zero_grad()
                module(torch.tensor([step, rank])).square().sum().backward()
                now = [weight.grad.to_dense().clone() for weight in module.parameters()]
                found += now
                if norms is not None:
                    assert ulps(norms.clip_(math.inf), oracle(now, 2.0)) <= 2
        return found

    assert all(map(torch.equal, grads(True), grads(False)))


@pytest.mark.parametrize("way", ["by all", "by those with a batch", "sparse"])
def test_ranks_average_to_the_bit_as_without_it(world, way):
    world(3).run(averaged, way)


def reduced_in_python() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    batches = [torch.randn(4, 5, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    linear = nn.Linear(5, 3)
    loss = sum(linear(x).square().sum() for x in batches) / size
    averages = list(torch.autograd.grad(loss, list(linear.parameters())))
    with torch._dynamo.config.patch(optimize_ddp="python_reducer", compiled_autograd=True):
        module = DistributedDataParallel(linear)
        norms = NormAccumulator(module)
        compiled = torch.compile(module, backend="aot_eager")
        for _ in range(2):
            module.zero_grad()
            compiled(batches[rank]).square().sum().backward()
            torch.testing.assert_close(grads_of(module), averages)
            check(norms, module)
    torch._dynamo.reset()


def hooked_twice() -> None:
    """It is refused: torch has one communication hook."""
    module = DistributedDataParallel(Net())
    NormAccumulator(module)
    with pytest.raises(ValueError, match="parameters: this DistributedDataParallel has a"):
        NormAccumulator(module)


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("views", [False, True])
def test_buckets_are_measured_as_they_are_averaged(world, views, unused):
    found = world(2).run(data_parallel, views, unused)
    # Ten gradients a step: all of a pause, else only what shares a bucket with a change.
    assert _ops.extension is None or all(n[5] == 10 and sum(n) <= 20 for n in found), found


def sharded() -> None:
    from torch.distributed.fsdp import fully_shard

    module = Net()
    module.frozen.requires_grad_(True)
    fully_shard(module)
    norms = NormAccumulator(module)
    run(module, 0)
    expected = oracle([p.grad.full_tensor() for p in module.parameters()], 2.0)
    assert ulps(norms.clip_(expected / 2), expected) <= 2
    now = oracle([p.grad.full_tensor() for p in module.parameters()], 2.0)
    assert now == pytest.approx(expected / 2)


def copied_while_attached() -> None:
    """A copy averages on, an average of weights is made; neither is measured."""
    torch.manual_seed(0)
    module = DistributedDataParallel(Net())
    norms = NormAccumulator(module)
    other, averages = copy.deepcopy(module), torch.optim.swa_utils.AveragedModel(module)
    for each in (module, other):
        run(each, dist.get_rank())
    averages.update_parameters(module)
    check(norms, module)
    for now, then in zip(grads_of(module), grads_of(other), strict=True):
        torch.testing.assert_close(2 * now, then)


@pytest.mark.parametrize(
    "scenario",
    [
        reduced_in_python,
        sharded,
        copied_while_attached,
        pytest.param(hooked_twice, marks=needs_hooks),
    ],
)
def test_two_ranks_clip_by_the_norm_of_what_their_gradients_are(world, scenario):
    world(2).run(scenario)
