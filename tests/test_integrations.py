"""The functions that Megatron-core calls, against what those that it had promise."""

import types

import pytest
import torch
from conftest import DTYPES, name_of, oracle, ulps

from fastclip.integrations import megatron

CHUNK, NOOP = 2048 * 32, torch.zeros(1, dtype=torch.int)


def functions(scale=None):
    """What `adapt` makes of the functions of a `clip_grads`."""
    module = types.SimpleNamespace(l2_norm_impl=None, multi_tensor_scale_impl=scale)
    megatron.adapt(module, lambda function: function)
    return module.l2_norm_impl, module.multi_tensor_scale_impl


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_megatrons_norm_is_that_of_all_tensors(dtype):
    tensors = [torch.randn(5, dtype=dtype), torch.randn(2, 3), torch.randn(0)]
    measure, _ = functions()
    norm, each = measure(CHUNK, NOOP, [tensors], False)
    assert (norm.dtype, norm.shape, each) == (torch.float32, (1,), None)
    assert ulps(norm[0], oracle(tensors, 2.0)) <= 2


@pytest.mark.parametrize("scale", [0.25, 1.0, 1 / 3, 8.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_megatrons_scaling_rounds_once(dtype, scale):
    tensors = [torch.randn(7, dtype=dtype), torch.randn(2, 3, dtype=dtype)]
    before = [t.double() * scale for t in tensors]
    _, multiply = functions()
    multiply(CHUNK, NOOP, [tensors, tensors], scale)
    # Half of a unit in the last place, and what the float32 product is off.
    rtol = 0.5 * torch.finfo(dtype).eps + 1e-7
    for now, exact in zip(tensors, before, strict=True):
        torch.testing.assert_close(now.double(), exact, rtol=rtol, atol=0)
    # As on a rank without gradients.
    none: list[torch.Tensor] = []
    multiply(CHUNK, NOOP, [none, none], scale)


def test_megatrons_own_function_scales_into_other_tensors():
    calls = []
    _, multiply = functions(lambda *given: calls.append(given))
    lists = [[torch.ones(2)], [torch.zeros(2)]]
    multiply(CHUNK, NOOP, lists, 0.5)
    assert calls == [(CHUNK, NOOP, lists, 0.5)]
    assert not lists[1][0].any()
