"""The functions that Megatron-core calls, against what those that it had promise."""

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import DTYPES, name_of, oracle, ulps

from fastclip import patching
from fastclip._run import Counted

CHUNK, NOOP = 2048 * 32, torch.zeros(1, dtype=torch.int)


@pytest.fixture
def clip_grads(monkeypatch):
    """A module like Megatron-core's, patched while a test runs, and given back what it had."""
    theirs = dict.fromkeys(("l2_norm_impl", "multi_tensor_scale_impl", "other"), Mock())
    module = SimpleNamespace(**theirs)
    monkeypatch.setitem(sys.modules, "megatron.core.optimizer.clip_grads", module)
    counted = Counted(keep=True)
    with patching.patch_with(counted.wrap):
        yield module
    assert counted.calls.keys() <= {"multi_tensor_l2norm", "multi_tensor_scale"}
    assert counted.calls
    assert vars(module) == theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_megatrons_norm_is_that_of_all_tensors(clip_grads, dtype):
    tensors = [torch.randn(5, dtype=dtype), torch.randn(2, 3), torch.randn(0)]
    norm, each = clip_grads.l2_norm_impl(CHUNK, NOOP, [tensors], False)
    assert (norm.dtype, norm.shape, each) == (torch.float32, (1,), None)
    assert ulps(norm[0], oracle(tensors, 2.0)) <= 2


@pytest.mark.parametrize("scale", [0.25, 1.0, 1 / 3, 8.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_megatrons_scaling_rounds_once(clip_grads, dtype, scale):
    tensors = [torch.randn(7, dtype=dtype), torch.randn(2, 3, dtype=dtype)]
    before = [t.double() * scale for t in tensors]
    clip_grads.multi_tensor_scale_impl(CHUNK, NOOP, [tensors, tensors], scale)
    # Half of a unit in the last place, and what the float32 product is off.
    rtol = 0.5 * torch.finfo(dtype).eps + 1e-7
    for now, exact in zip(tensors, before, strict=True):
        torch.testing.assert_close(now.double(), exact, rtol=rtol, atol=0)
    # As on a rank without gradients.
    none: list[torch.Tensor] = []
    clip_grads.multi_tensor_scale_impl(CHUNK, NOOP, [none, none], scale)


def test_megatrons_own_function_scales_into_other_tensors(clip_grads):
    lists = [[torch.ones(2)], [torch.zeros(2)]]
    clip_grads.multi_tensor_scale_impl(CHUNK, NOOP, lists, 0.5)
    assert clip_grads.other.call_args.args == (CHUNK, NOOP, lists, 0.5)
    assert not lists[1][0].any()
