"""Finite gradients whose norm float32 does not hold, or its square float64: clipped all the same.

What is right is computed in float64, relative to the largest element.
"""

import math

import pytest
import torch
from conftest import CLIPS, ORDERS, oracle, parameters
from test_ops import told

import fastclip
from fastclip import AutoClip, _ops

LARGEST = torch.finfo(torch.float32).max
# Four elements whose norm is 4e38.
HUGE = [2e38, -2e38, 2e38, 2e38]


def assert_scaled(found, before, coef: float) -> None:
    """Within the rounding of the elements and of a float32 coefficient, which may be subnormal."""
    rounding = 2 * max(torch.finfo(found.dtype).eps, 2.0**-24) + 2.0**-149 / coef
    torch.testing.assert_close(found.double(), before.double() * coef, rtol=rounding, atol=0)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_norm", [1.0, 3e38, 1e39, 1e300])
def test_a_norm_beyond_float32_clips_by_its_coefficient(ops, device, dtype, p, max_norm):
    values = torch.linspace(2e38, 3e38, 50).to(dtype)
    norm = oracle([values], p)
    assert norm > LARGEST
    for limit in (max_norm, torch.tensor(max_norm, dtype=torch.float64, device=device)):
        tensors = [values.clone().to(device), torch.ones(5, dtype=dtype, device=device)]
        assert ops.clip_norm_(tensors, limit, p).item() == math.inf
        assert_scaled(tensors[0].cpu(), values, min(1, max_norm / norm))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_a_coefficient_is_float32s_where_float32_holds_the_norm(as_tensor):
    norms = torch.cat([torch.rand(1000) * 3, torch.tensor([LARGEST, math.inf, math.nan])])
    limit = torch.tensor(0.75) if as_tensor else 0.75
    found = _ops.clip_coef(norms.double() * (1 + 2.0**-30), limit, False)
    assert found.dtype == torch.float64
    expected = _ops.clip_coef(norms, limit).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    beyond = torch.tensor([1e39, 1e45], dtype=torch.float64)
    found = _ops.clip_coef(beyond, 1e30, False)
    torch.testing.assert_close(found, 1e30 / beyond, rtol=2e-7, atol=0)


CALLS = CLIPS | {
    "each": lambda items, n: fastclip.clip_grad_norms_(items, n)[0],
    "step": lambda items, n: fastclip.clipped_step(torch.optim.SGD(items, lr=1.0, fused=True), n),
}


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_clip_takes_a_norm_beyond_float32(call):
    (made,) = parameters([torch.tensor(HUGE)])
    norm = call([made], 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == math.inf
    assert_scaled(made.grad, torch.tensor(HUGE), 1 / 4e38)


@pytest.mark.parametrize("nonfinite", ["propagate", "keep", "error"])
def test_a_factor_brings_a_norm_back_into_range(nonfinite):
    (made,) = parameters([torch.tensor(HUGE)])
    norm = fastclip.clip_grad_norm_([made], 1.0, nonfinite=nonfinite, grad_scale=1e-20)
    assert norm.item() == pytest.approx(4e18, rel=1e-6)
    assert_scaled(made.grad, torch.tensor(HUGE), 1 / 4e38)


def test_a_norm_beyond_float32_enters_a_rule():
    (made,) = parameters([torch.tensor(HUGE)])
    rule = AutoClip(percentile=0)
    for value in ([1.0, 0.0, 0.0, 0.0], HUGE):
        made.grad.copy_(torch.tensor(value))
        fastclip.clip_grad_norm_([made], rule)
    assert_scaled(made.grad, torch.tensor(HUGE), 1 / 4e38)
    assert rule.state_dict()["norms"][:2].tolist() == pytest.approx([1.0, 4e38], rel=1e-6)


def test_units_with_norms_beyond_float32_are_clipped_adaptively():
    (made,) = parameters([torch.tensor([HUGE, [1.0, 0, 0, 0]])])
    made.data.copy_(torch.tensor([[1.0, 0, 0, 0]] * 2))
    fastclip.clip_grad_agc_([made], 0.5)
    assert_scaled(made.grad[0], torch.tensor(HUGE), 0.5 / 4e38)
    assert made.grad[1].tolist() == [0.5, 0, 0, 0]


@pytest.mark.parametrize(("max_norm", "coef"), [(1.0, 1 / 4e38), (math.inf, 2.0**-100)])
@pytest.mark.parametrize("clip", [fastclip.clipped_step, fastclip.unscale_and_clip_])
def test_a_scaler_takes_the_step(clip, max_norm, coef):
    (made,) = parameters([torch.tensor(HUGE)])
    optimizer = torch.optim.SGD([made], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    scaler.scale(torch.ones(()))
    norm = clip(optimizer, max_norm, scaler)
    assert norm.item() == pytest.approx(4e38 / 2.0**100, rel=1e-6)
    if clip is fastclip.unscale_and_clip_:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**100
    assert_scaled(made.detach(), -torch.tensor(HUGE), coef)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("size", [(3,), (40_000,), (5, 9), (2, 20_000)])
def test_squares_beyond_float64_have_a_norm_on_the_cpu(ops, p, size):
    tensors = [torch.randn(size, dtype=torch.float64) * 1e200, torch.randn(7), torch.randn(9, 2)]
    norm = oracle(tensors, p)
    assert ops.norm(tensors, p).item() == pytest.approx(norm, rel=1e-13)
    # The default op measures all, also the float32 ones, once a square is beyond float64.
    close = {"rel": 1e-13 if p == math.inf else 1e-6}
    for by in ("each", "groups", "row"):
        _, (group, by_row), lists = told(tensors, by)
        found = ops.norms(tensors, p, group, True, by_row).tolist()
        assert found == pytest.approx([oracle(some, p) for some in lists], **close)
    before = [t.clone() for t in tensors]
    assert ops.clip_norm_(tensors, 3.0, p).item() == pytest.approx(norm, **close)
    torch.testing.assert_close(tensors[0], before[0] * (3.0 / norm), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_squares_beyond_float64_hide_no_infinity(ops, bad):
    tensors = [torch.full((40_000,), 1e200, dtype=torch.float64) for _ in range(2)]
    tensors[0][[5, 20_000]] = bad
    for norms in (ops.norm(tensors, 2.0), ops.norms(tensors, 2.0)[0]):
        assert str(norms.item()) == str(bad)
    assert ops.norms(tensors, 2.0)[1].item() == pytest.approx(2e202, rel=1e-13)
