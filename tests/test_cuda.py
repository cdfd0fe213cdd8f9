"""What only a GPU can show: no waits, graphs, streams, launches, memory.

The ops and the contract themselves run on CUDA in their own files.
"""

import math
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import DTYPES, awkward, oracle, parameters, ulps
from torch import Tensor

import fastclip
from fastclip import _ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CALLS: dict[str, Callable[[list[torch.nn.Parameter]], object]] = {
    "clip_grad_norm_": lambda ps: fastclip.clip_grad_norm_(ps, 1.0),
    "by a tensor": lambda ps: fastclip.clip_grad_norm_(ps, torch.full((), 1.0, device="cuda")),
    "of order inf": lambda ps: fastclip.clip_grad_norm_(ps, 1.0, math.inf),
    "of order 3": lambda ps: fastclip.clip_grad_norm_(ps, 1.0, 3.0),
    "clip_grad_value_": lambda ps: fastclip.clip_grad_value_(ps, 0.5),
    "get_total_norm": lambda ps: fastclip.get_total_norm([p.grad for p in ps]),
    "clip_grads_with_norm_": lambda ps: fastclip.clip_grads_with_norm_(
        ps, 1.0, torch.full((), 7.0, device="cuda")
    ),
    "norms": lambda ps: _ops.norms([p.grad for p in ps], 2.0),
}


def mixed(scale: float = 1.0) -> list[Tensor]:
    return [t * scale for dtype in DTYPES for t in awkward(dtype, "cuda")]


def many(count: int) -> list[Tensor]:
    return [t.clone() for t in torch.randn(count, 17, device="cuda").unbind()]


@pytest.fixture
def no_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_kernels_are_there():
    assert _ops.has_kernels("cuda")
    major, minor = torch.cuda.get_device_capability()
    assert any(a <= 100 * major + 10 * minor for a in _ops.extension.cuda_architectures)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("count", [30, 5000])
