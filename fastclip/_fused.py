"""Fused optimizers of torch, whose step divides the gradients: which can, and such a step."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._mesh import local_of
from ._wrapped import layers_of, steps_as_torch


def check(outer: Optimizer) -> None:
    inner = layers_of(outer)[-1]
    takes = getattr(inner, "_step_supports_amp_scaling", False) and steps_as_torch(inner)
    if takes and all(group.get("fused") for group in inner.param_groups):
        return
    name = type(inner).__name__
    name = name if inner is outer else f"{name} in {type(outer).__name__}"
    why = "as it is " if steps_as_torch(inner) else "has a step of its own, and "
    since = " and torch 2.12 or newer" if isinstance(inner, torch.optim.Adagrad) else ""
    can = steps_as_torch(inner) and "fused" in inner.defaults
    way = f"make it with fused=True{since}, or " if can else ""
    raise ValueError(
        f"optimizer: {name} {why}cannot divide gradients in its step; {way}call "
        "unscale_and_clip_(scaler, optimizer, max_norm), or without a scaler clip_grad_norm_, and "
        "then step"
    )


def split(coef: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """What gradients are multiplied by before the step, and what the step divides them by.

    That is one float32: too little for float64 gradients, and too small for some coefficients.
    """
    divisor = coef.reciprocal().float()
    fits = torch.zeros_like(coef, dtype=torch.bool) if wide else divisor.isfinite()
    return coef.masked_fill(fits, 1), divisor.masked_fill(~fits, 1)


def step(outer: Optimizer, grad_scale: Tensor, found_inf: Tensor) -> None:
    """A step with these two set, and as they were after it, even None, which breaks a scaler."""
    inner = layers_of(outer)[-1]
    held = vars(inner)
    with_buffers = (group for group in inner.param_groups if group.get("momentum"))
    fresh = [
        (p, group) for group in with_buffers for p in group["params"] if not inner.state.get(p)
    ]
    before = {name: held[name] for name in ("grad_scale", "found_inf") if name in held}
    held.update(grad_scale=grad_scale, found_inf=found_inf)

    def check_flags(*_: object) -> None:
        # A wrapper may step through a scaler of its own, which sets these otherwise.
        if held.get("grad_scale") is not grad_scale or held.get("found_inf") is not found_inf:
            raise RuntimeError(
                f"optimizer: {type(outer).__name__} steps through a scaler of its own; pass the "
                f"{type(inner).__name__} in it, and that scaler as scaler"
            )

    checking = inner.register_step_pre_hook(check_flags)
    try:
        with torch.enable_grad():
            outer.step()
        _settle(inner, fresh, found_inf)
    finally:
        checking.remove()
        for name in ("grad_scale", "found_inf"):
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
