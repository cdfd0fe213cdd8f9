"""Gradients that only their class can read are clipped by the calls that torch makes of it."""

import math

import pytest
import torch
from conftest import CLIPS
from torch import nn
from torch.nn import utils
from torch.utils import _pytree as pytree

import fastclip


class Wrapped(torch.Tensor):
    """Has its elements in another tensor, which only in-place ops of this one change."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aten, first = torch.ops.aten, args[0]
        if func is aten.detach.default:
            return cls(first.inner)
        if func in (aten.mul_.Tensor, aten.zero_.default, aten.clamp_.default):
            func(first.inner, *args[1:])
            return first
        args, kwargs = pytree.tree_map(
            lambda x: x.inner.clone() if isinstance(x, cls) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def made(scale: float = 1.0) -> list[nn.Parameter]:
    """Gradients (3, 4) and a plain 12, together of norm 13. Their weights have norms 1 and 12."""
    wrapped, plain = (nn.Parameter(torch.full((1, n), x)) for n, x in ((2, 0.5**0.5), (1, 12.0)))
    wrapped.grad = Wrapped(torch.tensor([[3.0, 4.0]]) * scale)
    plain.grad = torch.tensor([[12.0]])
    return [wrapped, plain]


def values(items: list[nn.Parameter]) -> list[float]:
    grads = [i.grad.inner if isinstance(i.grad, Wrapped) else i.grad for i in items]
    return torch.cat([g.reshape(-1) for g in grads]).tolist()


def two_halves(items: list[nn.Parameter], max_norm: float | torch.Tensor) -> None:
    total_norm = fastclip.get_total_norm([i.grad for i in items])
    fastclip.clip_grads_with_norm_(items, max_norm, total_norm)


# With a number, and what becomes of the elements.
CALLS = {
    **{name: (clip, 6.5, [1.5, 2.0, 6.0]) for name, clip in CLIPS.items()},
    "torch": (utils.clip_grad_norm_, 6.5, [1.5, 2.0, 6.0]),
    "halves": (two_halves, 6.5, [1.5, 2.0, 6.0]),
    "each": (fastclip.clip_grad_norms_, 2.5, [1.5, 2.0, 2.5]),
    "rows": (fastclip.clip_grad_agc_, 0.5, [0.3, 0.4, 6.0]),
    "values": (fastclip.clip_grad_value_, 2.0, [2.0, 2.0, 2.0]),
    "alone": (lambda items, n: fastclip.clip_grad_norm_(items[:1], n), 2.5, [1.5, 2.0, 12.0]),
}


@pytest.mark.parametrize(("clip", "number", "expected"), CALLS.values(), ids=CALLS)
def test_they_are_measured_and_changed(clip, number, expected):
    items = made()
    clip(items, number)
    assert values(items) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("p", "norm"), [(1.0, 7.0), (2.0, 5.0), (3.0, 91 ** (1 / 3)), (math.inf, 4.0)]
)
def test_other_orders_are_of_their_elements(p: float, norm: float) -> None:
    items = made()[:1]
    before = items[0].grad.inner._version
    for max_norm in (norm + 1, norm / 2):
        assert items[0].grad.inner._version == before
        assert fastclip.clip_grad_norm_(items, max_norm, p).item() == pytest.approx(norm, rel=1e-6)
    assert values(items) == pytest.approx([1.5, 2.0], rel=1e-6)
    assert fastclip.clip_grad_norms_(made(), 2.5).tolist() == [5, 12]


@pytest.mark.parametrize("inside", [True, False])
def test_zeros_where_the_norm_is_not_finite(inside: bool) -> None:
    items = made(scale=math.nan if inside else 1.0)
    items[1].grad[0] = 12.0 if inside else math.nan
    fastclip.clip_grad_norm_(items, 1.0, nonfinite="zero")
    assert values(items) == [0, 0, 0]
