"""Per-tensor, unit-wise and normalising functions against their formulas in float64."""

import math

import pytest
import torch
from conftest import ORDERS, awkward, oracle, parameters, ulps, without_emulation
from torch import nn

import fastclip
from fastclip import _ops


def units(tensor):
    return tensor.unbind() if tensor.dim() > 1 else [tensor]


def weighted(grads):
    """Parameters with random weights, some of them 0, and these gradients."""
    made = parameters(grads)
    for i, parameter in enumerate(made):
        parameter.data = torch.randn(parameter.shape).to(parameter) * (i % 3)
    return made


def weighted_twins(grads):
    made, twins = weighted(grads), weighted(grads)
    for one, other in zip(made, twins, strict=True):
        other.data = one.data.clone()
    return made, twins


def assert_same(made, twins):
    for one, other in zip(made, twins, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def layers(dtype, device="cpu"):
    shapes = [(8, 5), (8,), (6, 3, 3, 3), (), (7, 40000), (0, 4), (4, 0), (1, 9)]
    made = [(torch.randn(shape) * 0.1 * (i + 1)).to(dtype) for i, shape in enumerate(shapes)]
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    made.append(torch.randn(5, 8).to(dtype).t())
    return [tensor.to(device) for tensor in made]


@pytest.mark.parametrize("p", ORDERS)
def test_each_tensor_is_clipped_by_its_own_norm(reader, device, dtype, p):
    grads = awkward(dtype, device)
    made = parameters(grads)
    norms = fastclip.clip_grad_norms_(made, 5.0, p)
    assert norms.shape == (len(grads),)
    for parameter, grad, norm in zip(made, grads, norms, strict=True):
        expected = oracle([grad], p)
        assert ulps(norm, expected) <= 2
        coef = torch.tensor(min(1, 5.0 / (float(norm) + 1e-6)), dtype=norm.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(
            parameter.grad, (grad.to(wide) * coef.to(wide)).to(dtype), rtol=4e-3, atol=0
        )
        assert expected > 5 or torch.equal(parameter.grad, grad)
        assert oracle([parameter.grad], p) <= 5 * (1 + max(4 * torch.finfo(dtype).eps, 1e-12))


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


@without_emulation
def test_sparse_and_complex_gradients_have_norms_of_their_own(device):
    sparse = torch.sparse_coo_tensor([[1, 1]], [3.0, 1.0], (4,), device=device)
    made = parameters([torch.zeros(4, device=device), torch.zeros(2, dtype=torch.complex64)])
    made[0].grad, made[1].grad = sparse, torch.tensor([3j, 0.0])
    made[1].data, made[1].grad = made[1].data.to(device), made[1].grad.to(device)
    assert fastclip.clip_grad_norms_(made, 1.0).tolist() == [4.0, 3.0]
    assert float(made[0].grad.coalesce().values()) == pytest.approx(1.0)
    assert complex(made[1].grad[0]) == pytest.approx(1j)


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
    fastclip.clip_grad_agc_(made, 0.1)
    eps = max(torch.finfo(dtype).eps, 1e-13)
    close = {"rtol": 4 * eps, "atol": torch.finfo(dtype).smallest_normal, "equal_nan": True}
    for parameter, grad in zip(made, grads, strict=True):
        assert parameter.grad.dtype == dtype
        expected = agc(parameter.detach().cpu(), grad.cpu(), 0.1, 1e-3)
        torch.testing.assert_close(parameter.grad.cpu().double(), expected, **close)


def test_adaptive_clipping_is_idempotent_and_leaves_what_is_small(reader):
    made = weighted(layers(torch.float64))
    fastclip.clip_grad_agc_(made, 0.1)
    once = [p.grad.clone() for p in made]
    fastclip.clip_grad_agc_(made, 0.1 * (1 + 1e-12))
    assert all(torch.equal(p.grad, g) for p, g in zip(made, once, strict=True))


def test_adaptive_clipping_of_complex_and_sparse_gradients(reader):
    made = parameters([torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 1)])
    made[0].grad = torch.tensor([3.0, 4j])
    fastclip.clip_grad_agc_(made[:1], 1.0, eps=1.0)
    torch.testing.assert_close(made[0].grad, torch.tensor([0.6, 0.8j]))
    made[1].grad = torch.ones(2, 1).to_sparse()
    with pytest.raises(TypeError, match=r"sparse_coo.*not stored by rows"):
        fastclip.clip_grad_agc_(made, 1.0)
    torch.testing.assert_close(made[0].grad, torch.tensor([0.6, 0.8j]))


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
        expected = agc(parameter.detach(), grad.to_dense(), 0.1, 1e-3)
        found = parameter.grad.to_dense().double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_weight_without_a_norm_is_named_where_it_stands(reader):
    none, good = parameters([None, torch.ones(3)])
    bad = nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn))
    bad.grad_dtype = torch.float32
    bad.grad = torch.ones(2, 2)
    with pytest.raises(TypeError, match=r"the weight parameters\[3\]: dtype torch.float8_e4m3fn"):
        fastclip.clip_grad_agc_([none, good, good, bad], 0.1)
    assert torch.equal(good.grad, torch.ones(3))
    bad.grad_dtype = None
    bad.grad = bad.detach().clone()
    with pytest.raises(TypeError, match=r"the gradient of parameters\[3\]: dtype"):
        fastclip.clip_grad_agc_([none, good, good, bad], 0.1)


