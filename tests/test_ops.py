"""The five ops against a float64 oracle, on awkward lists, and the laws they keep."""

import itertools
import math
import signal
import sys

import pytest
import torch
from conftest import (
    ORDERS,
    awkward,
    name_of,
    oracle,
    precision,
    python,
    ulps,
    without_emulation,
)

from fastclip import _ops
from fastclip._ops import measure, reference
from fastclip._ops.coef import clip_coef
from fastclip._ops.measure import widest

HALF = [torch.float16, torch.bfloat16]


def layered(dtype, device):
    """Rows of memory and none: transposed, channels last, with gaps, empty, longer than a tile."""
    images = torch.randn(6, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    made = [torch.randn(4, 7), torch.randn(33), images, torch.randn(9, 0), torch.randn(0, 3)]
    made += [torch.randn(5, 8).t(), torch.randn(6, 10)[:, ::2], torch.randn(3, 40000)]
    made.append(torch.ones(()))
    return [(t * (1 + i)).to(device=device, dtype=dtype) for i, t in enumerate(made)]


def equal(value):
    return lambda dtype, device: [torch.full((50_000,), value, dtype=dtype, device=device)]


def many(dtype, device):
    """More tiles than the CPU can have spans; on the emulated device one launch or several."""
    count = 600 if device == "emulated" else 2_100
    return [*torch.randn(count, 3).to(dtype).to(device)]


LISTS = {
    "awkward": awkward,
    "reversed": lambda dtype, device: awkward(dtype, device)[::-1],
    "mixed": lambda dtype, device: [t for d in (*HALF, dtype) for t in awkward(d, device)],
    "many": many,
    "dense": lambda dtype, device: layered(dtype, device)[:5],
    "any layout": layered,
}
EQUAL = {str(value): equal(value) for value in (0.1, 1 / 3, 1.0)}
UNITS = ["all", "one group", "groups", "each", "row"]


def told(tensors, by):
    """Tensors, how an op is told which of their elements belong together, and these elements."""
    if by == "row":
        tensors = [t for t in tensors if t.dim() < 2 or len(t) < 1000]
        rows = [[r] for t in tensors for r in (t.unbind() if t.dim() > 1 else [t])]
        return tensors, (None, True), rows
    if by == "all":
        return tensors, (None, False), [tensors]
    # In no order, and without a group 2 or 4.
    slots = {"each": range(len(tensors)), "groups": [1, 0, 3, 3, 0, 1, 1, 5, 0, 3, 5]}
    group = [slot for slot, _ in zip(itertools.cycle(slots.get(by, [0])), tensors, strict=False)]
    lists = [[] for _ in range(max(group) + 1)]
    for tensor, slot in zip(tensors, group, strict=True):
        lists[slot].append(tensor)
    return tensors, (None if by == "each" else group, False), lists


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("made", [*LISTS.values(), *EQUAL.values()], ids=[*LISTS, *EQUAL])
def test_norms_match_the_oracle(ops, device, dtype, p, made):
    # Each way with all that is paired here.
    for by in UNITS:
        tensors, (group, by_row), lists = told(made(dtype, device), by)
        versions = [t._version for t in tensors]
        if by == "all":
            norms, wide = (ops.norm(tensors, p, is_wide)[None] for is_wide in (False, True))
        else:
            norms, wide = (
                ops.norms(tensors, p, group, is_wide, by_row) for is_wide in (False, True)
            )
        assert norms.shape == (len(lists),)
        assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert wide.dtype == widest(torch.device(device))
        assert norms.device.type == device
        assert torch.equal(wide.to(norms.dtype), norms)
        assert [t._version for t in tensors] == versions
        # Of many norms some hundreds are enough.
        step = 1 + len(lists) // 300
        for norm, some in zip(norms.cpu()[::step], lists[::step], strict=True):
            # The power 1 / p multiplies the relative error of a sum by 1 / p.
            assert ulps(norm, oracle(some, p)) <= 2 * max(1, 1 / p)


@pytest.mark.parametrize("size", [300, 512, 513, 5000, 1 << 14])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0345258])
def test_norm_over_gaps_is_as_exact(ops, device, size, p, value):
    tensors = [torch.full((size, 2), value, device=device)[:, 0]]
    # No kernel takes them.
    for norm in (ops.norm(tensors, p), ops.norms(tensors, p)[0]):
        assert float(norm) == pytest.approx(oracle(tensors, p), rel=1e-6)


