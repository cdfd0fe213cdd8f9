"""From norms to coefficients: thresholds, rules, and the policies for norms that are not finite."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ._arguments import Threshold, threshold_from_rule
from ._gradients import Gradients
from ._ops import ZEROS, clip_coef, is_host_readable


def clip_by_norm_(
    grads: Gradients,
    max_norm: Threshold,
    p: float,
    nonfinite: str = "propagate",
    factor: float | Tensor | None = None,
) -> Tensor:
    """Clip gradients in place by their norm; return the norm as `clip_grad_norm_` does."""
    needs_coef = nonfinite != "propagate" or factor is not None
    if not needs_coef and not callable(max_norm):
        return grads.clip_norm_(max_norm, p)
    norm = grads.norm(p) if factor is None else grads.norm(p) * factor
    if nonfinite == "error":
        raise_if_nonfinite(norm, p)
    limit = limit_of(max_norm, norm)
    if not needs_coef:
        return grads.clip_norm_(limit, p, norm)
    grads.scale_(decide(norm, limit, grads.is_wide(), nonfinite, factor))
    return grads.result(norm)


def decide(
    norms: Tensor,
    limit: float | Tensor,
    wide: bool,
    nonfinite: str = "propagate",
    factor: float | Tensor | None = None,
) -> Tensor:
    """Return the coefficients of the gradients: factor * min(1, limit / (norm + 1e-6)).

    `norms`, 0-d or 1-d, are already multiplied by `factor`; `wide` says whether any gradient is
    float64. The result has the shape of `norms`.
    """
    coef = clip_coef(norms, limit, wide)
    if factor is not None:
        # A tensor `factor` is not checked on the host. A negative one makes `norms` negative; it
        # gives NaN because it would reverse the step.
        coef = (coef * factor).masked_fill(norms < 0, math.nan)
    if nonfinite == "error" and isinstance(limit, Tensor) and limit.isnan().any():
        raise RuntimeError(
            "max_norm: it is NaN, so this step is to be dropped, and nonfinite is 'error'; catch "
            "this and skip the step, or pass nonfinite='keep' or 'zero'"
        )
    return apply_policy(coef, norms, limit, nonfinite)


def limit_of(max_norm: Threshold, total_norm: Tensor) -> float | Tensor:
    """Return the threshold for a norm: what the rule returns for it, or `max_norm` unchanged."""
    return threshold_from_rule(max_norm(total_norm)) if callable(max_norm) else max_norm


def limits_of(thresholds: Iterable[Threshold], norms: Tensor) -> Tensor:
    """Return a tensor like `norms` that holds the threshold of each norm."""
    each = map(limit_of, thresholds, norms.unbind())
    limits = [limit_on(norms, limit) for limit in each]
    return torch.stack(limits) if limits else norms


def limit_on(norm: Tensor, limit: float | Tensor) -> Tensor:
    """Return a threshold as a 0-d tensor on the norm's device, without waiting for the device."""
    if isinstance(limit, Tensor):
        limit = limit.detach().reshape(())
        if norm.is_cpu or not is_host_readable(limit):
            return limit.to(norm)
    # To copy a tensor from the CPU would wait for the device; to fill in a number does not.
    return norm.new_full((), float(limit))


def is_bad(norms: Tensor, limit: float | Tensor) -> Tensor:
    """Whether a step is not to be taken: a norm is not finite, or its threshold is NaN."""
    bad = ~norms.isfinite()
    return bad | limit.isnan().to(norms.device) if isinstance(limit, Tensor) else bad


def apply_policy(coef: Tensor, norms: Tensor, limit: float | Tensor, nonfinite: str) -> Tensor:
    """Return `coef`; in a bad step, 1 if `nonfinite` is "keep", ZEROS (write zeros) if "zero"."""
    if nonfinite not in ("keep", "zero"):
        return coef
    return coef.where(~is_bad(norms, limit), 1 if nonfinite == "keep" else ZEROS)


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
