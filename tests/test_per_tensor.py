"""Per-tensor, unit-wise and normalising functions against their formulas in float64."""

import math

import pytest
import torch
from conftest import ORDERS, awkward, oracle, parameters, ulps, without_emulation
from torch import nn

import fastclip
from fastclip import _ops
from fastclip._gradients import local


def units(tensor):
    return tensor.unbind() if tensor.dim() > 1 else [tensor]


def weighted(grads):
    """Parameters with random weights, some of them 0, and these gradients."""
    made = parameters(grads)
    for i, parameter in enumerate(made):
        parameter.data = torch.randn(parameter.shape).to(parameter) * (i % 3)
    return made


def assert_near(found, exact):
    """Within the roundings of a coefficient and of an element."""
    info = torch.finfo(found.dtype)
    close = {"rtol": 4 * max(info.eps, 1e-13), "atol": info.smallest_normal, "equal_nan": True}
    torch.testing.assert_close(found.cpu().to_dense().double(), exact, **close)


def layers(dtype, device="cpu"):
    shapes = [(8, 5), (8,), (6, 3, 3, 3), (), (7, 40000), (0, 4), (4, 0), (1, 9)]
    made = [(torch.randn(shape) * 0.1 * (i + 1)).to(dtype) for i, shape in enumerate(shapes)]
    made[0][1] = 0.0
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    made.append(torch.randn(5, 8).to(dtype).t())
    return [tensor.to(device) for tensor in made]


@pytest.mark.parametrize("p", ORDERS)
def test_each_tensor_is_clipped_by_its_own_norm(reader, device, dtype, p):
    grads = awkward(dtype, device)
    made = parameters(grads)
    norms = fastclip.clip_grad_norms_(made, 5.0, p)
    for parameter, grad, norm in zip(made, grads, norms, strict=True):
        expected = oracle([grad], p)
        assert ulps(norm, expected) <= 2
        assert expected > 5 or torch.equal(parameter.grad, grad)
        assert_near(parameter.grad, grad.cpu().double() * min(1, 5 / (expected + 1e-6)))


@pytest.mark.parametrize("bad", [1.0, math.inf, math.nan])
def test_each_gradient_has_a_norm_and_a_threshold_of_its_own(reader, device, bad):
    values = [[3.0, 4.0], [6.0, 8.0], [0.3, 0.4], [bad, 0.0], [1.0]]
    made = parameters([torch.tensor(v, device=device) for v in values])
    made[4].grad = None
    items = [made[0], made[4], made[1], made[2], made[0], made[3]]
    limits = torch.tensor([1.0, 9.0, 2.0, math.inf, 7.0, 0.5], dtype=torch.float64)
    norms = fastclip.clip_grad_norms_(iter(items), limits)
    assert norms.tolist() == pytest.approx([5.0, 0.0, 10.0, 0.5, 0.0, bad], nan_ok=True)
    after = [float(torch.linalg.vector_norm(one.grad.cpu())) for one in made[:4]]
    assert after == pytest.approx([1, 2, 0.5, 0.5 if bad == 1 else math.nan], nan_ok=True)
    for wrong in (limits[:4], limits.repeat(2), limits[:, None], -1.0):
        with pytest.raises(ValueError, match="max_norm"):
            fastclip.clip_grad_norms_(items, wrong)
    assert fastclip.clip_grad_norms_(made[:1], torch.tensor([1.0])).shape == (1,)
    assert fastclip.clip_grad_norms_([], 1.0).shape == (0,)


def agc(weight, grad, clip_factor, eps):
    """Brock et al. 2021, equation 3, unit by unit in float64."""
    found = grad.double().clone()
    for w, g, out in zip(units(weight), units(grad), units(found), strict=True):
        limit = clip_factor * max(float(w.double().norm()), eps)
        if float(g.double().norm()) > limit:
            out.copy_(g.double() / g.double().norm() * limit)
    return found


def test_adaptive_clipping_is_the_papers_formula(reader, device, dtype):
    grads = layers(dtype, device)
    made = weighted(grads)
    # One is given twice, and one has no gradient.
    items = [*made, made[0], nn.Parameter(made[0].detach())]
    fastclip.clip_grad_agc_(items, 0.1)
    for parameter, grad in zip(made, grads, strict=True):
        assert_near(parameter.grad, agc(parameter.detach().cpu(), grad.cpu(), 0.1, 1e-3))
    once = [parameter.grad.clone() for parameter in made]
    fastclip.clip_grad_agc_(items, 0.1 + (1e-12 if dtype == torch.float64 else 1e-3))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(made, once, strict=True))
    fastclip.clip_grad_agc_(items, 0.0)
    assert not any(parameter.grad.any() for parameter in made)
    fastclip.clip_grad_agc_([], 0.1)


