"""Gradients of every kind have float64 norms, which rules and ranks take unrounded."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ORDERS, oracle, parameters
from torch import Tensor

from fastclip._gradients import SpreadGrads, read
from fastclip._gradients.look import look


def spread(items: list[Tensor]) -> Any:
    from torch.distributed.tensor import DTensor, Shard

    mesh = dist.init_device_mesh("cpu", (1,))
    wrapped = [DTensor.from_local(p.detach(), mesh, [Shard(0)]) for p in items]
    for outer, inner in zip(wrapped, items, strict=True):
        outer.grad = DTensor.from_local(inner.grad, mesh, [Shard(0)])
    grads = read(wrapped)
    assert type(grads) is SpreadGrads
    return grads


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("reader", "_one_rank")
@pytest.mark.parametrize("read_by", [read, partial(look, write=True, plan=None), spread])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_norms_are_float64_until_they_are_returned(read_by, dtype, p):
    grads = [torch.randn(shape, dtype=dtype) for shape in ((3, 4), (5,), (2, 1, 2))]
    made = read_by(parameters(grads))
    assert len(made) == len(grads)
    assert made.is_wide() == (dtype == torch.float64)
    for norm, shape in ((made.norm(p), ()), (made.norms(p), (1,))):
        assert (norm.shape, norm.dtype) == (shape, torch.float64)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        assert float(whole) == pytest.approx(oracle(grads, p), rel=2e-7)
        assert made.result(norm).dtype == (torch.float64 if made.is_wide() else torch.float32)
    for asked in (torch.float64, torch.float32, torch.bfloat16):
        assert made.result(norm, asked).dtype == asked
