"""Bad input raises an error that names the argument, what it got and the way out."""

import math
import warnings

import pytest
import torch
from conftest import parameters

import fastclip
from fastclip import _decide, _ops


@pytest.fixture(params=["walk", "python"], autouse=True)
def path(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(_ops, "extension", None)


def every_function(items, max_norm=0.1):
    """The functions that take parameters, called on `items`."""
    return [
        lambda: fastclip.clip_grad_norm_(items, max_norm),
        lambda: fastclip.clip_grad_value_(items, max_norm),
        lambda: fastclip.clip_grads_with_norm_(items, max_norm, torch.tensor(9.0)),
    ]


@pytest.mark.parametrize(
    ("thing", "shown"),
    [
        (3, "3 of type int"),
        (None, "NoneType"),
        ("w", "'w' of type str"),
        (("w", torch.ones(1)), r"\('w', tensor"),
        (torch.nn.Linear(1, 1), "Linear"),
    ],
    ids=["int", "None", "str", "named", "module"],
)
def test_parameters_that_are_no_tensors_raise(thing, shown):
    (good,) = parameters([torch.ones(3)])
    for call in every_function([good, thing]):
        with pytest.raises(TypeError, match=rf"parameters\[1\].*{shown}.*module.parameters\(\)"):
            call()
    assert torch.equal(good.grad, torch.ones(3))


@pytest.mark.parametrize("thing", [torch.nn.Linear(1, 1), None, 2.0])
def test_parameters_that_are_no_iterable_raise(thing):
    for call in every_function(thing):
        with pytest.raises(TypeError, match=r"parameters: .*iterable.*module.parameters\(\)"):
            call()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool])
def test_unsupported_dtypes_raise(dtype):
    first, second = parameters([torch.ones(3), torch.ones(3)])
    second.grad_dtype = None
    second.grad = torch.ones(3).to(dtype)
    for call in every_function([first, second]):
        with pytest.raises(TypeError, match=rf"parameters\[1\]: dtype {dtype}.*cast.*bfloat16"):
            call()
    with pytest.raises(TypeError, match=rf"tensors\[1\]: dtype {dtype}"):
        fastclip.get_total_norm([first.grad, second.grad])
    assert torch.equal(first.grad, torch.ones(3))


def test_unsupported_layouts_raise():
    (good,) = parameters([torch.ones(3)])
    other = torch.nn.Parameter(torch.eye(3).to_sparse_csr())
    other.grad = torch.eye(3).to_sparse_csr()
    for call in every_function([good, other]):
        with pytest.raises(
            TypeError, match=r"parameters\[1\]: layout torch.sparse_csr.*sparse_coo"
        ):
            call()
    assert torch.equal(good.grad, torch.ones(3))


def test_complex_gradients_have_no_value_to_clip():
    first, second = parameters([torch.ones(3), torch.ones(3, dtype=torch.complex64)])
    with pytest.raises(TypeError, match=r"complex.*clip by norm"):
        fastclip.clip_grad_value_([first, second], 0.1)
    assert torch.equal(first.grad, torch.ones(3))


@pytest.mark.parametrize("value", ["much", None, [1.0], 1j])
@pytest.mark.parametrize("name", ["max_norm", "norm_type", "clip_value"])
def test_values_that_are_no_numbers_raise(name, value):
    (good,) = parameters([torch.ones(3)])
    calls = {
        "max_norm": lambda: fastclip.clip_grad_norm_([good], value),
        "norm_type": lambda: fastclip.clip_grad_norm_([good], 0.1, value),
        "clip_value": lambda: fastclip.clip_grad_value_([good], value),
    }
    with pytest.raises(TypeError, match=f"{name}: expected a number, got "):
        calls[name]()
    assert torch.equal(good.grad, torch.ones(3))


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_bound_below_zero_raises(value):
    (good,) = parameters([torch.ones(3)])
    with pytest.raises(ValueError, match=f"clip_value: .*{value}"):
        fastclip.clip_grad_value_([good], value)
    assert torch.equal(good.grad, torch.ones(3))