@without_emulation
def test_complex_and_sparse_gradients_are_clipped_by_their_own_norms(reader, device):
    grads = [torch.tensor([3.0, 4j]), torch.sparse_coo_tensor([[1, 1]], [3.0, 1.0], (4,))]
    made = parameters([grad.to(device) for grad in grads])
    assert fastclip.clip_grad_norms_(made, 1.0).tolist() == [5.0, 4.0]
    torch.testing.assert_close(made[0].grad.cpu(), torch.tensor([0.6, 0.8j]))
    assert float(made[1].grad.coalesce().values()) == pytest.approx(1.0)
    fastclip.clip_grad_agc_(made[:1], 0.5, eps=1.0)
    made[1] = nn.Parameter(torch.zeros(2, 1, device=device))
    made[1].grad = torch.ones(2, 1, device=device).to_sparse()
    with pytest.raises(TypeError, match=r"sparse_coo.*not stored by rows"):
        fastclip.clip_grad_agc_(made, 0.1)
    torch.testing.assert_close(made[0].grad.cpu(), torch.tensor([0.3, 0.4j]))


@pytest.mark.parametrize("coalesced", [True, False])
def test_rows_that_a_sparse_gradient_has_are_clipped(reader, coalesced):
    indices = torch.tensor([[4, 1, 4, 0]])
    sparse = torch.sparse_coo_tensor(indices, torch.randn(4, 3), (6, 3), check_invariants=True)
    bias = torch.sparse_coo_tensor([[1]], [8.0], (4,), check_invariants=True)
    grads = [torch.randn(2, 3), sparse.coalesce() if coalesced else sparse, bias]
    made = [nn.Parameter(torch.randn(grad.shape)) for grad in grads]
    for parameter, grad in zip(made, grads, strict=True):
        # A row that stays as it is.
        parameter.data[: parameter.dim() - 1] = 1e3
        parameter.grad = grad.clone()
    fastclip.clip_grad_agc_(made, 0.1)
    for parameter, grad in zip(made, grads, strict=True):
        assert parameter.grad.is_sparse == grad.is_sparse
        assert_near(parameter.grad, agc(parameter.detach(), grad.to_dense(), 0.1, 1e-3))


def test_a_weight_without_a_norm_is_named_where_it_stands(reader):
    none, good = parameters([None, torch.ones(3)])
    bad = nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn))
    bad.grad_dtype = torch.float32
    bad.grad = torch.ones(2, 2)
    with pytest.raises(TypeError, match=r"the weight parameters\[3\]: dtype torch.float8_e4m3fn"):
        fastclip.clip_grad_agc_([none, good, good, bad], 0.1)
    assert torch.equal(good.grad, torch.ones(3))


@pytest.mark.parametrize("wanted", [0.0, 1e-3, 1.0, 300.0])
def test_normalised_gradients_have_the_norm_from_either_side(reader, device, dtype, wanted):
    grads = awkward(dtype, device)
    made = parameters(grads)
    norm = fastclip.normalize_grad_(made, wanted)
    assert ulps(norm, oracle(grads, 2.0)) <= 2
    found = oracle([p.grad for p in made], 2.0)
    tolerance = 0.02 if dtype is torch.float16 and wanted == 1e-3 else 4 * torch.finfo(dtype).eps
    assert found == pytest.approx(wanted, rel=max(tolerance, 1e-6))


def test_gradients_of_zeros_and_of_subnormals_are_normalised_without_nan(reader):
    (made,) = parameters([torch.zeros(2)])
    for wanted in (1.0, 0.0):
        assert float(fastclip.normalize_grad_([made], wanted)) == 0
        assert not made.grad.any()
    made.grad[0] = 1e-40
    fastclip.normalize_grad_([made])
    assert 0 < float(made.grad[0]) <= 1
    assert float(made.grad[1]) == 0


def test_several_devices_have_their_own_norms(monkeypatch):
    # One CPU stands for two devices: every list that is not empty is on both.
    def by_device(tensors):
        places = [*range(len(tensors))]
        return {"cpu": places[::2], "cpu:0": places[1::2]}

    monkeypatch.setattr(_ops, "extension", None)
    monkeypatch.setattr(local, "_by_device", by_device)
    monkeypatch.setattr(local, "_are_on_several_devices", bool)
    test_each_tensor_is_clipped_by_its_own_norm(None, "cpu", torch.float32, 2.0)
    test_adaptive_clipping_is_the_papers_formula(None, "cpu", torch.float32)
