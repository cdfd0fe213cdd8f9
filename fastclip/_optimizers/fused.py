"""torch's fused optimizers: which of them can divide gradients in their step, and that step."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._ranks import local_of
from .wrapped import layers_of, steps_as_torch

# A scaler sets the first two attributes for a step, if the optimizer has the third. Copies of an
# optimizer lack the third, so it is set for the step as well.
FLAGS = ("grad_scale", "found_inf", "_step_supports_amp_scaling")


def check(outer: Optimizer) -> None:
    """Raise if an optimizer (in a wrapper: the one inside) cannot divide gradients in its step."""
    inner = layers_of(outer)[-1]
    kind: type = type(inner)
    is_torchs = steps_as_torch(inner)
    is_fused = all(group.get("fused") for group in inner.param_groups)
    if is_fused and is_torchs and _divides_when_fused(kind):
        return
    name = kind.__name__ if inner is outer else f"{kind.__name__} in {type(outer).__name__}"
    since = " and torch 2.12 or newer" if isinstance(inner, torch.optim.Adagrad) else ""
    need = f"fused=True{since}; got {name} without it"
    if not is_torchs:
        need = f"torch's own step; {name} has a step of its own"
    elif "fused" not in inner.defaults:
        need = f"a fused step; torch has none of {name}"
    raise ValueError(
        f"optimizer: clipped_step needs {need}. Or call unscale_and_clip_(optimizer, max_norm, "
        "scaler), or clip_grad_norm_ if you have no scaler, and then step"
    )


@functools.cache
def _divides_when_fused(kind: type[Any]) -> bool:
    """Whether the fused step of a class divides gradients; asks a new instance of the class."""
    kind = next(one for one in kind.__mro__ if one.__module__.startswith("torch.optim."))
    if "fused" not in inspect.signature(kind).parameters:
        return False
    return divides(kind([torch.zeros(1, device="cpu")], fused=True))


def divides(optimizer: Any) -> bool:
    """Whether a scaler leaves the division of the gradients to this optimizer's step."""
    return getattr(optimizer, FLAGS[-1], False)


def split(coef: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """Split a coefficient into a factor to apply before the step and a divisor for the step.

    One of the two is 1. The step takes a float32 divisor, which is not precise enough for float64
    gradients (`wide`), and which overflows for coefficients below 3e-39.
    """
    divisor = coef.reciprocal().float()
    fits = torch.zeros_like(coef, dtype=torch.bool) if wide else divisor.isfinite()
    return coef.masked_fill(fits, 1), divisor.masked_fill(~fits, 1)


def step(
    outer: Optimizer, grad_scale: Tensor, found_inf: Tensor, prepare: Callable[[], None]
) -> None:
    """Step with `grad_scale` and `found_inf` set, then put back the attributes that were there.

    Call `prepare` just before torch's step begins, when no wrapper can refuse the step any more.
    """
    inner = layers_of(outer)[-1]
    attributes = vars(inner)
    before = {name: attributes[name] for name in FLAGS if name in attributes}
    groups = [group for group in inner.param_groups if group.get("momentum")]
    fresh = [(p, group) for group in groups for p in group["params"] if not inner.state.get(p)]
    attributes.update(zip(FLAGS, (grad_scale, found_inf, True), strict=True))

    @torch.no_grad()
    def begin(*_: object) -> None:
        now = attributes.get("grad_scale"), attributes.get("found_inf")
        if now[0] is not grad_scale or now[1] is not found_inf:
            raise RuntimeError(
                f"optimizer: {type(outer).__name__} steps through a scaler of its own; pass the "
                f"{type(inner).__name__} in it as optimizer, and its scaler as scaler"
            )
        prepare()

    hook = inner.register_step_pre_hook(begin)
    try:
        with torch.enable_grad():
            outer.step()
        _clear_buffers(inner, fresh, found_inf)
    finally:
        hook.remove()
        # Remove attributes that were not there: a scaler would use a `grad_scale` left as None.
        for name in FLAGS:
            attributes.pop(name, None)
        attributes.update(before)


def _clear_buffers(inner: Optimizer, fresh: list[tuple[Tensor, Any]], found_inf: Tensor) -> None:
    """Clear the momentum of SGD after a first step that was skipped.

    torch 2.13 allocates the buffers in the skipped step, writes nothing to them, and treats the
    next step as the second.
    """
    for p, group in fresh:
        buffer = inner.state.get(p, {}).get("momentum_buffer")
        if buffer is None:
            continue
        if not group["dampening"]:
            local = local_of(buffer)
            local.copy_(local.where(found_inf.to(local.device) == 0, 0))
        elif found_inf:
            # torch does not dampen the first gradient, and decides on the host which one that is.
            del inner.state[p]
