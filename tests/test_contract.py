"""The contract row by row: what fastclip promises, beside torch where torch promises the same."""

import math
import random
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import oracle, parameters, ulps, without_emulation
from torch.nn import utils

import fastclip
from fastclip import _ops
from fastclip._gradients import reading


def clipped(function, grads, *args, **kwargs):
    """The norm and the gradients after `function` on copies of `grads`."""
    made = parameters(grads)
    norm = function(made, *args, **kwargs)
    return norm, [p.grad for p in made if p.grad is not None]


def same(ours, theirs) -> bool:
    return all(
        torch.allclose(a.to_dense(), b.to_dense(), rtol=2e-6, atol=0, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.usefixtures("reader")
class TestNorm:
    def test_fp64_squares_overflow_as_torchs_but_on_the_cpu(self, device):
        grads = [torch.full((3,), 2e200, dtype=torch.float64, device=device)]
        norm, (ours,) = clipped(fastclip.clip_grad_norm_, grads, 1.0)
        expected = (3**0.5 * 2e200, 3**-0.5) if device == "cpu" else (math.inf, 0)
        assert (norm.item(), ours[0].item()) == pytest.approx(expected, rel=1e-15)

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    @pytest.mark.parametrize("norm_type", [2.0, math.inf])
    def test_error_if_nonfinite_raises_before_any_gradient_changes(self, device, bad, norm_type):
        grads = [torch.ones(5, device=device), torch.full((3,), bad, device=device)]
        made = parameters(grads)
        with pytest.raises(RuntimeError) as theirs:
            utils.clip_grad_norm_(made, 1.0, norm_type, error_if_nonfinite=True)
        with pytest.raises(RuntimeError) as ours:
            fastclip.clip_grad_norm_(made, 1.0, norm_type, error_if_nonfinite=True)
        assert str(ours.value) == str(theirs.value)
        assert same([p.grad for p in made], grads)

    @pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
    @pytest.mark.parametrize("max_norm", [0.0, -0.0, 1.0])
    @pytest.mark.parametrize("total_norm", [-1.0, -1e-7, -math.inf])
    def test_a_norm_below_zero_gives_nan(self, device, total_norm, max_norm, as_tensor):
        made = parameters([torch.tensor([3.0, 4.0], device=device)])
        max_norm = torch.tensor(max_norm, device=device) if as_tensor else max_norm
        total_norm = torch.tensor(total_norm, device=device)
        fastclip.clip_grads_with_norm_(made, max_norm, total_norm)
        assert made[0].grad.isnan().all()

    def test_same_parameter_twice_counts_once(self, device):
        (parameter,) = parameters([torch.tensor([3.0, 4.0], device=device)])
        assert fastclip.clip_grad_norm_([parameter] * 2, 1.0).item() == 5
        torch.testing.assert_close(parameter.grad.cpu(), torch.tensor([0.6, 0.8]))
        total_norm = torch.tensor(1.0, dtype=torch.bfloat16, device=device)
        fastclip.clip_grads_with_norm_([parameter] * 2, 0.5, total_norm)
        torch.testing.assert_close(parameter.grad.cpu(), torch.tensor([0.3, 0.4]))

    @pytest.mark.parametrize("grads", [[], [None, None]])
    def test_no_gradients_give_a_cpu_zero(self, grads):
        for function in (utils.clip_grad_norm_, fastclip.clip_grad_norm_):
            norm = clipped(function, grads, 1.0)[0]
            assert torch.equal(norm, torch.tensor(0.0))

    def test_exhausted_generator_warns_once(self):
        for function in (utils.clip_grad_norm_, fastclip.clip_grad_norm_):
            with pytest.warns(UserWarning, match="is an empty generator") as caught:
                assert function((p for p in []), 1.0).item() == 0
            assert len(caught) == 1
            assert caught[0].filename == __file__

    @pytest.mark.parametrize("norm_type", ["inf", math.inf, 1, 2, 3.5, "2", 0, -1.0, -2.5, "-inf"])
    def test_order_may_be_anything_torch_takes(self, device, norm_type):
        grads = [torch.rand(20, device=device) + 0.5, torch.rand(4, 5, device=device) + 0.5]
        norm, theirs = clipped(utils.clip_grad_norm_, grads, 0.1, norm_type)
        for max_norm in (0.1, lambda found: found / norm.item() * 0.1):
            found, ours = clipped(fastclip.clip_grad_norm_, grads, max_norm, norm_type)
            assert same([found, *ours], [norm, *theirs])

    @pytest.mark.parametrize("norm_type", [math.inf, 1.0, 2.0, 3.0, -math.inf, -1.0, 0.0])
    def test_zero_size_tensor_counts_as_zero(self, device, norm_type):
        grads = [torch.zeros(0, device=device)]
        assert clipped(fastclip.clip_grad_norm_, grads, 1.0, norm_type)[0].item() == 0


@without_emulation
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradient_is_clipped_coalesced_and_stays_sparse(device, norm_type, coalesced):
    indices, values = torch.tensor([[0, 2, 2, 5]]), torch.tensor([3.0, 0.6, 0.6, -4.0])
    sparse = torch.sparse_coo_tensor(indices, values, (9,), device=device)
    made = parameters([sparse.coalesce() if coalesced else sparse])
    grad, dense = made[0].grad, sparse.to_dense()
    norm, version = oracle([dense], norm_type), grad._version
    assert ulps(fastclip.clip_grad_norm_(made, norm / 2, norm_type), norm) <= 2
    torch.testing.assert_close(grad.to_dense(), dense / 2)
    fastclip.clip_grad_value_(made, 0.5)
    torch.testing.assert_close(grad.to_dense(), (dense / 2).clamp(-0.5, 0.5))
    assert made[0].grad is grad
    assert grad._version >= version + 2


@without_emulation
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_complex_gradient_has_the_real_norm_of_its_elements(device, norm_type, dtype):
    # The magnitude of the first, 8.5e4, is beyond float16.
    grad = torch.tensor([6e4 + 6e4j, 3 - 4j, 0], device=device).to(dtype)
    norm, (after,) = clipped(fastclip.clip_grad_norm_, [grad], 100.0, norm_type)
    exact = grad.to(torch.complex128)
    expected = float(torch.linalg.vector_norm(exact, norm_type))
    assert norm.dtype == (torch.float64 if dtype == torch.complex128 else torch.float32)
    assert ulps(norm, expected) <= 2
    close = {"rtol": 2 * torch.finfo(dtype).eps + 1e-6, "atol": 1e-4}
    torch.testing.assert_close(after.to(exact.dtype), exact * (100 / expected), **close)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_gradient_is_clipped_by_its_elements():
    offsets = torch.tensor([0, 2, 3])
    for clip in (fastclip.clip_grad_value_, fastclip.clip_grad_norm_, fastclip.clip_grad_norms_):
        values = torch.tensor([[3.0, 0.1], [-4.0, 0.0], [0.2, -12.0]])
        flat, jagged = parameters([values, torch.zeros(1)])
        jagged = torch.nn.Parameter(torch.nested.nested_tensor_from_jagged(values * 0, offsets))
        jagged.grad = torch.nested.nested_tensor_from_jagged(values.clone(), offsets)
        version = jagged.grad._version
        norms = clip([jagged], 0.5), clip([flat], 0.5)
        assert norms == (None, None) or torch.equal(*norms)
        assert torch.equal(jagged.grad.values(), flat.grad)
        assert jagged.grad._version > version
    with pytest.raises(TypeError, match=r"torch\.jagged.*not stored by rows"):
        fastclip.clip_grad_agc_([jagged])
    holes = torch.nested.narrow(
        torch.ones(2, 4), 1, torch.tensor([0, 1]), torch.tensor([2, 3]), layout=torch.jagged
    )
    with pytest.raises(TypeError, match=r"tensors\[0\]: layout torch.jagged with holes"):
        fastclip.get_total_norm([holes])


NEGATED = {
    "dense": lambda z: torch._neg_view(z.real.clone()),
    "gaps": lambda z: z.conj().imag,
    "complex": torch._neg_view,
    "conjugate": lambda z: torch._neg_view(z.conj()),
}


@without_emulation
@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("negated", NEGATED.values(), ids=NEGATED)
def test_lazily_negated_gradient_is_clipped(device, negated):
    grad = negated(torch.randn(50, dtype=torch.complex64, device=device))
    assert grad.is_neg()
    parameter = torch.nn.Parameter(torch.zeros_like(grad))
    parameter.grad, expected = grad, grad.clone().resolve_neg().resolve_conj()
    if not grad.is_complex():
        expected = expected.clamp(-0.3, 0.3)
        fastclip.clip_grad_value_(parameter, 0.3)
        assert torch.equal(parameter.grad, expected)
    norm = fastclip.clip_grad_norm_(parameter, 0.5)
    torch.testing.assert_close(parameter.grad.resolve_conj(), expected * (0.5 / norm))


@pytest.mark.usefixtures("reader")
def test_a_total_norm_has_the_dtype_that_is_asked_for_which_may_not_hold_it(device):
    grads = [torch.full((4,), 6e4, device=device)]
    for dtype, expected in ((torch.float16, math.inf), (torch.float64, 1.2e5)):
        norm = fastclip.get_total_norm(grads, dtype=dtype)
        assert (norm.item(), norm.dtype) == (expected, dtype)
    with pytest.raises(RuntimeError, match="non-finite"):
        fastclip.get_total_norm(grads, error_if_nonfinite=True, dtype=torch.float16)
    for wrong in (torch.int32, torch.complex64, "float32"):
        with pytest.raises(TypeError, match=r"dtype: expected a floating torch\.dtype"):
            fastclip.get_total_norm(grads, dtype=wrong)


@pytest.mark.parametrize("module", [utils, fastclip])
@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_foreach_raises_as_torchs_on_a_device_that_has_none(module, name):
    with pytest.raises(RuntimeError, match="foreach=True was passed, but can't use the fo"):
        clipped(getattr(module, name), [torch.ones(4, device="meta")], 1.0, foreach=True)


NUMBERS = [int, bool, str, Fraction, Decimal, np.float32, np.float16, np.int64, np.array]
DTYPES = [torch.int64, torch.bool, torch.float64, torch.bfloat16]
THRESHOLDS = [0.0, *(kind(1) for kind in NUMBERS), *(torch.tensor(1, dtype=d) for d in DTYPES)]
THRESHOLDS += [torch.ones(1), torch.nn.Parameter(torch.ones(()))]


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("max_norm", THRESHOLDS, ids=repr)
def test_a_threshold_is_any_number_on_any_device(device, max_norm):
    grads = [torch.full((4,), 3.0, device=device)]
    norm, ours = clipped(fastclip.clip_grad_norm_, grads, max_norm)
    _, theirs = clipped(utils.clip_grad_norm_, [g.cpu() for g in grads], max_norm)
    assert norm.item() == 6
    assert not norm.requires_grad
    torch.testing.assert_close(ours[0].cpu(), theirs[0])
    if device != "cpu" and isinstance(max_norm, torch.Tensor):
        _, ours = clipped(fastclip.clip_grad_norm_, [g.cpu() for g in grads], max_norm.to(device))
        torch.testing.assert_close(ours[0], theirs[0])


ITERABLES = [list, tuple, set, iter, dict.fromkeys, torch.nn.ParameterList, lambda made: made[0]]


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("listed", ITERABLES)
def test_parameters_come_in_any_iterable(listed):
    grads = [torch.ones(2, 3), torch.full((2,), 2.0)]
    norm, theirs = clipped(lambda made: utils.clip_grad_norm_(listed(made), 0.5), grads)
    found, ours = clipped(lambda made: fastclip.clip_grad_norm_(listed(made), 0.5), grads)
    assert same([found, *ours], [norm, *theirs])


@pytest.mark.skipif(_ops.extension is None, reason="not built")
def test_foreach_takes_the_same_road(monkeypatch):
    # It would look at each gradient; it cannot.
    monkeypatch.setattr(reading, "look", None)
    for foreach in (None, True, False):
        made = parameters([torch.ones(4), torch.ones(2, 3)])
        fastclip.clip_grad_norm_(made, 1.0, foreach=foreach)
        fastclip.clip_grad_value_(made, 1.0, foreach=foreach)
        norm = fastclip.get_total_norm([p.grad for p in made], foreach=foreach)
        fastclip.clip_grads_with_norm_(made, 1.0, norm, foreach=foreach)


@pytest.mark.usefixtures("reader")
def test_memory_that_torch_refuses_to_write_to_is_refused():
    rng = random.Random(0)
    refused = 0
    for _ in range(1000):
        size = [rng.randint(0, 4) for _ in range(rng.randint(0, 4))]
        how = size, [rng.choice([0, 1, 3, 9]) for _ in size]
        memory = torch.arange(1.0, 201.0)
        before = memory.clone()
        first, second = parameters([torch.ones(3), torch.zeros(size)])
        made, second.grad = [first, second], memory.as_strided(*how)
        norm = oracle([p.grad for p in made], 2.0)
        try:
            second.grad.mul_(1)
        except RuntimeError:
            refused += 1
            for call in (fastclip.clip_grad_norm_, fastclip.clip_grad_value_):
                with pytest.raises(RuntimeError, match=r"single memory location.*parameters\[1\]"):
                    call(made, 0.1)
            assert torch.equal(first.grad, torch.ones(3))
            assert ulps(fastclip.get_total_norm([p.grad for p in made]), norm) <= 2
        else:
            assert ulps(fastclip.clip_grad_norm_(made, 1.0), norm) <= 2
            # What lies between the elements stays.
            before.as_strided(*how).div_(norm + 1e-6)
        torch.testing.assert_close(memory, before)
    assert 100 < refused < 900


def test_what_has_no_gradients_this_time_is_silent():
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    master = torch.ones(3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for some in ([], [torch.nn.Parameter(torch.ones(3)), torch.ones(3)], [frozen], [master]):
            fastclip.clip_grads_with_norm_(some, 0.1, torch.tensor(9.0))
        assert fastclip.get_total_norm(g for g in []) == 0


@pytest.mark.usefixtures("reader")
def test_a_gradient_that_requires_grad_is_clipped(device):
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], device=device))
    (w**3).sum().backward(create_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = fastclip.clip_grad_norm_([w], 0.5)
    assert not norm.requires_grad
    assert fastclip.get_total_norm([w.grad]).item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.usefixtures("reader")
def test_inference_tensors_are_clipped_in_inference_mode_and_stay_as_they_are_outside(device):
    with torch.inference_mode():
        (made,) = parameters([torch.ones(4, device=device)])
        fastclip.clip_grad_norm_([made], 1.0)
    for call in (fastclip.clip_grad_norm_, fastclip.clip_grad_value_):
        with pytest.raises(RuntimeError, match=r"[Ii]nference"):
            call([made], 0.1)
    torch.testing.assert_close(made.grad.cpu(), torch.full((4,), 0.5))


def test_meta_gradients_give_a_meta_norm():
    norm, grads = clipped(fastclip.clip_grad_norm_, [torch.ones(3, device="meta")], 1.0)
    assert norm.is_meta
    assert norm.shape == ()
    assert grads[0].is_meta
