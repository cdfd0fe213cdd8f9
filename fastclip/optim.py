"""Clipping inside a pass over the gradients that a scaler or a fused optimizer makes anyway."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from . import _optimizers
from ._arguments import NormType, Threshold, positive_order, threshold
from ._decide import decide, is_bad, limit_of
from ._gradients import Gradients, fail, read
from ._ops import is_host_readable, widest
from ._optimizers import as_list, layers_of, parameters_of
from ._private import attribute
from .accumulator import NormAccumulator

Optimizers = Optimizer | Iterable[Optimizer]


@torch.no_grad()
def unscale_and_clip_(
    optimizer: Optimizers,
    max_norm: Threshold,
    scaler: GradScaler,
    *,
    norm_type: NormType = 2.0,
    process_group: Any = None,
    measured: NormAccumulator | None = None,
) -> Tensor:
    """Unscale the gradients of an optimizer and clip them by their global norm, in one pass.

    It replaces `scaler.unscale_(optimizer)` and `clip_grad_norm_`: with s the scale and n the
    norm of g / s, g becomes g / s * min(1, max_norm / (n + 1e-6)). It reads and writes each
    gradient once and does not wait for the device. Call `scaler.step` and `scaler.update` after it.
    If the norm is infinite or NaN, or the threshold NaN, the gradients are unscaled and not
    clipped, and `scaler.step` skips the step. Under a disabled scaler they are clipped as by
    `clip_grad_norm_`. It causes a graph break in `torch.compile`.

    Args:
        optimizer: an optimizer of any kind, or a wrapper that holds one; or several, which are
            clipped by one common norm and skip a step together.
        max_norm: threshold of the unscaled norm, as in `clip_grad_norm_`.
        scaler: the scaler of the loss; a disabled one scales nothing.
        norm_type: order p > 0 of the norm, or `'inf'`.
        process_group: ranks that hold other parameters, as in `clip_grad_norm_`.
        measured: the accumulator that has measured these gradients during backward, so that they
            are not read again to be measured.

    Returns:
        The norm of the unscaled gradients before clipping, as `clip_grad_norm_` returns it.

    Raises:
        RuntimeError: the optimizer was unscaled or stepped since the last `scaler.update()`.
        ValueError: a gradient is float16, which torch's scaler refuses too, or an argument is
            wrong. The gradients are untouched.

    Reference: `torch.amp.GradScaler.unscale_`, `torch.nn.utils.clip_grad_norm_`.

    >>> w = torch.nn.Parameter(torch.zeros(2)); optimizer = torch.optim.SGD([w], lr=1.0)
    >>> scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    >>> scaler.scale((w * torch.tensor([3.0, 4.0])).sum()).backward()
    >>> unscale_and_clip_(optimizer, 1.0, scaler), w.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    given = as_list(optimizer)
    inv_scale = _inverse_scale(scaler, given)
    how = max_norm, norm_type, process_group, measured
    grads, norm, coef, is_bad = _read_and_measure(given, inv_scale, *how)
    if inv_scale is None:
        grads.scale_(coef)
    else:
        # A step that is skipped is not clipped: its gradients are only unscaled.
        grads.scale_(coef.where(is_bad == 0, 1) * inv_scale.to(coef))
        for outer in given:
            _tell_scaler(scaler, outer, is_bad, OptState.UNSCALED)
    return grads.result(norm)