def test_norm_type_nan_raises():
    (good,) = parameters([torch.ones(3)])
    for call in (
        lambda: fastclip.clip_grad_norm_([good], 0.1, math.nan),
        lambda: fastclip.get_total_norm([good.grad], math.nan),
    ):
        with pytest.raises(ValueError, match=r"norm_type: .*nan"):
            call()
    assert torch.equal(good.grad, torch.ones(3))


@pytest.mark.parametrize("total_norm", [2.0, None, "2"])
def test_total_norm_that_is_no_tensor_raises(total_norm):
    (good,) = parameters([torch.ones(3)])
    with pytest.raises(TypeError, match=r"total_norm: .*get_total_norm"):
        fastclip.clip_grads_with_norm_([good], 0.1, total_norm)
    assert torch.equal(good.grad, torch.ones(3))


def test_scalars_of_another_shape_raise():
    (good,) = parameters([torch.ones(3)])
    with pytest.raises(ValueError, match=r"max_norm: .*0-d.*\(2,\)"):
        fastclip.clip_grad_norm_([good], torch.ones(2))
    with pytest.raises(ValueError, match=r"total_norm: .*0-d.*\(2,\)"):
        fastclip.clip_grads_with_norm_([good], 0.1, torch.ones(2))
    assert torch.equal(good.grad, torch.ones(3))


@pytest.mark.parametrize("thing", [None, 3.0, "w"])
def test_tensors_that_are_none_raise(thing):
    with pytest.raises(TypeError, match=r"tensors\[1\]: expected a tensor"):
        fastclip.get_total_norm([torch.ones(3), thing])


def test_error_if_nonfinite_is_refused_while_a_graph_is_captured(monkeypatch):
    # A stand-in for a CUDA norm, which this machine may not have.
    class Norm:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="error_if_nonfinite: waits"):
        _decide.raise_if_nonfinite(Norm(), 2.0)


def test_sparse_values_that_share_memory_raise_before_anything_changes():
    first, second = (torch.nn.Parameter(torch.zeros(n)) for n in ((4,), (3, 4)))
    first.grad = torch.full((4,), 3.0)
    values = torch.ones(1, 1).expand(2, 4)
    second.grad = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), values, (3, 4))
    with pytest.raises(RuntimeError, match="single memory location"):
        fastclip.clip_grad_norm_([first, second], 1.0)
    assert torch.equal(first.grad, torch.full((4,), 3.0))


def test_lazily_negated_complex_gradients_are_clipped():
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    for grad in (torch.tensor([3j, 4.0]), torch.tensor([3j, 4.0]).conj()):
        parameter.grad = torch._neg_view(grad.resolve_conj())
        before = parameter.grad.clone()
        assert float(fastclip.clip_grad_norm_([parameter], 1.0)) == 5
        torch.testing.assert_close(parameter.grad.clone(), before / 5)


@pytest.mark.parametrize(
    "clip",
    [
        lambda p, rule: fastclip.clip_grad_norm_(p, rule),
        lambda p, rule: fastclip.GradClipper(p, rule),
        lambda p, rule: fastclip.GradClipper(groups=[{"params": p, "max_norm": rule}]),
        lambda p, rule: fastclip.NormAccumulator(p).clip_(rule),
    ],
)
def test_a_rule_that_was_not_made_raises(clip):
    made = parameters([torch.tensor([3.0, 4.0])])
    with pytest.raises(TypeError, match=r"max_norm: .*the class AutoClip.*AutoClip\(\)"):
        clip(made, fastclip.AutoClip)
    assert made[0].grad.tolist() == [3, 4]


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
        lambda grads: fastclip.clip_grad_norm_(grads, 1.0),
        lambda grads: fastclip.clip_grad_norm_(grads, 1.0, nonfinite="keep"),
        lambda grads: fastclip.clip_grad_value_(grads, 1.0),
        lambda grads: fastclip.clip_grad_norms_(grads, 1.0),
        lambda grads: fastclip.clip_grad_agc_(grads),
        lambda grads: fastclip.normalize_grad_(grads),
        lambda grads: fastclip.GradClipper(grads, 1.0).clip_(),
    ],
)
def test_gradients_instead_of_parameters_warn(change):
    grads = [torch.tensor([3.0, 4.0])]
    with pytest.warns(UserWarning, match="pass the parameters.*not the gradients") as seen:
        change(grads)
    assert seen[0].filename == __file__
    assert grads[0].tolist() == [3, 4]