def test_adaptive_clipping_skips_parameters_without_gradients_and_keeps_zeros(reader):
    made = weighted([torch.tensor([[0.0, 0.0], [1.0, 0.0]]), None])
    fastclip.clip_grad_agc_([*made, made[0]], 0.0)
    assert made[1].grad is None
    assert made[0].grad.tolist() == [[0, 0], [0, 0]]
    fastclip.clip_grad_agc_([], 0.1)


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
    made = parameters([torch.zeros(3)])
    assert float(fastclip.normalize_grad_(made)) == 0
    assert not made[0].grad.any()
    fastclip.normalize_grad_(made, 0.0)
    assert not made[0].grad.any()
    made = parameters([torch.tensor([1e-40, 0.0])])
    fastclip.normalize_grad_(made)
    assert 0 < float(made[0].grad[0]) <= 1
    assert float(made[0].grad[1]) == 0


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p: fastclip.clip_grad_norms_(p, -1.0), ValueError, "max_norm"),
        (lambda p: fastclip.clip_grad_norms_(p, lambda norm: norm), TypeError, "max_norm"),
        (lambda p: fastclip.clip_grad_norms_(p, 0.1, math.nan), ValueError, "norm_type"),
        (lambda p: fastclip.clip_grad_norms_([*p, 3], 0.1), TypeError, r"parameters\[1\]"),
        (lambda p: fastclip.clip_grad_agc_(p, -1.0), ValueError, "clip_factor"),
        (lambda p: fastclip.clip_grad_agc_(p, 0.1, "x"), TypeError, "eps"),
        (lambda p: fastclip.clip_grad_agc_([*p, 3], 0.1), TypeError, r"parameters\[1\]"),
        (lambda p: fastclip.normalize_grad_(p, math.inf), ValueError, "norm"),
        (lambda p: fastclip.normalize_grad_(p, -1), ValueError, "norm"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call, error, match):
    made = parameters([torch.ones(3)])
    with pytest.raises(error, match=match):
        call(made)
    assert torch.equal(made[0].grad, torch.ones(3))


def test_several_devices_have_their_own_norms(monkeypatch):
    # One CPU stands for two devices.
    from fastclip._gradients import local

    def by_device(tensors):
        places = [*range(len(tensors))]
        return {"cpu": places[::2], "cpu:0": places[1::2]}

    made, twins = weighted_twins(layers(torch.float32))
    expected = fastclip.clip_grad_norms_(twins, 2.0)
    fastclip.clip_grad_agc_(twins, 0.1)
    monkeypatch.setattr(_ops, "extension", None)
    monkeypatch.setattr(local, "_by_device", by_device)
    torch.testing.assert_close(fastclip.clip_grad_norms_(made, 2.0), expected)
    fastclip.clip_grad_agc_(made, 0.1)
    assert_same(made, twins)


@pytest.mark.parametrize(
    "call",
    [
        lambda made: fastclip.clip_grad_norms_(made, 0.5),
        lambda made: fastclip.clip_grad_agc_(made, 0.1),
        lambda made: fastclip.normalize_grad_(made, 0.5),
    ],
)
def test_compiled_whole_it_does_the_same(call):
    made, twins = weighted_twins(layers(torch.float32)[:4])
    expected, found = call(made), torch.compile(call, fullgraph=True, backend="aot_eager")(twins)
    torch.testing.assert_close(found, expected)
    assert_same(made, twins)