@pytest.mark.slow
@without_emulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("fill", ["random", "equal"])
def test_norm_of_a_hundred_million_elements_is_exact(device, dtype, fill):
    n = 100_000_000
    tensor = torch.rand(n) if fill == "random" else torch.full((n,), 0.1)
    tensors = [tensor.to(dtype).to(device)]
    assert ulps(_ops.norm(tensors, 2.0), oracle(tensors, 2.0)) <= 2


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("count", [40, 20_000])
def test_norm_of_finite_elements_is_finite_and_exact(ops, device, dtype, p, count):
    # Each order and dtype with each magnitude: a covering array would leave some out.
    for magnitude in (1e-44, 1e-40, 1e-30, 1e-18, 1e18, 1e19, 1e30, 3e38):
        tensors = [torch.full((count,), magnitude, dtype=dtype), torch.zeros(99, dtype=dtype)]
        expected = oracle(tensors, p)
        norm = ops.norm([t.to(device) for t in tensors], p)
        if expected > torch.finfo(torch.float32).max:
            assert norm.item() == math.inf
        else:
            assert ulps(norm, expected) <= 2


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("where", [0, 5, 40, 16_389])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norm_keeps_nan_and_inf(ops, device, dtype, p, where, bad):
    tensors = [torch.ones(16_390, dtype=dtype, device=device), torch.ones(3, device=device)]
    tensors[0][where] = bad
    norm = ops.norm(tensors, p).item()
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    tensors[1][1] = math.nan
    assert math.isnan(ops.norm(tensors, p).item())


def test_nothing_has_a_norm_of_zero_on_the_cpu_and_no_norms(ops):
    for wide, dtype in ((False, torch.float32), (True, torch.float64)):
        norm = ops.norm([], 2.0, wide)
        assert (norm.item(), norm.dtype, norm.device.type) == (0, dtype, "cpu")
        for group in (None, []):
            assert ops.norms([], 2.0, group, wide).shape == (0,)


def test_wide_norms_on_the_cpu_are_exact_to_float64(ops, dtype):
    tensors = awkward(dtype)
    (norm,) = ops.norms(tensors, 2.0, [0] * len(tensors), True)
    assert float(norm) == pytest.approx(oracle(tensors, 2.0), rel=precision(ops, 1e-14))


COEFS = [0.3, 0.0, -0.0, 1.0, 1e-5, 3.0, -1.0, math.nan]


