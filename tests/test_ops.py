"""The five ops against a float64 oracle, on awkward lists, and the laws they keep."""

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ORDERS, awkward, name_of, oracle, precision, ulps

from fastclip import _ops
from fastclip._ops import measure, reference
from fastclip._ops.coef import clip_coef
from fastclip._ops.measure import widest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("p", ORDERS)
def test_norm_matches_the_oracle(ops, device, dtype, p):
    tensors = awkward(dtype, device)
    norm = ops.norm(tensors, p)
    assert norm.shape == ()
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.device.type == device
    assert ulps(norm, oracle(tensors, p)) <= 2


@pytest.mark.parametrize("shape", [(5,), (512,), (513,), (40_000,), (1, 700), (5, 4)])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_what_is_measured_stays_as_it_is(ops, device, dtype, shape, p):
    tensor = torch.randn(shape, device=device).to(dtype)
    before = tensor.clone()
    ops.norm([tensor], p)
    ops.norms([tensor], p)
    ops.norms([tensor], p, None, False, True)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("size", [300, 512, 513, 5000])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("value", [0.1, 1 / 3])
def test_norm_over_gaps_is_as_exact(ops, device, size, p, value):
    tensors = [torch.full((size, 2), value, device=device)[:, 0]]
    # No kernel takes them.
    for norm in (ops.norm(tensors, p), ops.norms(tensors, p)[0]):
        assert float(norm) == pytest.approx(oracle(tensors, p), rel=1e-6)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0])
def test_norm_of_equal_elements_has_no_systematic_error(ops, device, dtype, p, value):
    tensors = [torch.full((50_000,), value, dtype=dtype, device=device)]
    assert ulps(ops.norm(tensors, p), oracle(tensors, p)) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("fill", ["random", "equal"])
def test_norm_of_a_hundred_million_elements_is_exact(device, dtype, fill):
    n = 100_000_000
    tensor = torch.rand(n) if fill == "random" else torch.full((n,), 0.1)
    tensors = [tensor.to(dtype).to(device)]
    assert ulps(_ops.norm(tensors, 2.0), oracle(tensors, 2.0)) <= 2


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("magnitude", [1e-44, 1e-30, 1e-18, 1e18, 3e38])
def test_norm_of_finite_elements_is_finite_and_exact(ops, device, p, magnitude):
    tensors = [torch.full((40,), magnitude, device=device), torch.zeros(99, device=device)]
    expected = oracle(tensors, p)
    if expected > torch.finfo(torch.float32).max:
        assert ops.norm(tensors, p).item() == math.inf
    else:
        assert ulps(ops.norm(tensors, p), expected) <= 2


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_bfloat16_norm_is_exact_where_float32_squares_are_not(ops, device, p):
    # Not parameters: of their product with `ops` and `p` some cases would be left out.
    for magnitude in (1e-40, 1e-30, 1e-18, 1e19, 1e30):
        tensors = [torch.full((20_000,), magnitude, dtype=torch.bfloat16, device=device)]
        assert ulps(ops.norm(tensors, p), oracle(tensors, p)) <= 2


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


@pytest.mark.parametrize("p", ORDERS)
def test_norm_of_mixed_dtypes_is_one_norm(ops, device, p):
    tensors = [
        t for d in (torch.bfloat16, torch.float32, torch.float16) for t in awkward(d, device)
    ]
    norm = ops.norm(tensors, p)
    assert norm.dtype == torch.float32
    assert ulps(norm, oracle(tensors, p)) <= 2


def test_norm_with_a_float64_is_a_float64(ops, device):
    tensors = [torch.ones(7, dtype=d, device=device) for d in (torch.bfloat16, torch.float64)]
    assert ops.norm(tensors, 2.0).dtype == torch.float64


def test_norm_of_many_tensors_matches_the_oracle(ops, device):
    tensors = list(torch.randn(10_000, 7, device=device).unbind())
    assert ulps(ops.norm(tensors, 2.0), oracle(tensors, 2.0)) <= 2


@pytest.mark.parametrize("p", [0.0, -1.0, -2.5, -math.inf])
def test_norm_of_other_orders_is_torchs(ops, device, p):
    tensors = [torch.rand(50, device=device) + 0.5, torch.rand(3, 4, device=device) + 0.5]
    expected = torch.nn.utils.get_total_norm(tensors, p)
    torch.testing.assert_close(ops.norm(tensors, p), expected)


