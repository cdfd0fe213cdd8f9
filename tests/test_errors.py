"""Bad input raises an error that names the argument, what it got and the way out."""

import math
import warnings

import pytest
import torch
from conftest import parameters

import fastclip
from fastclip import _decide

pytestmark = pytest.mark.usefixtures("reader")


@pytest.fixture
def good():
    """A parameter with a gradient that no error may change."""
    (made,) = parameters([torch.ones(3)])
    yield made
    assert torch.equal(made.grad, torch.ones(3))


# The functions that take parameters and a number, with the number's name.
FUNCTIONS = [
    ("max_norm", fastclip.clip_grad_norm_),
    ("clip_value", fastclip.clip_grad_value_),
    ("max_norm", lambda items, n: fastclip.clip_grads_with_norm_(items, n, torch.tensor(9.0))),
    ("max_norm", fastclip.clip_grad_norms_),
    ("clip_factor", fastclip.clip_grad_agc_),
    ("norm", fastclip.normalize_grad_),
]


@pytest.mark.parametrize(
    ("thing", "shown"),
    [
        (3, "3 of type int"),
        (None, "NoneType"),
        (("w", torch.ones(1)), r"\('w', tensor"),
        (torch.nn.Linear(1, 1), "Linear"),
    ],
)
def test_parameters_that_are_no_tensors_raise(good, thing, shown):
    for _, call in FUNCTIONS:
        with pytest.raises(TypeError, match=rf"parameters\[1\].*{shown}.*module.parameters\(\)"):
            call([good, thing], 0.1)
    with pytest.raises(TypeError, match=r"tensors\[1\]: expected a tensor"):
        fastclip.get_total_norm([good.grad, thing])


@pytest.mark.parametrize("thing", [torch.nn.Linear(1, 1), None, 2.0])
def test_parameters_that_are_no_iterable_raise(thing):
    for _, call in FUNCTIONS:
        with pytest.raises(TypeError, match=r"parameters: .*iterable.*module.parameters\(\)"):
            call(thing, 0.1)


@pytest.mark.parametrize(
    ("grad", "shown"),
    [
        (torch.ones(3, 3).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn.*cast.*bfloat16"),
        (torch.ones(3, 3).int(), "dtype torch.int32.*cast.*bfloat16"),
        (torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr.*sparse_coo"),
    ],
)
def test_unsupported_gradients_raise(good, grad, shown):
    second = torch.nn.Parameter(torch.eye(3).to_sparse(layout=grad.layout))
    second.grad_dtype, second.grad = None, grad
    for _, call in FUNCTIONS:
        with pytest.raises(TypeError, match=rf"parameters\[1\]: {shown}"):
            call([good, second], 0.1)
    with pytest.raises(TypeError, match=rf"tensors\[1\]: {shown}"):
        fastclip.get_total_norm([good.grad, grad])


def test_complex_gradients_have_no_value_to_clip(good):
    with pytest.raises(TypeError, match=r"complex.*clip by norm"):
        fastclip.clip_grad_value_([good, *parameters([torch.ones(3).cfloat()])], 0.1)


def with_norm(items, value):
    fastclip.clip_grads_with_norm_(items, 0.1, value)


def of_order(items, value):
    fastclip.clip_grad_norm_(items, 0.1, value)


AT_LEAST_ZERO = [
    *FUNCTIONS,
    ("max_norm", lambda items, value: fastclip.NormAccumulator(items).clip_(value)),
    ("eps", lambda items, value: fastclip.clip_grad_agc_(items, 0.1, value)),
]


@pytest.mark.parametrize("value", ["much", None, [1.0], 1j])
@pytest.mark.parametrize(
    ("name", "call"), [*AT_LEAST_ZERO, ("norm_type", of_order), ("total_norm", with_norm)]
)
def test_values_that_are_no_numbers_raise(good, name, call, value):
    wanted = "a 0-d tensor.*get_total_norm" if name == "total_norm" else "a number, got "
    with pytest.raises(TypeError, match=f"{name}: expected {wanted}"):
        call([good], value)


@pytest.mark.parametrize("value", [-1.0, -math.inf, math.nan])
@pytest.mark.parametrize(("name", "call"), AT_LEAST_ZERO)
def test_numbers_below_zero_and_nan_raise(good, name, call, value):
    with pytest.raises(ValueError, match=f"{name}: .*{value}"):
        call([good], value)


@pytest.mark.parametrize(
    ("call", "value", "match"),
    [
        (of_order, math.nan, "norm_type: .*nan"),
        (lambda items, p: fastclip.clip_grad_norms_(items, 0.1, p), math.nan, "norm_type: .*nan"),
        (lambda items, p: fastclip.get_total_norm(items, p), math.nan, "norm_type: .*nan"),
        (fastclip.NormAccumulator, 0, "norm_type: .*0"),
        (fastclip.normalize_grad_, math.inf, "norm: .*inf"),
        (fastclip.clip_grad_norm_, torch.ones(2), r"max_norm: .*0-d.*\(2,\)"),
        (with_norm, torch.ones(2), r"total_norm: .*0-d.*\(2,\)"),
    ],
)
def test_numbers_that_make_no_sense_raise(good, call, value, match):
    with pytest.raises(ValueError, match=match):
        call([good], value)


def test_error_if_nonfinite_is_refused_while_a_graph_is_captured(monkeypatch):
    # A stand-in for a CUDA norm, which this machine may not have.
    class Norm:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="error_if_nonfinite: waits"):
        _decide.raise_if_nonfinite(Norm(), 2.0)


def test_sparse_values_that_share_memory_raise_before_anything_changes(good):
    second = torch.nn.Parameter(torch.zeros(3, 4))
    values = torch.ones(1, 1).expand(2, 4)
    second.grad = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), values, (3, 4))
    with pytest.raises(RuntimeError, match="single memory location"):
        fastclip.clip_grad_norm_([good, second], 1.0)


@pytest.mark.parametrize(
    "clip",
    [
        fastclip.clip_grad_norm_,
        fastclip.GradClipper,
        lambda p, rule: fastclip.GradClipper(groups=[{"params": p, "max_norm": rule}]),
        lambda p, rule: fastclip.NormAccumulator(p).clip_(rule),
    ],
)
def test_a_rule_that_was_not_made_raises(good, clip):
    with pytest.raises(TypeError, match=r"max_norm: .*the class AutoClip.*AutoClip\(\)"):
        clip([good], fastclip.AutoClip)


def test_groups_that_are_no_dicts_raise():
    linear = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r'groups\[0\]: expected a dict.*"max_norm".*got Linear'):
        fastclip.GradClipper(groups=[linear, linear])


def test_a_share_for_a_percentile_warns():
    with pytest.warns(UserWarning, match="percentile: 0.9 .* pass 90") as seen:
        fastclip.AutoClip(0.9)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for percentile in (0, 1, 90):
            fastclip.AutoClip(percentile)


@pytest.mark.parametrize(
    "change",
    [
        *(call for _, call in FUNCTIONS),
        lambda grads, n: fastclip.clip_grad_norm_(grads, n, nonfinite="keep"),
        lambda grads, n: fastclip.GradClipper(grads, n).clip_(),
    ],
)
def test_gradients_instead_of_parameters_warn(change):
    grads = [torch.tensor([3.0, 4.0])]
    with pytest.warns(UserWarning, match="pass the parameters.*not the gradients") as seen:
        change(grads, 1.0)
    assert seen[0].filename == __file__
    assert grads[0].tolist() == [3, 4]
