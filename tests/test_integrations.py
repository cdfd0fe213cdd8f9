"""Functions by the signatures of other libraries, against what those promise."""

import math

import pytest
import torch
from conftest import DTYPES, name_of, oracle, ulps

from fastclip.integrations import apex, megatron


def flag() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_apexs_norm_is_that_of_all_tensors(dtype):
    tensors = [torch.randn(5, dtype=dtype), torch.randn(2, 3), torch.randn(0)]
    noop = flag()
    norm, each = apex.multi_tensor_applier(apex.multi_tensor_l2norm, noop, [tensors], False)
    assert (norm.dtype, norm.shape, each.shape) == (torch.float32, (1,), (0,))
    assert ulps(norm[0], oracle(tensors, 2.0)) <= 2
    norm, each = apex.multi_tensor_applier(apex.multi_tensor_l2norm, noop, [tensors], True)
    assert (each.dtype, each.shape) == (torch.float32, (3,))
    for one, tensor in zip(each, tensors, strict=True):
        assert ulps(one, oracle([tensor], 2.0)) <= 2
    assert noop.item() == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_apexs_flag_tells_what_is_not_finite(bad):
    tensors = [torch.ones(3), torch.tensor([1.0, bad])]
    noop = flag()
    norm, _ = apex.multi_tensor_l2norm(65536, noop, [tensors])
    assert not norm.isfinite().any()
    assert noop.item() == 1
    apex.multi_tensor_scale(65536, other := flag(), [tensors, tensors], 0.5)
    assert other.item() == 1
    apex.multi_tensor_scale(65536, noop, [[torch.ones(1)], [torch.ones(1)]], 0.5)
    assert noop.item() == 1


@pytest.mark.parametrize("scale", [0.25, 1.0, 1 / 3, 8.0])
@pytest.mark.parametrize("source", DTYPES, ids=name_of)
@pytest.mark.parametrize("out", [None, *DTYPES], ids=lambda d: "in place" if d is None else str(d))
def test_apexs_scaling_rounds_once(source, out, scale):
    tensors = [torch.randn(7, dtype=source), torch.randn(2, 3, dtype=source)]
    outs = tensors if out is None else [torch.full(t.shape, 9, dtype=out) for t in tensors]
    before = [t.double() * scale for t in tensors]
    noop = flag()
    assert apex.multi_tensor_applier(apex.multi_tensor_scale, noop, [tensors, outs], scale) is None
    for now, exact in zip(outs, before, strict=True):
        # Half of a unit in the last place, and what the float32 product is off.
        close = (now.double() - exact).abs() <= (
            0.5 * torch.finfo(now.dtype).eps + 1e-7
        ) * exact.abs()
        assert close.all()
    assert noop.item() == 0


def test_bad_lists_change_nothing():
    one, two = [torch.ones(1)], [torch.ones(1), torch.ones(1)]
    with pytest.raises(ValueError, match="expected two of one length, got 1 and 2 tensors"):
        apex.multi_tensor_scale(65536, flag(), [one, two], 0.5)
    with pytest.raises(TypeError, match=r"tensors\[0\]: dtype torch.int64"):
        apex.multi_tensor_l2norm(65536, flag(), [[torch.ones(1, dtype=torch.int64)]])
    mixed = [torch.ones(1), torch.ones(1, dtype=torch.int64)]
    with pytest.raises(TypeError, match=r"tensors\[1\]: dtype torch.int64"):
        apex.multi_tensor_scale(65536, flag(), [mixed, mixed], 0.5)
    assert mixed[0].item() == one[0].item() == two[0].item() == 1


@pytest.mark.parametrize("function", [apex.multi_tensor_scale, megatron.multi_tensor_scale])
@pytest.mark.parametrize(
    ("source", "out", "error", "told"),
    [
        (torch.ones(3), torch.zeros(4), ValueError, r"tensor_lists\[1\]\[1\]: .* got \(4,\)"),
        (
            torch.ones(3),
            torch.zeros(1, 3),
            ValueError,
            r"tensor_lists\[1\]\[1\]: expected the shape",
        ),
        (
            torch.ones(1, dtype=torch.complex64),
            torch.zeros(1),
            ValueError,
            "of torch.complex64, got",
        ),
        (torch.ones(3), torch.zeros(3, dtype=torch.int32), TypeError, "dtype torch.int32"),
        (torch.ones(3, dtype=torch.int32), torch.zeros(3), TypeError, "dtype torch.int32"),
    ],
)
def test_all_pairs_are_looked_at_before_one_is_written(function, source, out, error, told):
    first, noop = torch.zeros(2), flag()
    with pytest.raises(error, match=told):
        function(65536, noop, [[torch.ones(2), source], [first, out]], 0.5)
    assert not first.any()
    assert not out.any()
    assert noop.item() == 0
