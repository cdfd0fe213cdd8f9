"""Fused optimizers of torch, whose step divides the gradients: which can, and such a step."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._ranks import local_of
from .wrapped import layers_of, steps_as_torch

# What a scaler sets for a step, and what makes it do so, which copies of an optimizer have lost.
FLAGS = ("grad_scale", "found_inf", "_step_supports_amp_scaling")


def check(outer: Optimizer) -> None:
    inner = layers_of(outer)[-1]
    kind: type = type(inner)
    is_fused = all(group.get("fused") for group in inner.param_groups)
    if is_fused and steps_as_torch(inner) and _divides(kind):
        return
    name = kind.__name__
    name = name if inner is outer else f"{name} in {type(outer).__name__}"
    why = "as it is " if steps_as_torch(inner) else "has a step of its own, and "
    since = " and torch 2.12 or newer" if isinstance(inner, torch.optim.Adagrad) else ""
    can = steps_as_torch(inner) and "fused" in inner.defaults
    way = f"make it with fused=True{since}, or " if can else ""
    raise ValueError(
        f"optimizer: {name} {why}cannot divide gradients in its step; {way}call "
        "unscale_and_clip_(optimizer, max_norm, scaler), or without a scaler clip_grad_norm_, and "
        "then step"
    )


@functools.cache
def _divides(kind: type[Any]) -> bool:
    """Whether its fused step does: a new one says so, a copy has forgotten."""
    kind = next(one for one in kind.__mro__ if one.__module__.startswith("torch.optim."))
    if "fused" not in inspect.signature(kind).parameters:
        return False
    made = kind([torch.zeros(1, device="cpu")], fused=True)
    return divides(made)


def divides(optimizer: Any) -> bool:
    """Whether a scaler leaves it to divide the gradients."""
    return getattr(optimizer, FLAGS[-1], False)


def split(coef: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """What gradients are multiplied by before the step, and what the step divides them by.

    That is one float32: too little for float64 gradients, and too small for some coefficients.
    """
    divisor = coef.reciprocal().float()
    fits = torch.zeros_like(coef, dtype=torch.bool) if wide else divisor.isfinite()
    return coef.masked_fill(fits, 1), divisor.masked_fill(~fits, 1)


def step(
    outer: Optimizer, grad_scale: Tensor, found_inf: Tensor, prepare: Callable[[], None]
) -> None:
    """A step with these two set, and as they were after it, even None, which breaks a scaler.

    Once nothing can refuse the step any more, `prepare` is called.
    """
    inner = layers_of(outer)[-1]
    held = vars(inner)
    with_buffers = (group for group in inner.param_groups if group.get("momentum"))
    fresh = [
        (p, group) for group in with_buffers for p in group["params"] if not inner.state.get(p)
    ]
    before = {name: held[name] for name in FLAGS if name in held}
    held.update(zip(FLAGS, (grad_scale, found_inf, True), strict=True))

    @torch.no_grad()
    def begin(*_: object) -> None:
        # A wrapper may step through a scaler of its own, which sets these otherwise.
        if held.get("grad_scale") is not grad_scale or held.get("found_inf") is not found_inf:
            raise RuntimeError(
                f"optimizer: {type(outer).__name__} steps through a scaler of its own; pass the "
                f"{type(inner).__name__} in it, and that scaler as scaler"
            )
        prepare()

    hook = inner.register_step_pre_hook(begin)
    try:
        with torch.enable_grad():
            outer.step()
        _settle(inner, fresh, found_inf)
    finally:
        hook.remove()
        for name in FLAGS:
            held.pop(name, None)
        held.update(before)


def _settle(inner: Optimizer, fresh: list[tuple[Tensor, Any]], found_inf: Tensor) -> None:
    """A first step of SGD that is skipped leaves its buffers as the memory was (torch 2.13)."""
    for p, group in fresh:
        buffer = inner.state.get(p, {}).get("momentum_buffer")
        if buffer is None:
            continue
        if not group["dampening"]:
            local = local_of(buffer)
            local.copy_(local.where(found_inf.to(local.device) == 0, 0))
        elif found_inf:
            # A first gradient is not dampened, and the host decides which step is the first.
            del inner.state[p]