def test_no_call_waits_for_the_device(call, count, request):
    made = parameters(many(count))
    CALLS[call](made)
    request.getfixturevalue("no_waits")
    CALLS[call](made)
    # A wait would be seen.
    with pytest.raises(RuntimeError, match="synchron"):
        made[0].grad[0].item()


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0])
@pytest.mark.parametrize("count", [40, 3000], ids=["fused", "two-phase"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_a_captured_call_follows_its_inputs(p, count, as_tensor):
    grads = many(count)
    made = parameters(grads)
    max_norm = torch.full((), 2.0, device="cuda") if as_tensor else 2.0
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fastclip.clip_grad_norm_(made, max_norm, p)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = fastclip.clip_grad_norm_(made, max_norm, p)
    for scale in (1.0, 1e-6, 300.0, math.nan, 1.0):
        if as_tensor:
            max_norm.fill_(3.0 * scale if scale < 10 else 3.0)
        for parameter, grad in zip(made, grads, strict=True):
            parameter.grad.copy_(grad * scale)
        graph.replay()
        eager = parameters([g * scale for g in grads])
        expected = fastclip.clip_grad_norm_(eager, max_norm, p)
        torch.testing.assert_close(norm, expected, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(made, eager, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, equal_nan=True)


def test_error_if_nonfinite_is_refused_while_capturing():
    made = parameters(many(3))
    kept = [p.grad.clone() for p in made]
    fastclip.clip_grad_norm_(made, 1e9, error_if_nonfinite=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="error_if_nonfinite"):
            fastclip.clip_grad_norm_(made, 1.0, error_if_nonfinite=True)
        norm = fastclip.get_total_norm(kept)
    graph.replay()
    assert ulps(norm, oracle(kept, 2.0)) <= 2
    assert all(torch.equal(p.grad, k) for p, k in zip(made, kept, strict=True))


def clip_of_copies(tensors: list[Tensor], p: float = 2.0) -> list[Tensor]:
    """Return the norm and the clipped copies."""
    copies = [t.clone() for t in tensors]
    return [_ops.clip_norm_(copies, 1.0, p), *copies]


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0])
def test_many_runs_on_two_streams_give_the_same_bits(p):
    *streams, busy = [torch.cuda.Stream() for _ in range(3)]
    noise = torch.randn(2048, 2048, device="cuda")
    lists = [[*mixed(scale), torch.randn(3_000_001, device="cuda")] for scale in (1.0, 5.0)]
    expected = [clip_of_copies(tensors, p) for tensors in lists]
    torch.cuda.synchronize()
    for _ in range(100):
        results = []
        with torch.cuda.stream(busy):
            noise @ noise
        for stream, tensors in zip(streams, lists, strict=True):
            with torch.cuda.stream(stream):
                results.append(clip_of_copies(tensors, p))
        torch.cuda.synchronize()
        for result, right in zip(results, expected, strict=True):
            assert all(map(torch.equal, result, right))


def kernels(call: Callable[[], object]) -> list[str]:
    """The names of what a call runs on the device."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == cuda]
    return [name for name in names if name != "Activity Buffer Request"]


@pytest.mark.parametrize(
    ("call", "fits", "counts"),
    [
        ("clip_grad_norm_", True, [1]),
        ("clip_grad_norm_", False, [2]),
        ("clip_grad_value_", True, [1, 2]),
        ("get_total_norm", True, [1, 2]),
    ],
)
def test_a_list_that_fits_into_the_l2_cache_or_not_takes_a_kernel_or_two(call, fits, counts):
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size // 40
    grads = many(1500) if fits else [torch.randn(size, device="cuda") for _ in range(10)]
    made = parameters(grads)
    names = kernels(lambda: CALLS[call](made))
    assert len(names) in counts, names
    assert all("kernel" in name for name in names)


@pytest.mark.parametrize("count", [5, 50], ids=["20 MB, fused", "200 MB"])
def test_clips_on_streams_of_two_priorities_end(count):
    # Grids that must be resident all at once would wait for each other's multiprocessors.
    streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1)]
    lists = [[torch.randn(1 << 20, device="cuda") for _ in range(count)] for _ in streams]
    expected = [oracle(tensors, 2.0) for tensors in lists]
    torch.cuda.synchronize()
    norms, ends = [], []
    for _ in range(20):
        for stream, tensors in zip(streams, lists, strict=True):
            with torch.cuda.stream(stream):
                norms.append(_ops.clip_norm_(tensors, 1e9, 2.0))
                ends.append(stream.record_event())
    deadline = time.monotonic() + 20
    while not all(end.query() for end in ends):
        assert time.monotonic() < deadline, "two clips wait for each other"
        time.sleep(0.01)
    assert all(ulps(norm, expected[i % 2]) <= 2 for i, norm in enumerate(norms))


def test_nothing_is_allocated_beyond_partials_and_result():
    tensors = [torch.randn(1 << 20, device="cuda") for _ in range(20)]
    _ops.clip_norm_(tensors, 1.0, 2.0)
    before = torch.cuda.memory_stats()
    _ops.clip_norm_(tensors, 1.0, 2.0)
    after = torch.cuda.memory_stats()
    spans = 20 * 128  # a tile of 32 KiB each
    rounding = 2 * 512
    for key, most in (("allocation.all", 2), ("allocated_bytes.all", 8 * spans + rounding)):
        assert 0 < after[f"{key}.allocated"] - before[f"{key}.allocated"] <= most


def test_more_than_two_to_the_31_elements():
    n = (1 << 31) + 12_345
    tensor = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    tensor[0] = tensor[n // 2] = tensor[-1] = 2.0
    norm = _ops.clip_norm_([tensor], math.sqrt(3.0), 2.0)
    assert ulps(norm, math.sqrt(12.0)) <= 2
    assert [tensor[0].item(), tensor[n // 2].item(), tensor[-1].item()] == [1.0] * 3
    assert tensor.count_nonzero().item() == 3


def test_several_devices_have_one_norm():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    grads = [torch.randn(300, device=f"cuda:{i % 2}") for i in range(5)]
    made = parameters(grads)
    norm = fastclip.clip_grad_norm_(made, 1.0)
    assert norm.device == grads[0].device
    assert ulps(norm, oracle(grads, 2.0)) <= 2
