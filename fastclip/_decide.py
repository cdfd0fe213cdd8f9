"""From norms to coefficients: by a threshold or a rule, and where a norm is not finite."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ._arguments import Threshold, answered
from ._ops import clip_coef


def decide(
    norms: Tensor,
    max_norm: Threshold,
    wide: bool,
    nonfinite: str = "propagate",
    factor: float | Tensor | None = None,
) -> Tensor:
    """What to multiply gradients by: factor * min(1, max_norm / (norm + 1e-6)), of `norms`' shape.

    `norms`, 0-d or 1-d, are those of `factor` times the gradients, of which any is float64 if they
    are `wide`.
    """
    limit = resolved(max_norm, norms)
    coef = clip_coef(norms, limit, wide)
    if factor is not None:
        # A tensor may be anything; below 0 it would reverse the step.
        coef = (coef * factor).masked_fill(norms < 0, math.nan)
    if nonfinite == "error" and isinstance(limit, Tensor) and limit.isnan().any():
        raise RuntimeError(
            "max_norm: it is NaN, so this step is to be dropped, and nonfinite is 'error'; catch "
            "this and skip the step, or pass nonfinite='keep' or 'zero'"
        )
    return spared(coef, norms, limit, nonfinite)


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


def spared(coef: Tensor, norms: Tensor, limit: float | Tensor, nonfinite: str) -> Tensor:
    """`coef`; where a step is bad 1 for "keep", for "zero" one that `scale_` zeroes by."""
    if nonfinite not in ("keep", "zero"):
        return coef
    return coef.where(~is_bad(norms, limit), 1 if nonfinite == "keep" else -0.0)


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
