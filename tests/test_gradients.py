"""Gradients of every kind have float64 norms, which rules and ranks take unrounded."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ORDERS, oracle, parameters, precision
from torch import Tensor

from fastclip import _ops
from fastclip._gradients import SpreadGrads, read
from fastclip._gradients.look import look


def local(items: list[Tensor]) -> Any:
    return look(items, True, None)


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


def floats(norms: Tensor) -> list[float]:
    return (norms.full_tensor() if hasattr(norms, "full_tensor") else norms).reshape(-1).tolist()


@pytest.mark.usefixtures("reader", "_one_rank")
@pytest.mark.parametrize("read_by", [read, local, spread])
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_norms_are_float64_until_they_are_returned(read_by, dtype, p):
    grads = [torch.randn(shape, dtype=dtype) for shape in ((3, 4), (5,), (2, 1, 2))]
    made = read_by(parameters(grads))
    assert len(made) == len(grads)
    assert made.is_wide() == (dtype == torch.float64)
    total, all_groups = made.norm(p), made.norms(p)
    assert (total.shape, all_groups.shape) == ((), (1,))
    assert total.dtype == all_groups.dtype == torch.float64
    assert floats(total) == pytest.approx(floats(all_groups), rel=precision(_ops, 0), abs=0)
    assert floats(total) == pytest.approx([oracle(grads, p)], rel=2e-7)
    expected = torch.float64 if made.is_wide() else torch.float32
    assert made.result(total).dtype == made.result(all_groups).dtype == expected
    for asked in (torch.float64, torch.float32, torch.bfloat16):
        assert made.result(total, asked).dtype == asked
