"""The door: what the public functions take, checked once, with what it got and the way out."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._mesh import value_of

Threshold = float | Tensor | Callable[[Tensor], float | Tensor]


def number(name: str, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


def at_least_zero(name: str, value: float) -> float:
    if not (checked := number(name, value)) >= 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value}")
    return checked


def positive(name: str, value: float | Tensor) -> float | Tensor | None:
    """A factor, a number > 0 or a 0-d tensor; None for 1."""
    if isinstance(value, Tensor):
        return scalar(name, value)
    checked = number(name, value)
    if not 0 < checked < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return None if checked == 1 else checked


def order(norm_type: float) -> float:
    p = number("norm_type", norm_type)
    if p != p:
        raise ValueError("norm_type: expected a number or 'inf', got nan")
    return p


def positive_order(norm_type: float) -> float:
    p = order(norm_type)
    if not p > 0:
        raise ValueError(
            f"norm_type: expected an order > 0, in which infinities show, got {norm_type}"
        )
    return p


def scalar(name: str, value: Tensor) -> Tensor:
    value = value_of(value)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a 0-d tensor, got shape {tuple(value.shape)}")
    return value.reshape(()) if value.dim() else value


def threshold(max_norm: Any) -> Any:
    """A number >= 0, a 0-d tensor, or a rule."""
    return max_norm if callable(max_norm) else fixed_threshold(max_norm)


def fixed_threshold(max_norm: Any) -> float | Tensor:
    if isinstance(max_norm, Tensor):
        return scalar("max_norm", max_norm)
    value = number("max_norm", max_norm)
    if not value >= 0:
        raise ValueError(f"max_norm: expected a threshold >= 0, got {max_norm}")
    return value


def resolved(max_norm: Threshold, total_norm: Tensor) -> float | Tensor:
    """What a rule makes of the norm; a number or a tensor as it is."""
    return fixed_threshold(max_norm(total_norm)) if callable(max_norm) else max_norm


def policy(nonfinite: str, error_if_nonfinite: bool = False) -> str:
    if nonfinite not in ("propagate", "error", "zero", "skip"):
        raise ValueError(
            f"nonfinite: expected 'propagate', 'error', 'zero' or 'skip', got {nonfinite!r}"
        )
    if error_if_nonfinite and nonfinite not in ("propagate", "error"):
        raise ValueError(
            f"nonfinite: {nonfinite!r} and error_if_nonfinite=True are two answers; pass one"
        )
    return "error" if error_if_nonfinite else nonfinite


def raise_if_nonfinite(norms: Tensor, p: float) -> None:
    if norms.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "error_if_nonfinite: waits for the device, which no CUDA graph capture allows; capture "
            "the call without it and look at the norm it returns after a replay"
        )
    if not norms.isfinite().all():
        raise RuntimeError(
            f"The total norm of order {p} for gradients from `parameters` is non-finite, so it "
            "cannot be clipped. To disable this error and scale the gradients by the non-finite "
            "norm anyway, set `error_if_nonfinite=False`"
        )
