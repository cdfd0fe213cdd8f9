"""The contract row by row: what fastclip promises, beside torch where torch promises the same."""

import itertools
import math
import random
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import awkward, oracle, parameters, ulps, without_emulation
from torch.nn import utils

import fastclip
from fastclip import _ops
from fastclip._gradients import reading

HUGE = 1e30


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
    @pytest.mark.parametrize("max_norm", [0.5, 3, 100.0])
    def test_coefficient_is_torchs(self, device, dtype, max_norm):
        grads = [torch.randn(50, device=device).to(dtype), None, torch.ones(3, 4, device=device)]
        norm, ours = clipped(fastclip.clip_grad_norm_, grads, max_norm)
        expected = oracle([g for g in grads if g is not None], 2.0)
        coef = min(1.0, max_norm / (expected + 1e-6))
        assert ulps(norm, expected) <= 2
        for now, then in zip(ours, [grads[0], grads[2]], strict=True):
            eps = 2 * torch.finfo(now.dtype).eps + 1e-6
            expected_grad = then.cpu().double() * coef
            torch.testing.assert_close(now.cpu().double(), expected_grad, rtol=eps, atol=0)
        if dtype in (torch.float32, torch.float64):
            assert same(ours, clipped(utils.clip_grad_norm_, grads, max_norm)[1])

    def test_nothing_to_clip_writes_nothing(self, device):
        # A product by 1.0, as torch's, turns a signalling NaN quiet: a write that shows.
        signalling = torch.tensor([0x7F800001], dtype=torch.int32, device=device)
        parameter = torch.nn.Parameter(torch.zeros(1, device=device))
        parameter.grad = signalling.view(torch.float32)
        fastclip.clip_grads_with_norm_([parameter], 10.0, torch.tensor(2.0, device=device))
        assert signalling.item() == 0x7F800001
        fastclip.clip_grads_with_norm_([parameter], 1.0, torch.tensor(2.0, device=device))
        assert signalling.item() != 0x7F800001

    @pytest.mark.parametrize(
        ("dtype", "count", "value"),
        [(torch.float16, 100, 9486.8), (torch.float32, 128, 1e19)],
        ids=["fp16-norm-94868", "fp32-norm-1.1e20"],
    )
    def test_finite_gradients_have_a_finite_norm(self, device, dtype, count, value):
        grads = [torch.full((count,), value, dtype=dtype, device=device)]
        norm, ours = clipped(fastclip.clip_grad_norm_, grads, 1.0)
        assert ulps(norm, oracle(grads, 2.0)) <= 2
        after = fastclip.get_total_norm(ours).item()
        assert after == pytest.approx(1, rel=2 * torch.finfo(dtype).eps)

    def test_fp64_squares_overflow_as_torchs_but_on_the_cpu(self, device):
        grads = [torch.full((3,), 2e200, dtype=torch.float64, device=device)]
        norm, (ours,) = clipped(fastclip.clip_grad_norm_, grads, 1.0)
        if device == "cpu":
            assert norm.item() == pytest.approx(3**0.5 * 2e200, rel=1e-15)
            torch.testing.assert_close(ours, torch.full_like(ours, 3**-0.5), rtol=1e-15, atol=0)
        else:
            assert norm.item() == math.inf
            assert not ours.any()

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_one_nonfinite_element_propagates(self, device, bad):
        grads = [torch.ones(5, device=device), torch.ones(3, device=device)]
        grads[0][2] = bad
        norm, ours = clipped(fastclip.clip_grad_norm_, grads, 1.0)
        expected, theirs = clipped(utils.clip_grad_norm_, grads, 1.0)
        assert same([norm, *ours], [expected, *theirs])

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    @pytest.mark.parametrize("norm_type", [2.0, math.inf])
    def test_error_if_nonfinite_raises_before_any_gradient_changes(self, device, bad, norm_type):
        grads = [torch.ones(5, device=device), torch.full((3,), bad, device=device)]
        messages = []
        for function in (utils.clip_grad_norm_, fastclip.clip_grad_norm_):
            made = parameters(grads)
            with pytest.raises(RuntimeError) as error:
                function(made, 1.0, norm_type, error_if_nonfinite=True)
            messages.append(str(error.value))
            assert same([p.grad for p in made], grads)
        assert messages[0] == messages[1]
        assert messages[1].startswith(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite"
        )

    @pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
    def test_infinite_threshold_only_measures(self, device, as_tensor):
        grads = [torch.tensor([1.0, math.inf, 2.0], device=device)]
        max_norm = torch.tensor(math.inf, device=device) if as_tensor else math.inf
        norm, ours = clipped(fastclip.clip_grad_norm_, grads, max_norm)
        assert norm.item() == math.inf
        assert torch.equal(ours[0], grads[0])

    @pytest.mark.parametrize("max_norm", [-1.0, math.nan, -math.inf])
    def test_threshold_below_zero_raises(self, device, max_norm):
        grads = [torch.ones(3, device=device)]
        made = parameters(grads)
        with pytest.raises(ValueError, match=f"max_norm.*{max_norm}"):
            fastclip.clip_grad_norm_(made, max_norm)
        with pytest.raises(ValueError, match=f"max_norm.*{max_norm}"):
            fastclip.clip_grads_with_norm_(made, max_norm, torch.tensor(1.0))
        assert torch.equal(made[0].grad, grads[0])

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
        fastclip.clip_grads_with_norm_([parameter] * 2, 0.5, torch.tensor(1.0, device=device))
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
        theirs = clipped(utils.clip_grad_norm_, grads, 0.1, norm_type)
        ours = clipped(fastclip.clip_grad_norm_, grads, 0.1, norm_type)
        assert same([ours[0], *ours[1]], [theirs[0], *theirs[1]])

    @pytest.mark.parametrize("norm_type", [math.inf, 1.0, 2.0, 3.0, -math.inf, -1.0, 0.0])
    def test_a_rule_clips_as_the_number_it_returns(self, device, norm_type):
        grads = [torch.rand(n, device=device) + 1 for n in (3, 2, 2)]
        number = clipped(fastclip.clip_grad_norm_, grads, 0.5, norm_type)
        seen = []
        rule = clipped(fastclip.clip_grad_norm_, grads, lambda n: seen.append(n) or 0.5, norm_type)
        assert same([rule[0], *rule[1]], [number[0], *number[1]])
        assert float(seen[0]) == pytest.approx(float(number[0]), rel=1e-6)

    @pytest.mark.parametrize("norm_type", [math.inf, 1.0, 2.0, 3.0, -math.inf, -1.0, 0.0])
    def test_zero_size_tensor_counts_as_zero(self, device, norm_type):
        grads = [torch.zeros(0, device=device)]
        assert clipped(fastclip.clip_grad_norm_, grads, 1.0, norm_type)[0].item() == 0

    def test_version_counters_are_bumped(self, device):
        made = parameters([torch.ones(3, device=device), torch.ones(4, device=device)])
        for max_norm in (HUGE, 0.5):
            versions = [p.grad._version for p in made]
            fastclip.clip_grad_norm_(made, max_norm)
            assert all(p.grad._version > v for p, v in zip(made, versions, strict=True))

    def test_two_halves_equal_the_whole(self, device, dtype):
        grads = [torch.randn(40_000).to(dtype).to(device) for _ in range(3)]
        whole = clipped(fastclip.clip_grad_norm_, grads, 0.5)
        made = parameters(grads)
        norm = fastclip.get_total_norm([p.grad for p in made])
        fastclip.clip_grads_with_norm_(made, 0.5, norm)
        assert torch.equal(norm, whole[0])
        assert all(torch.equal(p.grad, g) for p, g in zip(made, whole[1], strict=True))