def test_norm_of_nothing_is_a_cpu_zero(ops):
    norm = ops.norm([], 2.0)
    assert norm.item() == 0
    assert norm.device.type == "cpu"


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("group", [None, [0] * 11, [1, 0, 3, 3, 0, 1, 1, 5, 0, 3, 5]])
def test_norms_are_the_norms_of_their_groups(ops, device, dtype, p, group):
    tensors = awkward(dtype, device)
    slots = range(len(tensors)) if group is None else group
    norms = ops.norms(tensors, p, group)
    wide = ops.norms(tensors, p, group, True)
    assert norms.shape == (max(slots) + 1,)
    assert wide.dtype == widest(torch.device(device))
    assert torch.equal(wide.to(norms.dtype), norms)
    for g, norm in enumerate(norms):
        members = [t for t, slot in zip(tensors, slots, strict=True) if slot == g]
        assert ulps(norm, oracle(members, p)) <= 2


def test_wide_norms_on_the_cpu_are_exact_to_float64(ops, dtype):
    tensors = awkward(dtype)
    (norm,) = ops.norms(tensors, 2.0, [0] * len(tensors), True)
    assert float(norm) == pytest.approx(oracle(tensors, 2.0), rel=precision(ops, 1e-14))


def test_norms_of_one_group_are_the_norm(ops, device, dtype):
    tensors = awkward(dtype, device)
    (norm,), expected = ops.norms(tensors, 2.0, [0] * len(tensors)), ops.norm(tensors, 2.0)
    # The default sums in another order.
    assert ulps(norm, float(expected)) <= (ops is reference)


