"""The clipping functions of `torch.nn.utils`, with the same names and signatures."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._arguments import (
    Nonfinite,
    NormType,
    Threshold,
    at_least_zero,
    factor,
    fixed_threshold,
    order,
    policy,
    scalar,
    threshold,
)
from ._decide import clip_by_norm_, raise_if_nonfinite
from ._gradients import as_list, clip_at_once_, read, take
from ._ops import clip_coef, is_differentiated
from ._ranks import Kind


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: Threshold,
    norm_type: NormType = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: Any = None,
    nonfinite: Nonfinite = "propagate",
    grad_scale: float | Tensor = 1.0,
) -> Tensor:
    """Scale the gradients in place so that their global norm is at most `max_norm`.

    Each gradient is multiplied by min(1, max_norm / (norm + 1e-6)); nothing is written where this
    factor is 1. One read if nothing is clipped, no wait for the device unless `error_if_nonfinite`,
    the same bits on every call. Only these cause a graph break in `torch.compile`: `process_group`,
    `error_if_nonfinite`, and DTensors that are Partial, on several meshes or combined with a
    `nonfinite` policy.

    Args:
        parameters: tensors whose `.grad` is clipped, of any shapes, real or complex floating
            dtypes and devices, or one tensor; a parameter given twice counts once.
        max_norm: threshold, >= 0; `inf` only measures. A 0-d tensor is used on its device: a
            negative one makes every gradient NaN; NaN is treated like a norm that is not
            finite. A rule, such as `AutoClip`, is a function from the norm, a 0-d float64 tensor,
            to a number or a 0-d tensor.
        norm_type: order p of the norm, any number or `'inf'`.
        error_if_nonfinite: raise before any gradient changes; waits for the device.
        foreach: accepted as in torch; every value runs the same code.
        process_group: ranks that hold other parameters (pipeline stages, local shards), whose
            gradients are part of the norm: a group, a `DeviceMesh`, or several. DTensors need none:
            their shards on all ranks are part of the norm, and replicas count once. Every rank of
            a mesh must pass the same DTensors, with or without gradients.
        nonfinite: what to do where the norm is infinite or NaN, or the threshold NaN:
            `"propagate"` it into the gradients, as torch does; `"zero"`: all become 0; `"keep"`:
            they stay as they are, and your loop skips the step; `"error"`: the same as
            `error_if_nonfinite`. All ranks do the same, and only `"error"` waits for the device.
            If another rank raises, the norm on GPUs is NaN: `"zero"` and `"keep"` protect the
            weights then too.
        grad_scale: factor > 0, a number or a 0-d tensor, such as 1 / tokens. The gradients are
            multiplied by it in the same pass; the returned norm and `max_norm` refer to the result.

    Returns:
        The norm before clipping, 0-d. It is float64 if any gradient or any DTensor parameter is
        float64 (with a `process_group` on a GPU: any of this rank), else float32. It is a
        replicated DTensor if all parameters are DTensors of one mesh.

    A gradient whose placements differ from its parameter's, such as a `Partial` one, is replaced by
    a redistributed copy. That takes a collective of the gradient's size, in which every rank of its
    mesh must take part.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set (raised on all ranks);
            elements of a gradient share memory (`expand`); the norm is on the CPU and another rank
            cannot clip.
        TypeError, ValueError: bad input, which the message names; gradients are untouched.

    Reference: Pascanu et al. 2013, arXiv:1211.5063; `torch.nn.utils.clip_grad_norm_`.

    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([w], max_norm=1.0), w.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    items = as_list(parameters, "parameters")
    usual = not (foreach or error_if_nonfinite) and nonfinite == "propagate"
    if usual and process_group is None and type(grad_scale) is float and grad_scale == 1:
        total_norm = clip_at_once_(items, max_norm, norm_type)
        if total_norm is not None:
            return total_norm
    max_norm, p = threshold(max_norm), order(norm_type)
    nonfinite, scale = policy(nonfinite, error_if_nonfinite), factor(grad_scale, p)
    grads = read(items, foreach, process_group, Kind.of_order(p), nonfinite != "propagate")
    return clip_by_norm_(grads, max_norm, p, nonfinite, scale)


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp every element of the gradients in place to `[-clip_value, clip_value]`.

    NaN stays NaN. One pass, no wait for the device.

    Args:
        parameters: tensors whose `.grad` is clipped, of any shapes, real floating dtypes and
            devices, or one tensor.
        clip_value: the bound, >= 0, rounded to each gradient's dtype.
        foreach: accepted as in torch; every value runs the same code.

    Raises:
        TypeError, ValueError: bad input, which the message names; gradients are untouched.

    Reference: `torch.nn.utils.clip_grad_value_`.

    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([-3.0, 0.5])
    >>> clip_grad_value_([w], clip_value=1.0); w.grad
    tensor([-1.0000,  0.5000])
    """
    read(parameters, foreach).clamp_(at_least_zero("clip_value", clip_value))


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: NormType = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    dtype: torch.dtype | None = None,
    process_group: Any = None,
) -> Tensor:
    """Return the norm of all `tensors` taken as one vector: the sum of |x|^p, to the power 1/p.

    One read, in tiles whose sums are added in float64; no wait for the device unless
    `error_if_nonfinite`.

    Args:
        tensors: gradients (not parameters), of any shapes, floating dtypes and devices; or one.
        norm_type: order p of the norm, any number or `'inf'`.
        error_if_nonfinite: raise if the norm is infinite or NaN; waits for the device.
        foreach: accepted as in torch; every value runs the same code.
        dtype: floating dtype of the returned norm.
        process_group: ranks that hold other tensors, as in `clip_grad_norm_`.

    Returns:
        The norm, 0-d, on the first tensor's device. Without `dtype` it is float64 if any tensor is,
        else float32. A replicated DTensor if all are DTensors of one mesh.

    Every rank of a mesh must pass the same DTensors of that mesh: it knows of them from this list
    alone. `Partial` ones are measured in a redistributed copy.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite`.
        TypeError, ValueError: bad input, which the message names.

    Reference: `torch.nn.utils.get_total_norm`.

    >>> get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    p = order(norm_type)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating torch.dtype, got {dtype!r}")
    grads = take(tensors, foreach, process_group, Kind.of_order(p), error_if_nonfinite)
    norm = grads.norm(p)
    if error_if_nonfinite:
        raise_if_nonfinite(norm if dtype is None else norm.to(dtype), p)
    return grads.result(norm, dtype)


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale the gradients in place by `min(1, max_norm / (total_norm + 1e-6))`.

    The second half of `clip_grad_norm_`, for a norm that was measured or combined elsewhere. No
    wait for the device; nothing is written where the coefficient is 1.

    Args:
        parameters: tensors whose `.grad` is scaled, as in `clip_grad_norm_`.
        max_norm: threshold, >= 0, a number or a 0-d tensor.
        total_norm: 0-d tensor on the gradients' device, or a 0-d DTensor; a negative one makes
            every gradient NaN.
        foreach: accepted as in torch; every value runs the same code.

    Raises:
        TypeError, ValueError: bad input, which the message names; gradients are untouched.

    Reference: `torch.nn.utils.clip_grads_with_norm_`.

    >>> w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
    >>> clip_grads_with_norm_([w], max_norm=1.0, total_norm=get_total_norm([w.grad])); w.grad
    tensor([0.6000, 0.8000])
    """
    max_norm = fixed_threshold(max_norm)
    if not isinstance(total_norm, Tensor):
        raise TypeError(
            f"total_norm: expected a 0-d tensor, got {type(total_norm).__name__}; pass what "
            "get_total_norm returned, or torch.tensor(value)"
        )
    total_norm = scalar("total_norm", total_norm)
    grads = read(parameters, foreach)
    precise = total_norm.to(torch.promote_types(total_norm.dtype, torch.float32))
    with torch.set_grad_enabled(is_differentiated()):
        coef = clip_coef(precise, max_norm)
        # Some programs pass -1 for a norm that is not finite; as NaN it cannot reverse the step.
        grads.scale_(coef.masked_fill(precise < 0, math.nan))