@without_emulation
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradient_is_clipped_coalesced_and_stays_sparse(device, norm_type, coalesced):
    indices, values = torch.tensor([[0, 2, 2, 5]]), torch.tensor([3.0, 0.6, 0.6, -4.0])
    sparse = torch.sparse_coo_tensor(indices, values, (9,), device=device)
    sparse = sparse.coalesce() if coalesced else sparse
    grads = [sparse, sparse.clone(), torch.ones(2, device=device)]
    norm = oracle([g.to_dense() for g in grads], norm_type)
    for clip, change in (
        (lambda made: fastclip.clip_grad_norm_(made, 1.0, norm_type), lambda t: t / norm),
        (lambda made: fastclip.clip_grad_value_(made, 1.0), lambda t: t.clamp(-1, 1)),
    ):
        made = parameters(grads)
        versions = [p.grad._version for p in made]
        found = clip(made)
        assert found is None or ulps(found, norm) <= 2
        for parameter, grad, version in zip(made, grads, versions, strict=True):
            assert parameter.grad.layout == grad.layout
            assert parameter.grad._version > version
            torch.testing.assert_close(parameter.grad.to_dense(), change(grad.to_dense()))


@without_emulation
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "conjugate"])
def test_complex_gradient_has_torchs_real_norm(device, norm_type, dtype, lazy):
    grad = torch.randn(50, dtype=dtype, device=device)
    (parameter,) = parameters([grad])
    parameter.grad = grad.clone().conj() if lazy else grad.clone()
    # torch refuses to scale a list with a lazy conjugate.
    expected, (theirs,) = clipped(
        utils.clip_grad_norm_, [parameter.grad.resolve_conj()], 0.5, norm_type
    )
    norm = fastclip.clip_grad_norm_([parameter], 0.5, norm_type)
    assert norm.dtype == (torch.float32 if dtype == torch.complex64 else torch.float64)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(parameter.grad, theirs)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_half_complex_gradient_has_the_norm_of_its_elements(norm_type):
    # The magnitude of the first, 8.5e4, is beyond float16.
    grad = torch.tensor([6e4 + 6e4j, 3 - 4j, 0]).to(torch.complex32)
    norm, (after,) = clipped(fastclip.clip_grad_norm_, [grad], 100.0, norm_type)
    exact = grad.to(torch.complex128)
    expected = float(torch.linalg.vector_norm(exact, norm_type))
    assert norm.dtype == torch.float32
    assert ulps(norm, expected) <= 2
    after = after.to(torch.complex128)
    torch.testing.assert_close(after, exact * (100 / expected), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_gradient_is_clipped_by_its_elements():
    offsets = torch.tensor([0, 2, 3])
    for clip in (
        lambda p: fastclip.clip_grad_value_(p, 0.5),
        lambda p: fastclip.clip_grad_norm_(p, 1.0),
        lambda p: fastclip.clip_grad_norms_(p, 0.25),
        lambda p: fastclip.clip_grads_with_norm_(p, 0.1, torch.tensor(9.0)),
    ):
        values = torch.tensor([[3.0, 0.1], [-4.0, 0.0], [0.2, -12.0]])
        flat, jagged = parameters([values, torch.zeros(1)])
        jagged = torch.nn.Parameter(torch.nested.nested_tensor_from_jagged(values * 0, offsets))
        jagged.grad = torch.nested.nested_tensor_from_jagged(values.clone(), offsets)
        version = jagged.grad._version
        norms = clip([jagged]), clip([flat])
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
@pytest.mark.parametrize("asked", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_total_norm_has_the_dtype_that_is_asked_for(device, dtype, asked):
    grads = awkward(dtype, device)
    norm = fastclip.get_total_norm(grads, 2.0, dtype=asked)
    assert norm.dtype == asked
    expected = oracle(grads, 2.0)
    own = 1e-14 if dtype == torch.float64 else 2.4e-7
    assert abs(norm.double().item() - expected) <= (torch.finfo(asked).eps + own) * expected


@pytest.mark.usefixtures("reader")
def test_a_dtype_that_does_not_hold_the_norm_is_an_error_if_that_is_asked_for(device):
    grads = [torch.full((4,), 6e4, device=device)]
    assert fastclip.get_total_norm(grads, dtype=torch.float16).item() == math.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        fastclip.get_total_norm(grads, error_if_nonfinite=True, dtype=torch.float16)
    for wrong in (torch.int32, torch.complex64, "float32"):
        with pytest.raises(TypeError, match=r"dtype: expected a floating torch\.dtype"):
            fastclip.get_total_norm(grads, dtype=wrong)


def test_foreach_is_accepted_and_raises_as_torchs(device):
    grads = [torch.ones(4, device=device)]
    for foreach in (None, True, False):
        assert clipped(fastclip.clip_grad_norm_, grads, 1.0, foreach=foreach)[0].item() == 2
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        for module in (utils, fastclip):
            with pytest.raises(RuntimeError, match="foreach=True was passed, but can't use the fo"):
                clipped(getattr(module, name), [grads[0].to("meta")], 1.0, foreach=True)


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


LISTS = {
    "values": lambda module: dict(module.named_parameters()).values(),
    "set": lambda module: set(module.parameters()),
    "chain": lambda module: itertools.chain(module[0].parameters(), module[1].parameters()),
    "group": lambda module: torch.optim.SGD(module.parameters()).param_groups[0]["params"],
    "list": lambda module: list(module.parameters()),
    "tuple": lambda module: tuple(module.parameters()),
    "iterator": lambda module: iter(list(module.parameters())),
    "generator": lambda module: module.parameters(),
    "filter": lambda module: filter(lambda p: p.requires_grad, module.parameters()),
    "list of the module": lambda module: torch.nn.ParameterList(module.parameters()),
    "one": lambda module: module[0].weight,
}


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("listed", LISTS.values(), ids=LISTS)
def test_parameters_come_in_any_iterable(listed):
    norms = []
    for clip in (utils.clip_grad_norm_, fastclip.clip_grad_norm_):
        module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
        for i, parameter in enumerate(module.parameters()):
            parameter.grad = torch.full_like(parameter, i + 1.0)
        norms.append(clip(listed(module), 0.5).item())
        assert clip(listed(module), 9.0).item() == pytest.approx(0.5, rel=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


@pytest.mark.skipif(_ops.extension is None, reason="not built")
def test_foreach_takes_the_same_road(monkeypatch):
    def look(*_):
        raise AssertionError("looked at one by one")

    monkeypatch.setattr(reading, "look", look)
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
            for call in (
                lambda made: fastclip.clip_grad_norm_(made, 0.1),
                lambda made: fastclip.clip_grad_value_(made, 0.1),
                lambda made: fastclip.clip_grads_with_norm_(made, 0.1, torch.tensor(9.0)),
            ):
                with pytest.raises(RuntimeError, match=r"single memory location.*parameters\[1\]"):
                    call(made)
            assert torch.equal(first.grad, torch.ones(3))
            assert ulps(fastclip.get_total_norm([p.grad for p in made]), norm) <= 2
        else:
            assert ulps(fastclip.clip_grad_norm_(made, 1.0), norm) <= 2
            # What lies between the elements stays.
            before.as_strided(*how).div_(norm + 1e-6)
        torch.testing.assert_close(memory, before)
    assert 100 < refused < 900


def test_clip_grads_with_norm_given_bare_tensors_warns():
    tensors = [torch.ones(3)]
    utils.clip_grads_with_norm_(tensors, 0.1, torch.tensor(9.0))
    with pytest.warns(
        UserWarning, match="fastclip.*no parameter has a gradient.*pass the parameters"
    ) as seen:
        fastclip.clip_grads_with_norm_(tensors, 0.1, torch.tensor(9.0))
    assert seen[0].filename == __file__
    assert torch.equal(tensors[0], torch.ones(3))


def test_what_has_no_gradients_this_time_is_silent():
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    master = torch.ones(3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for some in ([], [torch.nn.Parameter(torch.ones(3)), torch.ones(3)], [frozen], [master]):
            fastclip.clip_grads_with_norm_(some, 0.1, torch.tensor(9.0))
        assert fastclip.get_total_norm(g for g in []) == 0


def test_bfloat16_total_norm_is_taken_as_it_is(device):
    made = parameters([torch.ones(4, device=device)])
    total_norm = torch.tensor(2.0, dtype=torch.bfloat16, device=device)
    fastclip.clip_grads_with_norm_(made, 1.0, total_norm)
    torch.testing.assert_close(made[0].grad, torch.full((4,), 0.5, device=device))


@pytest.mark.usefixtures("reader")
def test_a_gradient_that_requires_grad_is_clipped(device):
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], device=device))
    (w**3).sum().backward(create_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = fastclip.clip_grad_norm_([w], 0.5)
    assert not norm.requires_grad
    assert fastclip.get_total_norm([w.grad]).item() == pytest.approx(0.5, rel=1e-6)


def test_inference_tensors_are_clipped_in_inference_mode(device):
    with torch.inference_mode():
        made = parameters([torch.ones(4, device=device)])
        fastclip.clip_grad_norm_(made, 1.0)
        torch.testing.assert_close(made[0].grad, torch.full((4,), 0.5, device=device))


@pytest.mark.usefixtures("reader")
def test_inference_tensors_stay_as_they_are_outside():
    with torch.inference_mode():
        grad = torch.tensor([3.0, 4.0])
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = grad
    for call in (
        lambda: fastclip.clip_grad_norm_([parameter], 1.0),
        lambda: fastclip.clip_grad_value_([parameter], 1.0),
    ):
        with pytest.raises(RuntimeError, match=r"[Ii]nference"):
            call()
    assert torch.equal(grad, torch.tensor([3.0, 4.0]))


def test_meta_gradients_give_a_meta_norm():
    norm, grads = clipped(fastclip.clip_grad_norm_, [torch.ones(3, device="meta")], 1.0)
    assert norm.is_meta
    assert norm.shape == ()
    assert grads[0].is_meta