@pytest.mark.parametrize("first", range(len(COEFS)))
@pytest.mark.parametrize("made", LISTS.values(), ids=LISTS)
def test_scale_rounds_once(ops, device, dtype, made, first):
    for by in UNITS:
        tensors, how, lists = told(made(dtype, device), by)
        tensors[3].fill_(math.nan)
        before = [[t.cpu().clone() for t in some] for some in lists]
        coefs = torch.tensor([*COEFS[first:], *COEFS[:first]] * len(lists))[: len(lists)]
        coefs = coefs.to(widest(torch.device(device)))
        ops.scale_(tensors, (coefs[0] if by == "all" else coefs).to(device), *how)
        for some, then, coef in zip(lists, before, coefs, strict=True):
            for now, old in zip(some, then, strict=True):
                wide = torch.promote_types(old.dtype, torch.float32)
                expected = (old.to(wide) * coef.to(wide)).to(old.dtype)
                if coef == 0 and coef.signbit():  # zeros, whatever the elements are
                    expected = torch.zeros_like(old)
                torch.testing.assert_close(now.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("by_row", [False, True], ids=["tensors", "rows"])
def test_groups_coefficients_and_thresholds_that_do_not_fit_raise(ops, device, by_row):
    tensors = [torch.ones(2, 3, device=device) for _ in range(3)]
    for group in [[0, 1], [0, 1, 2, 3], [0, -1, 0], *[[0, 1, 2]] * by_row]:
        with pytest.raises(ValueError, match="group"):
            ops.norms(tensors, 2.0, group, False, by_row)
        with pytest.raises(ValueError, match="group"):
            ops.scale_(tensors, torch.full((4,), 0.5), group, by_row)
    for count in (0, 2):
        with pytest.raises(ValueError, match="max_norm"):
            ops.clip_norm_(tensors, torch.ones(count, device=device), 2.0)
    with pytest.raises(ValueError, match="coef"):
        ops.scale_(tensors, torch.zeros(3 if by_row else 2), None, by_row)
    assert all(torch.equal(t.cpu(), torch.ones(2, 3)) for t in tensors)


# The last is rounded to the largest float16.
@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0, 1e9, math.inf, 65510.0])
def test_clamp_is_torchs_with_the_bound_rounded(ops, device, dtype, bound):
    tensors = awkward(dtype, device)
    tensors[3][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    expected = [t.cpu().double().clamp(-bound, bound).to(dtype) for t in tensors]
    ops.clamp_(tensors, bound)
    for now, then in zip(tensors, expected, strict=True):
        torch.testing.assert_close(now.cpu(), then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("share", [0.1, 0.999, 1.5, math.inf])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("is_known", [False, True], ids=["measured", "known"])
def test_clip_norm_is_measure_then_scale(ops, device, dtype, p, share, as_tensor, is_known):
    tensors = [*awkward(dtype, device), *layered(dtype, device)]
    norm, norms = ops.norm(tensors, p), None
    if is_known:
        norms = [ops.norms([t], p, None, True) for t in tensors[:5]]
        norms.append(ops.norms(tensors[5:], p, None, True))
        # What is not read does not count.
        tensors[-1].fill_(2.0)
    apart = [t.clone() for t in tensors]
    max_norm = float(norm) * share
    threshold = torch.tensor(max_norm, dtype=norm.dtype, device=device) if as_tensor else max_norm
    found = ops.clip_norm_(tensors, threshold, p, norms)
    assert found.dtype == norm.dtype
    assert ulps(found, float(norm)) <= 2 * is_known
    ops.scale_(apart, clip_coef(found, threshold))
    assert all(torch.equal(a, b) for a, b in zip(tensors, apart, strict=True))


@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("max_norm", "known", "then"),
    [
        (3.0, 6.0, 1.5),
        (3.0, math.inf, 0.0),
        (3.0, math.nan, math.nan),
        # An infinite threshold only measures.
        (math.inf, math.inf, 3.0),
        (math.inf, math.nan, 3.0),
    ],
)
def test_known_norms_may_be_elsewhere_and_not_finite(
    ops, device, p, as_tensor, max_norm, known, then
):
    tensors = [torch.full((4,), 3.0, device=device)]
    norms = [torch.zeros(1, dtype=widest(torch.device(device)), device=device)]
    norms.append(torch.tensor([known], dtype=torch.float64))
    limit = torch.tensor(max_norm, device=device) if as_tensor else max_norm
    norm = ops.clip_norm_(tensors, limit, p, norms)
    assert norm.device.type == torch.device(device).type
    assert float(norm) == pytest.approx(known, rel=0, nan_ok=True)
    assert tensors[0].tolist() == pytest.approx([then] * 4, rel=1e-5, nan_ok=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.clip_norm_(tensors, 3.0, 2.0, [torch.empty(1, device="meta")])


# Each with what becomes of four ones, whose norm is 2.
THRESHOLDS = [
    (-1.0, math.nan),
    (math.nan, math.nan),
    (1e-28, 5e-29),
    (1e-37, 5e-38),
    (0.5, 0.25),
    (3e38, 1.0),
    (1e39, 1.0),
    (torch.finfo(torch.float64).max, 1.0),
]


@pytest.mark.parametrize(("max_norm", "expected"), THRESHOLDS)
@pytest.mark.parametrize("kind", ["number", "0-d", "1-d", "requires grad"])
def test_any_threshold_is_taken_as_it_is(ops, device, max_norm, expected, kind):
    tensors = [torch.ones(4, device=device)]
    # Who calls an op has refused a number that is no threshold.
    if kind != "number" or not max_norm >= 0:
        shape = (1,) if kind == "1-d" else ()
        max_norm = torch.full(shape, max_norm, dtype=torch.float64)
        max_norm = max_norm.to(widest(torch.device(device))).to(device)
        max_norm.requires_grad_(kind == "requires grad")
    with torch.no_grad():
        assert float(ops.clip_norm_(tensors, max_norm, 2.0)) == 2
    assert tensors[0].tolist() == pytest.approx([expected] * 4, rel=2e-6, abs=0, nan_ok=True)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_a_coefficient_is_the_formula_where_its_constant_shows(device, as_tensor):
    norms = torch.tensor([0.0, 1e-6, 3e-6], dtype=torch.float64, device=device)
    limit = torch.tensor(1e-6, dtype=torch.float64, device=device) if as_tensor else 1e-6
    expected = torch.tensor([1.0, 1 / 2, 1 / 4], dtype=torch.float64)
    for wide, rtol in ((True, 1e-15), (False, 1e-6)):
        coefs = clip_coef(norms, limit, wide).cpu()
        torch.testing.assert_close(coefs, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("p", ORDERS)
def test_any_element_offset_gives_the_same_bits(ops, device, dtype, p):
    source = torch.randn(20_000).to(dtype)
    guard = torch.full((1,), 77.0).to(dtype)
    results = []
    for offset in range(0, 9):
        memory = guard.repeat(20_000 + 32).to(device)
        view = memory[offset : offset + 20_000].copy_(source)
        norm = ops.clip_norm_([view], 0.5, p)
        results.append((norm.cpu(), view.cpu().clone()))
        view.fill_(77.0)
        assert (memory == guard.to(device)).all()
    for result in results:
        assert all(map(torch.equal, result, results[0]))


def test_any_thread_count_gives_the_same_bits(ops, dtype):
    results, source = [], [t * 3 for _ in range(8) for t in awkward(dtype)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            tensors = [t.clone() for t in source]
            results.append([ops.clip_norm_(tensors, 1.0, p) for p in ORDERS] + tensors)
    finally:
        torch.set_num_threads(threads)
    for result in results:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("op", ["scale_", "clamp_", "clip_norm_"])
@pytest.mark.parametrize("value", [0.5, 100.0], ids=["written", "unwritten"])
def test_in_place_ops_bump_every_version(ops, device, op, value):
    tensors = [torch.ones(4, device=device), torch.ones(8, device=device)[::2]]
    many = [torch.ones(1, device=device) for _ in range(300)]
    given = {"scale_": (torch.tensor(value, device=device),), "clip_norm_": (value, 2.0)}
    for part in ([tensors[0]], tensors, many):
        before = [t._version for t in part]
        getattr(ops, op)(part, *given.get(op, (value,)))
        assert all(t._version > v for t, v in zip(part, before, strict=True))


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize(("op", "value"), [("clamp_", 1.0), ("scale_", 1.0), ("scale_", 0.5)])
def test_what_does_not_change_keeps_its_bits(device, dtype, op, value):
    # A signalling NaN that is converted and stored again is another.
    bits = torch.tensor([0x7C01 if dtype == torch.float16 else 0x7F81] + [0] * 40_000).short()
    tensor = bits.to(device, copy=True).view(dtype)
    if device == "emulated" or _ops.has_kernels(device):
        given = torch.tensor(value, device=device) if op == "scale_" else value
        getattr(_ops, op)([tensor], given)
        assert torch.equal(tensor.view(torch.int16).cpu(), bits) == (value == 1.0)


# A child for each call: what writes dies of it.
READ_ONLY = """
import ctypes, mmap, os, torch, warnings
from fastclip import _ops
warnings.simplefilter("ignore")
memory = mmap.mmap(-1, 1 << 20)
torch.frombuffer(memory, dtype=torch.float32).fill_(3.0)
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
assert ctypes.CDLL(None).mprotect(address, 1 << 20, mmap.PROT_READ) == 0
tensors = list(torch.frombuffer(memory, dtype=torch.float32).split(100_000))
one, half = torch.tensor(1.0), torch.tensor(0.5)
for call in (
    lambda: _ops.clamp_(tensors, 3.0),
    lambda: _ops.scale_(tensors, one),
    lambda: _ops.clip_norm_(tensors, 1e9, 2.0),
    lambda: _ops.clamp_(tensors, 2.9),
    lambda: _ops.scale_(tensors, half),
    lambda: _ops.clip_norm_(tensors, 1.0, 2.0),
):
    if not (child := os.fork()):
        call()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(_ops.extension is None, reason="the default of clamp_ writes")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects memory as Linux does")
def test_memory_is_written_where_something_changes_and_nowhere_else():
    done = python("-c", READ_ONLY)
    assert list(map(int, done.stdout.split())) == [0] * 3 + [-signal.SIGSEGV] * 3, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_the_defaults_split_large_tensors(device, dtype, monkeypatch):
    tensors = [*awkward(dtype, device), *layered(torch.float16, device)]
    whole = [reference.norm(tensors, p) for p in ORDERS]
    each = [reference.norms(tensors, p) for p in ORDERS]
    for name, size in {"BLOCK": 1600, "ROW": 16, "SHORT": 20}.items():
        monkeypatch.setattr(measure, name, size)
    for i, p in enumerate(ORDERS):
        assert ulps(reference.norm(tensors, p), float(whole[i])) <= 2
        for now, then in zip(reference.norms(tensors, p), each[i], strict=True):
            assert ulps(now, float(then)) <= 2
    halves = [t.clone() for t in tensors]
    rows = sum(reference.count_rows(t) for t in tensors)
    reference.scale_(halves, torch.full((rows,), 0.5, device=device), None, True)
    assert all(torch.equal(h, t * 0.5) for h, t in zip(halves, tensors, strict=True))
    reference.clamp_(halves, 0.25)
    clamped = [(t * 0.5).clamp(-0.25, 0.25) for t in tensors]
    assert all(torch.equal(h, t) for h, t in zip(halves, clamped, strict=True))


def _shared(value: torch.Tensor) -> torch.Tensor:
    """A copy that shares its memory with `value` until either is written."""
    copy = torch._lazy_clone(value)
    assert _is_shared(copy)
    return copy


_is_shared = torch._C._is_cow_tensor


@pytest.mark.parametrize("p", [2.0, 0.5])
def test_what_is_only_read_stays_shared(ops, p):
    base = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    half = torch.tensor(0.5)
    shared = [_shared(t) for t in (base, base[:, ::2], half)]
    ops.norm(shared[:2], p)
    ops.norms(shared[:2], p, None, False, True)
    ops.scale_([torch.ones(2)], shared[2])
    ops.clip_norm_([torch.ones(2)], shared[2], p)
    assert all(map(_is_shared, shared))


def test_what_is_written_is_written_alone(ops):
    base = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    kept, coefs = base.clone(), torch.tensor([1.0, 0.5])
    first, second, third, fourth = (_shared(base) for _ in range(4))
    # Each row where it belongs: by one coefficient for each tensor, for each row, for all.
    ops.scale_([first, second], coefs)
    assert torch.equal(second, kept / 2)
    ops.scale_([first], coefs, None, True)
    assert torch.equal(first, torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    # The same memory twice: a view of a tensor.
    assert ops.clip_norm_([third[0], third[1]], 1.0, 2.0) == math.sqrt(125)
    torch.testing.assert_close(third, kept / math.sqrt(125))
    ops.clamp_([fourth], 4.0)
    assert torch.equal(fourth, kept.clamp(-4, 4))
    assert torch.equal(base, kept)
