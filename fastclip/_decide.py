"""The middle of a clip: from norms to coefficients, by a threshold or a rule, and where a norm is
not finite."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ._arguments import Threshold, answered
from ._gradients import Gradients
from ._ops import ZEROS, clip_coef


def clip_by_norm_(
    grads: Gradients,
    max_norm: Threshold,
    p: float,
    nonfinite: str = "propagate",
    factor: float | Tensor | None = None,
) -> Tensor:
    """Scale gradients in place by their norm; return that as `clip_grad_norm_` does."""
    if nonfinite == "propagate" and factor is None and not callable(max_norm):
        return grads.clip_norm_(max_norm, p)
    norm = grads.norm(p) if factor is None else grads.norm(p) * factor
    limit = resolved(max_norm, norm)
    grads.scale_(decide(norm, limit, p, grads.is_wide(), nonfinite, factor))
    return grads.result(norm)


def decide(
    norms: Tensor,
    limit: float | Tensor,
    p: float,
    wide: bool,
    nonfinite: str = "propagate",
    factor: float | Tensor | None = None,
) -> Tensor:
    """Return what gradients are multiplied by: factor * min(1, limit / (norm + 1e-6)).

    `norms`, 0-d or 1-d, of order p, are those of `factor` times the gradients, of which any is
    float64 if they are `wide`. The result has their shape.
    """
    if nonfinite == "error":
        raise_if_nonfinite(norms, p)
    coef = clip_coef(norms, limit, wide)
    if factor is not None:
        # A tensor may be anything; below 0 it would reverse the step.
        coef = (coef * factor).masked_fill(norms < 0, math.nan)
    if nonfinite == "error" and isinstance(limit, Tensor) and limit.isnan().any():
        raise RuntimeError(
            "max_norm: it is NaN, so this step is to be dropped, and nonfinite is 'error'; catch "
            "this and skip the step, or pass nonfinite='keep' or 'zero'"
        )
    return apply_policy(coef, norms, limit, nonfinite)


def resolved(max_norm: Threshold, total_norm: Tensor) -> float | Tensor:
    """What a rule makes of the norm; a number or a tensor as it is."""
    return answered(max_norm(total_norm)) if callable(max_norm) else max_norm


def limits_of(thresholds: Iterable[Threshold], norms: Tensor) -> Tensor:
    """The thresholds, one for each norm, float64 as those."""
    each = map(resolved, thresholds, norms.unbind())
    limits = [t.to(norms) if isinstance(t, Tensor) else norms.new_full((), t) for t in each]
    return torch.stack(limits) if limits else norms


def is_bad(norms: Tensor, limit: float | Tensor) -> Tensor:
    """Whether a step is not to be taken: a norm is not finite, or its threshold is NaN."""
    bad = ~norms.isfinite()
    return bad | limit.isnan().to(norms.device) if isinstance(limit, Tensor) else bad


def apply_policy(coef: Tensor, norms: Tensor, limit: float | Tensor, nonfinite: str) -> Tensor:
    """Return `coef`, but where a step is bad 1 for "keep", and ZEROS for "zero"."""
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
