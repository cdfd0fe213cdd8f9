"""Gradients that only their class can read are clipped by the calls that torch makes of it."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.utils import _pytree as pytree

import fastclip


class Quantised(torch.Tensor):
    """Int8 times a scale, one for all or one a row; only in-place ops of it change it."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values_, self.scale = values, scale

    def dense(self) -> torch.Tensor:
        return self.values_.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aten, first = torch.ops.aten, args[0]
        if func is aten.detach.default:
            return cls(first.values_, first.scale)
        if func is aten.mul_.Tensor:
            first.scale = first.scale * args[1]
            return first
        if func is aten.zero_.default:
            first.values_, first.scale = torch.zeros_like(first.values_), torch.ones(())
            return first
        if func is aten.clamp_.default:
            dense = first.dense().clamp(*args[1:])
            first.scale = dense.abs().max() / 127
            first.values_ = (dense / first.scale).round().to(torch.int8)
            return first
        args, kwargs = pytree.tree_map(
            lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def made(*, scale: float = 1.0, beside: bool = True) -> list[nn.Parameter]:
    """Gradients (3, 4) and a plain 12: together of norm 13."""
    found = [nn.Parameter(torch.zeros(1, 2))]
    found[0].grad = Quantised(torch.tensor([[3, 4]], dtype=torch.int8), torch.tensor(scale))
    if beside:
        found.append(nn.Parameter(torch.zeros(1)))
        found[1].grad = torch.tensor([12.0])
    return found


def values(items: list[nn.Parameter]) -> list[float]:
    grads = [i.grad.dense() if isinstance(i.grad, Quantised) else i.grad for i in items]
    return torch.cat([g.reshape(-1) for g in grads]).tolist()


def test_torch_clips_them() -> None:
    items = made()
    assert utils.clip_grad_norm_(items, 6.5) == 13
    assert values(items) == pytest.approx([1.5, 2.0, 6.0])


def two_halves(items: list[nn.Parameter]) -> None:
    total_norm = fastclip.get_total_norm([i.grad for i in items])
    fastclip.clip_grads_with_norm_(items, 6.5, total_norm)


def unscaled(items: list[nn.Parameter]) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    fastclip.unscale_and_clip_(torch.optim.SGD(items, lr=1.0), 6.5, scaler)


HALF = {
    "norm": lambda items: fastclip.clip_grad_norm_(items, 6.5),
    "tensor": lambda items: fastclip.clip_grad_norm_(items, torch.tensor(6.5)),
    "rule": lambda items: fastclip.clip_grad_norm_(items, lambda norm: norm / 2),
    "policy": lambda items: fastclip.clip_grad_norm_(items, 6.5, nonfinite="keep"),
    "halves": two_halves,
    "clipper": lambda items: fastclip.GradClipper(items, 6.5).clip_(),
    "accumulator": lambda items: fastclip.NormAccumulator(items).clip_(6.5),
    "unscaled": unscaled,
    "factor": lambda items: fastclip.clip_grad_norm_(items, math.inf, grad_scale=0.5),
    "normalised": lambda items: fastclip.normalize_grad_(items, 6.5),
}


@pytest.mark.parametrize("clip", HALF.values(), ids=HALF)
def test_they_are_measured_and_scaled(clip: Callable) -> None:
    items = made()
    clip(items)
    assert values(items) == pytest.approx([1.5, 2.0, 6.0], rel=1e-6)


def test_alone_and_in_other_orders() -> None:
    for p, norm in ((1.0, 7.0), (3.0, 91 ** (1 / 3)), (math.inf, 4.0)):
        items = made(beside=False)
        assert fastclip.clip_grad_norm_(items, norm / 2, p).item() == pytest.approx(norm, rel=1e-6)
        assert values(items) == pytest.approx([1.5, 2.0], rel=1e-6)


def test_nothing_to_clip_changes_nothing() -> None:
    items = made()
    scale = items[0].grad.scale
    assert fastclip.clip_grad_norm_(items, 14.0) == 13
    assert items[0].grad.scale is scale


@pytest.mark.parametrize("inside", [True, False])
def test_zeros_where_the_norm_is_not_finite(inside: bool) -> None:
    items = made(scale=math.nan if inside else 1.0)
    items[1].grad[0] = 12.0 if inside else math.nan
    fastclip.clip_grad_norm_(items, 1.0, nonfinite="zero")
    assert values(items) == [0, 0, 0]


def test_each_has_a_norm_of_its_own() -> None:
    items = made()
    assert fastclip.clip_grad_norms_(items, 2.5).tolist() == [5, 12]
    assert values(items) == pytest.approx([1.5, 2.0, 2.5], rel=1e-6)
    items = made()
    fastclip.GradClipper(
        groups=[
            {"params": [item], "max_norm": limit}
            for item, limit in zip(items, (2.5, 6.0), strict=False)
        ]
    ).clip_()
    assert values(items) == pytest.approx([1.5, 2.0, 6.0], rel=1e-6)


def test_rows_are_clipped_by_their_weights() -> None:
    items = made()
    items[0].data.fill_(0.5**0.5)  # of norm 1
    items[1].data.fill_(12.0)
    fastclip.clip_grad_agc_(items, clip_factor=0.5)
    assert values(items) == pytest.approx([0.3, 0.4, 6.0], rel=1e-6)


def test_values_are_clamped() -> None:
    items = made()
    fastclip.clip_grad_value_(items, 2.0)
    assert values(items) == pytest.approx([2.0, 2.0, 2.0])