def test_groups_of_many_tensors_are_kept_apart(ops, device):
    # More tiles than there can be spans: a span holds several tensors, all of one group.
    count = 5000
    tensors = list(torch.randn(count, 3, device=device).unbind())
    group = [(i // 3) % 7 for i in range(count)]
    each = torch.stack(tensors).cpu().double().norm(dim=1)
    torch.testing.assert_close(ops.norms(tensors, 2.0).cpu().double(), each, rtol=1e-6, atol=0)
    squares = torch.zeros(7).double().index_add_(0, torch.tensor(group), each.square())
    found = ops.norms(tensors, 2.0, group).cpu().double()
    torch.testing.assert_close(found, squares.sqrt(), rtol=1e-6, atol=0)
    before = torch.stack(tensors)
    coef = torch.arange(count, device=device) / count
    ops.scale_(tensors, coef)
    assert torch.equal(torch.stack(tensors), before * coef.unsqueeze(1))


def test_norms_of_nothing_are_empty(ops):
    assert ops.norms([], 2.0).shape == (0,)
    assert ops.norms([], 2.0, []).shape == (0,)


@pytest.mark.parametrize("coef", [0.3, 0.0, 1e-5, 3.0, -1.0, math.nan])
def test_scale_rounds_once(ops, device, dtype, coef):
    tensors = awkward(dtype, device)
    before = [t.clone() for t in tensors]
    coef = torch.tensor(coef, dtype=widest(torch.device(device)), device=device)
    ops.scale_(tensors, coef)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for now, then in zip(tensors, before, strict=True):
        expected = (then.to(wide) * coef.to(wide)).to(dtype)
        torch.testing.assert_close(now, expected, rtol=0, atol=0, equal_nan=True)


def test_scale_of_one_writes_nothing(ops, device, dtype):
    tensors = awkward(dtype, device)
    tensors[4].fill_(math.nan)
    before = [t.clone() for t in tensors]
    ops.scale_(tensors, torch.tensor(1.0, device=device))
    for now, then in zip(tensors, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", [None, [0, 2, 1]])
def test_scale_takes_a_coefficient_per_group(ops, device, group):
    tensors = [torch.ones(5, device=device) for _ in range(3)]
    ops.scale_(tensors, torch.tensor([0.5, 1.0, 0.25], device=device), group)
    expected = [0.5, 1.0, 0.25] if group is None else [0.5, 0.25, 1.0]
    assert [float(t[0]) for t in tensors] == expected


def layered(dtype, device):
    """Rows of memory and none: transposed, channels last, with gaps, empty, longer than a tile."""
    images = torch.randn(6, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    made = [torch.randn(4, 7), torch.randn(33), images, torch.randn(9, 0), torch.randn(0, 3)]
    made += [
        torch.randn(5, 8).t(),
        torch.randn(6, 10)[:, ::2],
        torch.randn(3, 40000),
        torch.ones(()),
    ]
    return [(t * (1 + i)).to(device=device, dtype=dtype) for i, t in enumerate(made)]


def rows_of(tensors):
    return [r for t in tensors for r in (t.unbind() if t.dim() > 1 else [t])]


@pytest.mark.parametrize("last", [5, 9], ids=["dense", "any"])
@pytest.mark.parametrize("p", ORDERS)
def test_norms_of_rows_are_the_norms_of_slices(ops, device, dtype, p, last):
    tensors = layered(dtype, device)[:last]
    norms = ops.norms(tensors, p, None, False, True)
    assert len(norms) == len(rows_of(tensors))
    for norm, row in zip(norms, rows_of(tensors), strict=True):
        assert ulps(norm, oracle([row], p)) <= 2


@pytest.mark.parametrize("last", [5, 9], ids=["dense", "any"])
def test_rows_are_scaled_by_their_own_coefficients(ops, device, dtype, last):
    tensors = layered(dtype, device)[:last]
    rows = rows_of(tensors)
    coefs = torch.rand(len(rows), device=device)
    coefs[0], coefs[1], coefs[2], coefs[5] = 1, -0.0, 2, math.nan
    wide = torch.promote_types(dtype, torch.float32)
    expected = [(row.to(wide) * c.to(wide)).to(dtype) for row, c in zip(rows, coefs, strict=True)]
    expected[1] = torch.zeros_like(expected[1])
    ops.scale_(tensors, coefs, None, True)
    for row, value in zip(rows_of(tensors), expected, strict=True):
        torch.testing.assert_close(row, value, rtol=0, atol=0, equal_nan=True)


def test_rows_that_do_not_fit_raise(ops):
    tensors = [torch.ones(2, 3)]
    with pytest.raises(ValueError, match="group"):
        ops.norms(tensors, 2.0, [0], False, True)
    with pytest.raises(ValueError, match="group"):
        ops.scale_(tensors, torch.ones(2), [0], True)
    with pytest.raises(ValueError, match="coef"):
        ops.scale_(tensors, torch.zeros(1), None, True)
    assert torch.equal(tensors[0], torch.ones(2, 3))


@pytest.mark.parametrize("group", [[0, 1], [0, 1, 2, 3], [0, -1, 0]])
def test_groups_that_do_not_fit_raise(ops, group):
    tensors = [torch.ones(2) for _ in range(3)]
    with pytest.raises(ValueError, match="group"):
        ops.norms(tensors, 2.0, group)
    with pytest.raises(ValueError, match="group"):
        ops.scale_(tensors, torch.ones(4) * 0.5, group)
    with pytest.raises(ValueError, match="coef"):
        ops.scale_(tensors, torch.ones(2) * 0.5)
    assert all(torch.equal(t, torch.ones(2)) for t in tensors)


@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0, 1e9, math.inf])
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
def test_clip_norm_is_measure_then_scale(ops, device, dtype, p, share, as_tensor):
    tensors = awkward(dtype, device)
    apart = [t.clone() for t in tensors]
    norm = ops.norm(apart, p)
    max_norm = float(norm) * share
    ops.scale_(apart, clip_coef(norm, max_norm))
    threshold = torch.tensor(max_norm, dtype=norm.dtype, device=device) if as_tensor else max_norm
    assert torch.equal(ops.clip_norm_(tensors, threshold, p), norm)
    assert all(torch.equal(a, b) for a, b in zip(tensors, apart, strict=True))


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("share", [0.1, 1.5])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_a_clip_by_known_norms_reads_nothing_else(ops, device, dtype, p, share, as_tensor):
    tensors = awkward(dtype, device)
    expected = oracle(tensors, p)
    norms = [ops.norms([t], p, None, True) for t in tensors[:5]]
    norms.append(ops.norms(tensors[5:], p, None, True))
    # What is not read does not count.
    tensors[-1].fill_(2.0)
    before = [t.clone() for t in tensors]
    max_norm = expected * share
    threshold = torch.tensor(max_norm, device=device) if as_tensor else max_norm
    norm = ops.clip_norm_(tensors, threshold, p, norms)
    assert ulps(norm, expected) <= 2
    assert norm.dtype == reference.result_dtype(tensors)
    ops.scale_(before, clip_coef(norm, threshold))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_known_norms_may_be_elsewhere(ops, device):
    tensors = [torch.full((4,), 3.0, device=device)]
    norm = ops.clip_norm_(tensors, 3.0, 2.0, [torch.tensor([6.0], dtype=torch.float64)])
    assert norm.device.type == torch.device(device).type
    assert float(norm) == 6
    torch.testing.assert_close(tensors[0].cpu(), torch.full((4,), 1.5))
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.clip_norm_(tensors, 3.0, 2.0, [torch.empty(1, device="meta")])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_a_known_norm_that_is_not_finite_spoils_all(ops, device, p, bad):
    tensors = [torch.ones(3, device=device), torch.ones(5, device=device)]
    wide = widest(torch.device(device))
    norms = [torch.tensor([value], dtype=wide, device=device) for value in (1.0, bad)]
    norm = ops.clip_norm_(tensors, 1.0, p, norms)
    torch.testing.assert_close(norm.cpu(), torch.tensor(bad), equal_nan=True)
    assert (tensors[0] == 0).all() if bad == math.inf else tensors[0].isnan().all()


def test_clip_norm_is_within_the_threshold_and_idempotent(ops, device, dtype):
    tensors = awkward(dtype, device)
    ops.clip_norm_(tensors, 1.0, 2.0)
    once = [t.clone() for t in tensors]
    # The 1e-6 in the coefficient makes a second clip at the same threshold scale by 1 - 1e-6.
    slack = 1 + 4e-6 + torch.finfo(dtype).eps
    norm = ops.clip_norm_(tensors, slack, 2.0)
    assert norm <= slack
    assert all(torch.equal(a, b) for a, b in zip(tensors, once, strict=True))


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_threshold_tensor_that_is_none_gives_nan(ops, device, max_norm):
    tensors = [torch.ones(3, device=device)]
    ops.clip_norm_(tensors, torch.tensor(max_norm, device=device), 2.0)
    assert tensors[0].isnan().all()


def test_norm_doubles_with_its_tensors(ops, device, dtype):
    tensors = awkward(dtype, device)
    norm = ops.norm(tensors, 2.0)
    assert ops.norm([t * 2 for t in tensors], 2.0) == norm * 2


@pytest.mark.parametrize("p", ORDERS)
def test_norm_does_not_depend_on_the_order(ops, device, dtype, p):
    tensors = awkward(dtype, device)
    assert ulps(ops.norm(tensors[::-1], p), oracle(tensors, p)) <= 2


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
    for norm, view in results:
        assert torch.equal(norm, results[0][0])
        assert torch.equal(view, results[0][1])


def test_any_thread_count_gives_the_same_bits(ops, dtype):
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            tensors = [t * 3 for _ in range(8) for t in _seeded(dtype)]
            results.append([ops.clip_norm_(tensors, 1.0, p) for p in ORDERS] + tensors)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def _seeded(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return awkward(dtype)


def _layouts(dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    base = torch.randn(6, 8, 10, 12).to(dtype).to(device)
    return {
        "transposed": base.transpose(0, 3).clone(memory_format=torch.preserve_format),
        "channels_last": base.clone(memory_format=torch.channels_last),
        "gaps": base[:, ::2, 1:7],
        "flipped": base.permute(2, 0, 3, 1)[1:],
    }


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gaps", "flipped"])
def test_layouts_are_clipped_with_strides_kept(ops, device, dtype, layout):
    tensor = _layouts(dtype, device)[layout]
    strides, flat = tensor.stride(), tensor.contiguous().clone()
    others = [torch.ones(3, dtype=dtype, device=device)]
    norm = ops.clip_norm_([tensor, *others], 1.0, 2.0)
    expected = ops.clip_norm_([flat, torch.ones(3, dtype=dtype, device=device)], 1.0, 2.0)
    assert ulps(norm, float(expected)) <= 1
    assert tensor.stride() == strides
    torch.testing.assert_close(tensor.contiguous(), flat)


@pytest.mark.parametrize("op", ["scale_", "clamp_", "clip_norm_"])
@pytest.mark.parametrize("strength", ["written", "unwritten"])
def test_in_place_ops_bump_every_version(ops, device, op, strength):
    tensors = [torch.ones(4, device=device), torch.ones(8, device=device)[::2]]
    many = [torch.ones(1, device=device) for _ in range(300)]
    for part in ([tensors[0]], tensors, many):
        before = [t._version for t in part]
        value = 0.5 if strength == "written" else 100.0
        if op == "scale_":
            ops.scale_(part, torch.tensor(value, device=device))
        elif op == "clamp_":
            ops.clamp_(part, value)
        else:
            ops.clip_norm_(part, value, 2.0)
        assert all(t._version > v for t, v in zip(part, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_clamp_leaves_the_bits_of_what_is_within(device, dtype):
    # A signalling NaN that is converted and stored again is another.
    bits = torch.tensor([0x7C01 if dtype == torch.float16 else 0x7F81] + [0] * 40_000).short()
    tensor = bits.to(device).view(dtype)
    if device == "emulated" or _ops.has_kernels(device):
        _ops.clamp_([tensor], 1.0)
        assert torch.equal(tensor.view(torch.int16).cpu(), bits)


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
    command = [sys.executable, "-c", READ_ONLY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert list(map(int, done.stdout.split())) == [0] * 3 + [-signal.SIGSEGV] * 3, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_the_defaults_split_large_tensors(device, dtype, monkeypatch):
    tensors = [*awkward(dtype, device), *_layouts(torch.float16, device).values()]
    whole = [reference.norm(tensors, p) for p in ORDERS]
    each = [reference.norms(tensors, p) for p in ORDERS]
    sizes = {"BLOCK": 160, "ROW": 16, "SHORT": 20}
    for name, size in sizes.items():
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


@pytest.mark.parametrize("count", [0, 2])
def test_a_threshold_tensor_is_one_number(ops, device, count):
    tensors = [torch.ones(3, device=device)]
    with pytest.raises(ValueError, match="max_norm"):
        ops.clip_norm_(tensors, torch.ones(count, device=device), 2.0)
    assert torch.equal(tensors[0].cpu(), torch.ones(3))


def test_a_threshold_of_one_element_or_one_that_is_tiny_clips(ops, device):
    for max_norm in (torch.tensor([0.5], device=device), torch.tensor([0.5], requires_grad=True)):
        tensors = [torch.ones(4, device=device)]
        with torch.no_grad():
            ops.clip_norm_(tensors, max_norm, 2.0)
        assert tensors[0].tolist() == pytest.approx([0.25] * 4)
    for max_norm in (1e-28, 1e-32, 1e-37):
        tensors = [torch.ones(4, device=device)]
        ops.clip_norm_(tensors, max_norm, 2.0)
        assert tensors[0].tolist() == pytest.approx([max_norm / 2] * 4)


@pytest.mark.parametrize("max_norm", [1e39, torch.finfo(torch.float64).max])
def test_a_threshold_beyond_float32_only_measures(ops, device, max_norm):
    tensors = [torch.ones(4, device=device)]
    assert float(ops.clip_norm_(tensors, max_norm, 2.0)) == 2
    assert float(clip_coef(torch.tensor(2.0, device=device), max_norm)) == 1
    assert torch.equal(tensors[0].cpu(), torch.ones(4))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_a_coefficient_is_the_formula_where_its_constant_shows(device, as_tensor):
    norms = torch.tensor([0.0, 1e-6, 3e-6], dtype=torch.float64, device=device)
    limit = torch.tensor(1e-6, dtype=torch.float64, device=device) if as_tensor else 1e-6
    expected = torch.tensor([1.0, 1 / 2, 1 / 4], dtype=torch.float64)
    for wide, rtol in ((True, 1e-15), (False, 1e-6)):
        coefs = clip_coef(norms, limit, wide).cpu()
        torch.testing.assert_close(coefs, expected, rtol=rtol, atol=0)


def test_a_bound_is_rounded_to_the_largest_float16(ops, device):
    tensors = [torch.tensor([math.inf, -math.inf, 1.0], dtype=torch.float16, device=device)]
    ops.clamp_(tensors, 65510.0)
    assert tensors[0].tolist() == [65504.0, -65504.0, 1.0]


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
    kept = base.clone()
    # Each row where it belongs: by one coefficient for each tensor, for each row, for all.
    first, second = _shared(base), _shared(base)
    ops.scale_([first, second], torch.tensor([1.0, 0.5]))
    assert torch.equal(second, kept / 2)
    ops.scale_([first], torch.tensor([1.0, 0.5]), None, True)
    assert torch.equal(first, torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    third = _shared(base)
    # The same memory twice: a view of a tensor.
    assert ops.clip_norm_([third[0], third[1]], 1.0, 2.0) == math.sqrt(125)
    torch.testing.assert_close(third, kept / math.sqrt(125))
    fourth = _shared(base)
    ops.clamp_([fourth], 4.0)
    assert torch.equal(fourth, kept.clamp(-4, 4))
    assert torch.equal(base, kept)
