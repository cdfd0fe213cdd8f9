"""What only the emulated device can show: any grid, any schedule, launch by launch."""

import math

import emulation
import pytest
import torch
from conftest import (
    DTYPES,
    MACHINES,
    ORDERS,
    awkward,
    emulated,
    emulation_folder,
    oracle,
    parameters,
    ulps,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip
from fastclip import _ops
from fastclip._ops import reference

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(bool(emulation.MISSING), reason=str(emulation.MISSING)),
]


@pytest.fixture
def module(request):
    module = emulated(emulation_folder(request.config))
    kept = {k: getattr(module.machine, k) for k in dir(module.machine) if not k.startswith("_")}
    for key, value in (MACHINES["emulated-fused"] | {"cooperative": 1}).items():
        setattr(module.machine, key, value)
    yield module
    for key, value in kept.items():
        setattr(module.machine, key, value)


@pytest.fixture
def machine(module):
    return module.machine


def lists() -> dict[str, list[torch.Tensor]]:
    """Mixed dtypes; more tensors than a small table holds; a tensor that is cut by two tables."""
    few = [t.clone() for t in torch.randn(260, 9, device="emulated").unbind()]
    return {
        "mixed": [t for dtype in DTYPES for t in awkward(dtype, "emulated")],
        "many": [t.clone() for t in torch.randn(600, 40, device="emulated").unbind()],
        "long": [*few, torch.randn(2100 * 8192 + 5, device="emulated"), *few],
    }


@pytest.mark.parametrize("name", ["mixed", "many", "long"])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_any_grid_and_schedule_gives_the_same_bits(machine, name, p):
    source = lists()[name]
    expected = oracle(source, p)
    results = []
    settings = "multiprocessors", "threads_per_multiprocessor", "driver", "cooperative"
    machines = [(1, 512, 13000, 1), (3, 1536, 13000, 1), (2, 1536, 12000, 0), (7, 2048, 13000, 0)]
    # How a long list is cut does not depend on the order.
    for values in machines[::3] if name == "long" and p == 1.0 else machines:
        for setting, value in zip(settings, values, strict=True):
            setattr(machine, setting, value)
        machine.seed += 1
        tensors = [t.clone() for t in source]
        norm = _ops.clip_norm_(tensors, expected / 3, p)
        assert ulps(norm, expected) <= 2
        results.append([norm.cpu()] + [t.cpu() for t in tensors])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def count(machine, call) -> int:
    before = machine.launches
    call()
    return machine.launches - before


def test_a_list_that_fits_is_one_launch_to_clip_and_two_to_measure(machine):
    tensors = list(torch.randn(2000, 5, device="emulated").unbind())
    assert count(machine, lambda: _ops.clip_norm_(tensors, 1.0, 2.0)) == 1
    assert count(machine, lambda: _ops.norm(tensors, 2.0)) == 2
    norms = [_ops.norms(tensors, 2.0, None, True)]
    assert count(machine, lambda: _ops.clip_norm_(tensors, 1.0, 2.0, norms)) == 2
    assert count(machine, lambda: _ops.scale_(tensors, torch.tensor(0.5))) == 1
    assert count(machine, lambda: _ops.clamp_(tensors, 0.1)) == 1
    machine.cooperative = 0
    assert count(machine, lambda: _ops.clip_norm_(tensors, 1.0, 2.0)) == 2


def clip_of_80_kb(machine) -> tuple[int, list[torch.Tensor]]:
    """Launches of a clip on two multiprocessors, and what it leaves."""
    machine.multiprocessors = 2
    torch.manual_seed(0)
    tensors = [torch.randn(20_000, device="emulated"), torch.randn(5, device="emulated")]
    results = []
    launches = count(machine, lambda: results.append(_ops.clip_norm_(tensors, 1.0, 2.0)))
    return launches, [t.cpu() for t in [*results, *tensors]]


# An L2 cache that is smaller; too few threads for a block; blocks of another process; and a
# collective that may hold a multiprocessor.
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("l2_bytes", 80_000),
        ("threads_per_multiprocessor", 256),
        ("held_blocks", 6),
        ("process_groups", 1),
    ],
)
def test_where_one_launch_does_not_pay_or_go_it_is_two_with_the_same_bits(machine, setting, value):
    alone, expected = clip_of_80_kb(machine)
    assert alone == 1
    setattr(machine, setting, value)
    launches, found = clip_of_80_kb(machine)
    assert launches == 2
    assert all(map(torch.equal, found, expected))
    assert machine.last_error == 0  # nobody else is told of it


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_one_tile_is_measured_in_one_launch_with_the_bits_of_a_clip(module, machine, p):
    doubles = torch.randn(20, 1000, dtype=torch.float64).unbind()
    for tensor in (torch.randn(8192), torch.ones(()), *doubles):
        tensor, norms = tensor.to("emulated"), []
        before = module.allocated_bytes()
        assert count(machine, lambda t=tensor, n=norms: n.append(_ops.norm([t], p))) == 1
        (alone,) = norms
        assert module.allocated_bytes() - before == alone.itemsize
        assert ulps(alone, oracle([tensor], p)) <= 2
        beside = _ops.norms([tensor, tensor.new_empty(0)], p)[0]
        assert alone.item() == _ops.clip_norm_([tensor.clone()], 1.0, p).item() == beside.item()