@torch.no_grad()
def clipped_step(
    optimizer: Optimizers,
    max_norm: Threshold,
    scaler: GradScaler | None = None,
    *,
    norm_type: NormType = 2.0,
    process_group: Any = None,
    measured: NormAccumulator | None = None,
) -> Tensor:
    r"""Step a fused optimizer with gradients clipped by their global norm, inside its own pass.

    It replaces `clip_grad_norm_` and `optimizer.step()`. With a scaler it replaces
    `scaler.unscale_`, `clip_grad_norm_` and `scaler.step`; call `scaler.update()` after it. The
    gradients are read once to be measured. The optimizer scales them while it reads them, and
    leaves them clipped; float64 gradients are scaled before its step. If the norm is infinite or
    NaN, or the threshold NaN, the step is skipped. It waits for the device only after the first
    step of SGD with dampening.

    Args:
        optimizer: `Adam`, `AdamW`, `SGD` or `Adagrad` (from torch 2.12 on) of `torch.optim` with
            `fused=True`, or a wrapper that holds one; or several, which are clipped by one common
            norm and skip a step together.
        max_norm: threshold of the unscaled norm, as in `clip_grad_norm_`.
        scaler: the scaler of the loss, if there is one.
        norm_type: order p > 0 of the norm, or `'inf'`.
        process_group: ranks that hold other parameters, as in `clip_grad_norm_`.
        measured: the accumulator that has measured these gradients during backward, so that they
            are not read again to be measured.

    Returns:
        The norm of the unscaled gradients before clipping, as `clip_grad_norm_` returns it.

    Raises:
        ValueError: an optimizer cannot divide gradients in its step, a gradient is float16 under a
            scaler, or an argument is wrong. Gradients and parameters are untouched.
        RuntimeError: the optimizer was unscaled or stepped since the last `scaler.update()`.

    Reference: `torch.optim.AdamW(..., fused=True)`, whose `grad_scale` and `found_inf` this sets
        for the step.

    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
    >>> clipped_step(torch.optim.SGD([w], lr=1.0, fused=True), max_norm=1.0), w
    (tensor(5.), Parameter containing:
    tensor([-0.6000, -0.8000], requires_grad=True))
    """
    given = as_list(optimizer)
    for outer in given:
        _optimizers.check(outer)
    inv_scale = None if scaler is None else _inverse_scale(scaler, given)
    how = max_norm, norm_type, process_group, measured
    grads, norm, coef, is_bad = _read_and_measure(given, inv_scale, *how)
    coef = coef if inv_scale is None else coef * inv_scale.to(coef)
    factor, divisor = _optimizers.split(coef, grads.is_wide())
    # The host can compare a factor on the CPU. On other devices the op itself skips a factor of 1.
    todo = [] if is_host_readable(factor) and factor == 1 else [factor.where(is_bad == 0, 1)]

    def prepare() -> None:
        while todo:
            grads.scale_(todo.pop())

    # A wrapper can still refuse to step, so wrappers step first: no parameter has changed yet.
    for outer in sorted(given, key=lambda one: len(layers_of(one)), reverse=True):
        _optimizers.step(outer, divisor, is_bad, prepare)
        if scaler is not None and inv_scale is not None:
            _tell_scaler(scaler, outer, is_bad, OptState.STEPPED)
    return grads.result(norm)


def _read_and_measure(
    given: list[Optimizer],
    inv_scale: Tensor | None,
    max_norm: Threshold,
    norm_type: NormType,
    process_group: Any,
    measured: NormAccumulator | None,
) -> tuple[Gradients, Tensor, Tensor, Tensor]:
    """Return the gradients, their unscaled norm, its coefficient, and whether to skip the step.

    The last is a 0-d float32 tensor, 1 or 0, like the `found_inf` of scalers and optimizers.
    """
    max_norm, p = threshold(max_norm), positive_order(norm_type)
    items = parameters_of(given)
    if measured is None:
        grads = read(items, process_group=process_group, agree=True)
    elif not isinstance(measured, NormAccumulator):
        raise TypeError(f"measured: expected a NormAccumulator, got {type(measured).__name__}")
    elif process_group is not None:
        raise ValueError("measured: holds norms of this rank alone; leave out process_group")
    else:
        grads = measured.take(items, p)
    if inv_scale is not None and grads.has(torch.float16):
        halves = (i.grad is not None and i.grad.dtype is torch.float16 for i in items)
        why = (
            f"optimizer: the gradient of its parameter {[*halves].index(True)} is float16, which "
            "torch's scaler does not unscale either; keep the parameters in float32 under autocast"
        )
        fail(grads, ValueError(why))
    scaled = grads.norm(p)
    norm = scaled if inv_scale is None else scaled * inv_scale.to(scaled)
    limit = limit_of(max_norm, norm)
    return grads, norm, decide(norm, limit, grads.is_wide()), is_bad(scaled, limit).float()


def _inverse_scale(scaler: GradScaler, given: list[Optimizer]) -> Tensor | None:
    """Return 1 / scale, or None for a disabled scaler; raise where `scaler.unscale_` would."""
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
    if not scaler.is_enabled():
        return None
    scale: Tensor = attribute(scaler, "_check_scale_growth_tracker")("unscale_")[0]
    for optimizer in [layer for outer in given for layer in layers_of(outer)]:
        stage = _states(scaler)[id(optimizer)]["stage"]
        if stage is not OptState.READY:
            done = "unscaled" if stage is OptState.UNSCALED else "stepped"
            raise RuntimeError(
                f"optimizer: {type(optimizer).__name__} has already been {done} since the last "
                "scaler.update(); call one function that unscales, once in each step"
            )
    return scale.to(widest(scale.device)).reciprocal().float()


def _states(scaler: GradScaler) -> Any:
    """Return what the scaler has recorded for each optimizer since its last `update`."""
    return attribute(scaler, "_per_optimizer_states")


def _tell_scaler(scaler: GradScaler, outer: Optimizer, is_bad: Tensor, stage: OptState) -> None:
    """Write into the scaler's record what `scaler.unscale_` or `scaler.step` would write."""
    for optimizer in layers_of(outer):
        state = _states(scaler)[id(optimizer)]
        # `scaler.update` adds these up in place, so each optimizer has a tensor of its own.
        state["found_inf_per_device"] = {is_bad.device: is_bad.clone()}
        state["stage"] = stage