@pytest.mark.parametrize(("width", "rows"), [(3, 5000), (8193, 4100)])
def test_many_rows_need_no_finish(machine, width, rows):
    # Of one tile, and of two, beside rows that are shorter: a span each.
    tensors = [torch.randn(rows, width, device="emulated"), torch.randn(7, 5, device="emulated")]
    norms = []
    call = lambda: norms.append(_ops.norms(tensors, 2.0, None, False, True))  # noqa: E731
    most = -(-rows // 2000) * (1 if width < 8192 else 2)
    assert count(machine, call) <= most
    expected = torch.cat([t.cpu().double().norm(dim=1) for t in tensors])
    torch.testing.assert_close(norms[0].cpu().double(), expected, rtol=1e-6, atol=0)


def test_groups_of_more_tiles_than_there_can_be_spans_are_kept_apart(machine):
    # Spans of two tiles, and a group of an odd number of them.
    tensors = list(torch.randn(4099, 3, device="emulated").unbind())
    norms = _ops.norms(tensors, 2.0, [i % 3 for i in range(4099)])
    for first, norm in enumerate(norms):
        assert ulps(norm, oracle(tensors[first::3], 2.0)) <= 2


def test_parameters_of_4_kib_take_fewer_tensors_a_launch(machine):
    tensors = list(torch.randn(251, 5, device="emulated").unbind())
    machine.driver = 12000
    assert count(machine, lambda: _ops.clip_norm_(tensors[:250], 1.0, 2.0)) == 1
    assert count(machine, lambda: _ops.clip_norm_(tensors, 1.0, 2.0)) == 4


def test_more_than_two_to_the_31_bytes_are_walked_to_the_end(machine):
    # The wider its elements are, the fewer are walked.
    tensor = torch.zeros((1 << 28) + 70_000, dtype=torch.float64, device="emulated")
    tensor[-3:] = 2.0
    tensor[0] = 2.0
    assert _ops.clip_norm_([tensor], 2.0, 2.0).item() == 4.0
    clipped = pytest.approx(1.0, rel=1e-6)
    assert tensor[-3:].tolist() == [clipped] * 3
    assert tensor[:2].tolist() == [clipped, 0.0]


def test_nothing_is_allocated_beyond_partials_and_result(module):
    tensors = [torch.randn(20_000, device="emulated"), torch.randn(5, device="emulated")]
    before = module.allocations(), module.allocated_bytes()
    _ops.clip_norm_(tensors, 1.0, 2.0)
    spans = 4
    assert module.allocations() - before[0] == 2
    assert module.allocated_bytes() - before[1] == 8 * spans + 4


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t: _ops.clip_norm_(t, 1.0, 2.0), "both phases"),
        (lambda t: _ops.norm(t, 2.0), "the norm phase"),
        (lambda t: _ops.scale_(t, torch.tensor(0.5)), "scale_kernel"),
        (lambda t: _ops.clamp_(t, 0.1), "clamp_kernel"),
    ],
)
def test_a_failed_launch_is_named(machine, call, name):
    tensors = [torch.ones(4, device="emulated:1")]
    machine.fail_launch = 98
    why = f"fastclip: the launch of {name} on device 1 failed: .*earlier.*FASTCLIP_KERNELS=0"
    with pytest.raises(RuntimeError, match=why):
        call(tensors)
    machine.fail_launch = 0
    assert tensors[0].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("setting", "value", "launches"),
    [
        ("fail_queries", 35, 0),
        ("capability", 80, 0),
        ("capability", 89, 0),
        ("capability", 90, 1),
        ("capability", 100, 1),
    ],
)
def test_a_device_that_is_not_known_or_compiled_for_gets_the_default_op(
    machine, setting, value, launches
):
    tensors = [torch.ones(4, device="emulated")]
    setattr(machine, setting, value)
    assert count(machine, lambda: _ops.clip_norm_(tensors, 1.0, 2.0)) == launches
    assert tensors[0].tolist() == pytest.approx([0.5] * 4, rel=1e-5)
    assert machine.last_error == 0


@pytest.mark.parametrize("p", ORDERS)
def test_several_devices_have_one_norm(machine, p):
    grads = [torch.randn(300).to(f"emulated:{i % 2}") for i in range(5)]
    made = parameters(grads)
    norm = fastclip.clip_grad_norm_(made, 1.0, p)
    assert norm.device == grads[0].device
    assert ulps(norm, oracle(grads, p)) <= 2
    assert oracle([m.grad for m in made], p) == pytest.approx(1.0, rel=1e-5)


def test_a_coefficient_on_the_host_is_taken_along(machine):
    tensors = [torch.ones(4, device="emulated")]
    _ops.scale_(tensors, torch.tensor([0.25], dtype=torch.float64))
    assert tensors[0].tolist() == [0.25] * 4


class Launches(TorchDispatchMode):
    """Ops of torch that launch something on the emulated device."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        some = result if isinstance(result, torch.Tensor) else args[0]
        some = some[0] if isinstance(some, list | tuple) else some
        is_here = isinstance(some, torch.Tensor) and some.device.type == "emulated"
        views = {"view", "unsqueeze", "select", "promote_types", "detach", "unbind", "empty"}
        if is_here and func.__name__.partition(".")[0] not in views:
            self.names.append(func.__name__)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_ops_launch_at_most_two_more_than_torch(machine, dtype):
    grads = [torch.randn(100).to("emulated", dtype) for _ in range(5)]
    with Launches() as theirs:
        torch.nn.utils.clip_grad_norm_(parameters(grads), 1.0, foreach=True)
    with Launches() as ours:
        reference.clip_norm_(grads, 1.0, 2.0)
    assert len(ours.names) <= len(theirs.names) + 2, ours.names
    # Nor does what may write zeros launch anything for each tensor.
    coef = torch.tensor(-0.0, dtype=torch.float64, device="emulated")
    with Launches() as few:
        reference.scale_(grads, coef)
    grads *= 9
    with Launches() as many:
        reference.scale_(grads, coef)
    assert len(few.names) == len(many.names) <= 6
